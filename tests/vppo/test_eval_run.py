"""An evaluation from the model to its answers: killed, gone on with, extended, in two processes, refused."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from support import families
from support.datafiles import picture
from support.evaluations import publish
from support.runs import FAMILY

from vppo.demo import warmup
from vppo.demo.digits import as_dataset, strips
from vppo.demo.model import build_model, build_processor
from vppo.errors import InputError
from vppo.evaluation import work
from vppo.evaluation.options import EvaluationOptions
from vppo.evaluation.run import evaluate, regrade
from vppo.evaluation.side_by_side import gpu_shares, run_side_by_side
from vppo.evaluation.store import Answer, Store
from vppo.evaluation.tokens import think_warning

QUICK: dict[str, Any] = {
    "samples": 2, "max_tokens": 4, "dependency": 2, "min_pixels": None, "max_pixels": None, "system_prompt": "",
    "instruction": "",
}  # fmt: skip


def questions(folder: Path, count: int = 5) -> Path:
    """A set whose last question has no image."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        picture(folder / f"{i}.png", size=((56, 28), (28, 56))[i % 2])
        images = [f"{i}.png"] if i < count - 1 else []
        rows.append({"problem": f"How much {i}?", "answer": i, "images": images, "subject": ["odd", "even"][i % 2]})
    file = folder / "sums.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model as a user has one: in a folder."""
    folder = tmp_path_factory.mktemp("model")
    built, processor = families.build(FAMILY)
    built.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def straight(model: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What comes out when nothing comes between."""
    folder = tmp_path_factory.mktemp("straight")
    return evaluate(model, out=folder / "run", data=[questions(folder)], **QUICK)


def same(first: pd.DataFrame, second: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(first, second, rtol=1e-4, atol=1e-7)


def test_what_is_written(straight: Any) -> None:
    answers, summary, out = straight.answers, straight.summary, straight.out
    seen, blind = answers[answers["view"] == "seen"], answers[answers["view"] == "grey"]
    assert seen.groupby("question").size().tolist() == [2] * 5 and len(blind) == 5
    assert (seen["tokens"] <= 4).all() and set(answers["subject"]) == {"odd", "even"}
    measured = seen[seen["dependency"].notna()]["question"].unique().tolist()
    assert measured == [0, 2]  # two questions, spread over the set
    found = summary["benchmarks"]["sums"]
    assert (found["questions"], found["samples"], found["dependency"]["answers"]) == (5, 2, 4)
    assert set(found["subjects"]) == {"odd", "even"}
    knobs = summary["knobs"]
    assert (knobs["protocol"], knobs["top_p"], knobs["judge"], knobs["graders"]) == (
        "paper",
        1.0,
        "none",
        ["math-verify"],
    )
    assert set(knobs) == set(EvaluationOptions.__dataclass_fields__)
    for name in ("report.html", "results.md", "summary.json", "answers.parquet", "questions.parquet", "figures"):
        assert (out / name).exists(), name
    assert json.loads((out / "summary.json").read_text()) == summary


def test_stored_answers_are_graded_to_the_same_numbers(straight: Any) -> None:
    again = regrade(straight.out)
    assert again.summary == straight.summary
    same(again.answers, straight.answers)


def killed_after(parts: int, model: str, out: Path, file: Path) -> None:
    """A process of its own evaluates and is killed as soon as it has written so many parts."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        return
    try:
        written = 0
        add = Store.add

        def add_and_die(store: Store, benchmark: str, view: str, answers: list[Answer]) -> None:
            nonlocal written
            add(store, benchmark, view, answers)
            written += 1
            if written == parts:
                path = next(store.folder.glob(f"{benchmark}.{view}.*.jsonl"))
                path.write_bytes(path.read_bytes() + b'{"question": 3, "sam')  # a line that was being written
                os.kill(os.getpid(), signal.SIGKILL)

        Store.add = add_and_die  # type: ignore[method-assign]
        evaluate(model, out=out, data=[file], **QUICK)
    finally:
        os._exit(1)


def test_killed_and_gone_on_with(straight: Any, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "PART", {"transformers": 2, "vllm": 2})
    file, out = questions(tmp_path), tmp_path / "run"
    for parts in (2, 1):  # the second one begins where the first one ended
        killed_after(parts, model, out, file)
    there = list(Store(out).answers("sums", "seen"))
    assert 0 < len(there) < 10
    asked: list[Any] = []
    written = work.Worker._answer

    def count(worker: Any, sampler: Any, benchmark: Any, view: str, missing: dict[int, list[int]]) -> None:
        asked.extend((view, question, sample) for question, samples in missing.items() for sample in samples)
        written(worker, sampler, benchmark, view, missing)

    monkeypatch.setattr(work.Worker, "_answer", count)
    found = evaluate(model, out=out, data=[file], **QUICK)
    same(found.answers, straight.answers)
    assert len(asked) == 15 - len(there) and not {("seen", a.question, a.sample) for a in there} & set(asked)


def test_gone_on_with_for_more(straight: Any, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More samples, another blind column, fewer questions: what is there is not asked again."""
    file, out = questions(tmp_path), tmp_path / "run"
    evaluate(model, out=out, data=[file], **{**QUICK, "samples": 1, "blind": "none", "dependency": 0, "limit": 3})
    more = evaluate(model, out=out, data=[file], **{**QUICK, "blind": "removed", "blind_samples": 2})
    mine, theirs = (a[a["view"] == "seen"].drop(columns="dependency") for a in (more.answers, straight.answers))
    same(mine.reset_index(drop=True), theirs.reset_index(drop=True))
    assert (more.answers["view"] == "removed").sum() == 10

    def never(*arguments: Any) -> None:
        raise AssertionError("nothing is missing")

    monkeypatch.setattr(work.Worker, "_answer", never)
    monkeypatch.setattr(work.Worker, "_measure", never)
    same(
        evaluate(model, out=out, data=[file], **{**QUICK, "blind": "removed", "blind_samples": 2}).answers, more.answers
    )


def test_another_evaluation_is_not_gone_on_with(straight: Any, model: str, tmp_path: Path) -> None:
    file = questions(tmp_path)
    out = straight.out

    def refused(message: str, model: Any = model, data: Any = file, **changes: Any) -> None:
        with pytest.raises(InputError, match=message):
            evaluate(model, out=changes.pop("out", out), data=[data], **{**QUICK, **changes})

    refused("--seed: got 1, but the evaluation in .* was started with 0; choose another --out", seed=1)
    refused("--temperature: got 0.5, but", temperature=0.5)
    refused(r"--instruction: got 'Be brief\.'", instruction="Be brief.")
    other, processor = families.build(FAMILY)
    with torch.no_grad():
        next(other.parameters()).mul_(1.01)
    refused("other weights|--model", model=(other, processor))
    questions(tmp_path, 6)
    refused("sums: has other questions, answers or images than when the evaluation")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    refused("--out: .* holds other files; takes a new or empty folder", out=taken)
    refused("processes: got 2, takes 1 for a model in memory", model=(other, processor), processes=2)
    assert (out / "summary.json").exists()


@pytest.mark.slow
def test_two_processes(straight: Any, model: str, tmp_path: Path) -> None:
    file = questions(tmp_path)
    found = evaluate(model, out=tmp_path / "run", data=[file], **QUICK, processes=2)
    same(found.answers, straight.answers)
    assert len(list((tmp_path / "run" / "answers").glob("sums.seen.*.jsonl"))) == 2


def test_questions_that_cannot_be_asked_are_listed(tmp_path: Path) -> None:
    publish(tmp_path, {"mathvision": 3})
    next(tmp_path.rglob("1.png")).write_bytes(b"no picture")
    found = evaluate(
        families.build(FAMILY), out=tmp_path / "run", benchmarks=["mathvision"], mirror=tmp_path,
        **{**QUICK, "samples": 1, "dependency": 0},
    )  # fmt: skip
    (skipped,) = found.summary["skipped"]
    assert (skipped["benchmark"], skipped["question"]) == ("mathvision", 1)
    assert "MathLLMs_MathVision.json, row 2, column 'images'" in skipped["reason"]
    assert found.summary["benchmarks"]["mathvision"]["questions"] == 2
    assert found.summary["warnings"] == ["MathVision has 3 questions here, 2,907 as published"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "1 question could not be asked" in page and "as published" in page
    with pytest.raises(InputError, match=r"no question could be asked; the first reason: the prompt has .* no room"):
        evaluate(
            families.build(FAMILY), out=tmp_path / "none", data=[questions(tmp_path)], **{**QUICK, "max_tokens": 10**6}
        )


def test_the_demos_model_on_its_own_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ninth benchmark: warmed up on these very strips, the model reads them; blind it is left with guessing."""
    known = list(strips("labelled", 20, seed=1))
    monkeypatch.setattr(warmup, "strips", lambda *which: itertools.cycle(known))
    monkeypatch.setattr(warmup, "BATCH", len(known))
    monkeypatch.setattr(warmup, "MISMATCHED", 0)
    processor = build_processor()
    model = build_model(processor, seed=0)
    assert warmup.warm_up(model, processor, seed=0) < 100  # as soon as it knows them
    file = tmp_path / "digits.parquet"
    as_dataset(known).to_parquet(file)
    found = evaluate(
        (model.eval(), processor), out=tmp_path / "run", data=[file],
        **{**QUICK, "max_tokens": 20, "dependency": 10, "blind_samples": 4},
    )  # fmt: skip
    numbers = found.summary["benchmarks"]["digits"]
    guess = max(Counter(strip.answer for strip in known).values()) / len(known)  # the best that one answer to all does
    assert numbers["blind"]["low"] <= guess < 0.3 and numbers["blind"]["mean"] <= guess + 0.1
    assert numbers["accuracy"]["low"] > 0.7 and numbers["seen_minus_blind"]["low"] > 0.3
    assert numbers["dependency"]["mean"] > 0.05 and numbers["no_box"] < 0.1


# -- the parts ---------------------------------------------------------------------------------------------------------


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add("sums", "seen", [Answer(0, 0, "a \ud800 line\n", [1, 2], True)])
    assert [answer.text for answer in store.answers("sums", "seen")] == ["a \ud800 line\n"]
    path = tmp_path / "answers" / "sums.seen.0.jsonl"
    path.write_bytes(path.read_bytes() + b"[1]\n")
    with pytest.raises(
        InputError, match=r"sums.seen.0.jsonl, line 2: is no answer of ours: '\[1\]\\n'; remove that line"
    ):
        list(store.answers("sums", "seen"))


@pytest.mark.parametrize("kind", ["seen", "dependency", "skipped"])
def test_a_line_that_lacks_a_field_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "answers" / f"sums.{kind}.0.jsonl"
    path.parent.mkdir()
    path.write_text('{"question": 1}\n')
    store = Store(tmp_path)
    read = {"seen": lambda: store.keys("sums", "seen"), "dependency": lambda: store.dependencies("sums")}
    with pytest.raises(InputError, match=rf"sums.{kind}.0.jsonl, line 1: is no answer of ours"):
        read.get(kind, lambda: store.skipped("sums"))()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 0}, "samples: got 0, takes a whole number from 1"),
        ({"top_k": -1}, "top_k: got -1, takes a whole number from 0"),
        ({"top_p": 0.0}, "top_p: got 0.0, takes a number above 0 and at most 1"),
        ({"temperature": -1.0}, "temperature: got -1.0, takes a number from 0"),
        ({"temperature": 0.0}, "samples: got 8, takes 1 at temperature 0"),
        ({"temperature": 0.0, "samples": 1, "blind_samples": 2}, "blind_samples: got 2, takes 1 at temperature 0"),
        ({"min_pixels": 9, "max_pixels": 4}, "min_pixels: got 9, takes at most max_pixels, which is 4"),
        ({"blind": "dark"}, "blind: got 'dark', takes one of"),
        ({"judge": "gpt"}, r"judge: got 'gpt', takes one of \['none'\]"),
        ({"memory": 0}, "memory: got 0, takes a number of GiB above 0"),
        ({"graders": ("nobody",)}, "graders: got 'nobody'"),
        ({"protocol": "mine"}, r"protocol: got 'mine', takes one of \['paper', 'papo'\]"),
    ],
)
def test_options_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        EvaluationOptions.of(changes.pop("protocol", "paper"), **changes)


def test_protocols(monkeypatch: pytest.MonkeyPatch) -> None:
    paper = EvaluationOptions.of("paper", max_tokens=4096)
    assert (paper.samples, paper.temperature, paper.top_p, paper.top_k, paper.max_tokens) == (8, 1.0, 1.0, 0, 4096)
    assert (paper.min_pixels, paper.max_pixels) == (200_704, 1_003_520)
    monkeypatch.setattr("vppo.evaluation.options.check_graders", lambda names: None)
    papo = EvaluationOptions.of("papo")
    assert (papo.top_k, papo.min_pixels, papo.max_pixels) == (50, 1024, 589_824)
    assert papo.graders == ("mathruler", "math-verify")


def test_gpus_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_shares(EvaluationOptions(processes=2, device="cpu")) == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_shares(EvaluationOptions(processes=2, tensor_parallel=2)) == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7,6")
    assert gpu_shares(EvaluationOptions(processes=3)) == ["5", "7", "6"]
    with pytest.raises(InputError, match="processes: got 2 of 2 GPUs each, takes at most 1: there are 3"):
        gpu_shares(EvaluationOptions(processes=2, tensor_parallel=2))


def test_a_process_that_cannot_be_started_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as from a script whose main part has no `if __name__ == "__main__"`."""

    def refuse(process: Any) -> None:
        raise RuntimeError("of a script")

    monkeypatch.setattr(multiprocessing.context.SpawnProcess, "start", refuse)
    with pytest.raises(RuntimeError, match="of a script"):
        run_side_by_side("m", [], [], EvaluationOptions(processes=2, device="cpu"), tmp_path, lambda: None)


@pytest.mark.parametrize(
    ("tokens", "special", "instruction", "said"),
    [
        ({"<think>": [1, 2], "</think>": [3]}, [], "in <think> tags", "<think> is not a token of this tokenizer"),
        ({"<think>": [0], "</think>": [3]}, [], "in <think> tags", "<think> is not a token of this tokenizer"),
        ({"<think>": [1], "</think>": [3, 4]}, [], "in <think> tags", "</think> is not a token"),
        ({"<think>": [1], "</think>": [3]}, [1], "in <think> tags", "<think> is a special token"),
        ({"<think>": [1], "</think>": [3]}, [], "in <think> tags", None),
        ({}, [], "no tags", None),
    ],
)
def test_think(tokens: dict[str, list[int]], special: list[int], instruction: str, said: str | None) -> None:
    class Tokenizer(types.SimpleNamespace):
        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": tokens[text]}

    found = think_warning(Tokenizer(unk_token_id=0, all_special_ids=special), instruction)
    assert found is None if said is None else said in str(found)


def test_by_vllm_where_it_is_installed(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in: the engine is asked with every knob, and its answers are stored."""
    seen: dict[str, Any] = {}

    class LLM:
        def __init__(self, **options: Any) -> None:
            seen["engine"] = options

        def generate(self, requests: list[Any], params: list[Any], use_tqdm: bool) -> list[Any]:
            seen["params"] = params[0]
            ids = families.VOCABULARY["7"], families.VOCABULARY["<eos>"]
            return [types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=ids)]) for _ in requests]

    stand_in = types.ModuleType("vllm")
    vars(stand_in).update(LLM=LLM, SamplingParams=lambda **options: options)
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    knobs = {**QUICK, "dependency": 0, "top_k": 50, "top_p": 0.9, "sampler": "vllm", "tensor_parallel": 2}
    found = evaluate(model, out=tmp_path / "run", data=[questions(tmp_path)], **knobs)
    assert seen["engine"]["tensor_parallel_size"] == 2 and seen["engine"]["model"] == model
    assert (seen["params"]["top_k"], seen["params"]["top_p"], seen["params"]["max_tokens"]) == (50, 0.9, 4)
    assert set(found.answers["text"]) == {"7"} and found.answers["ended"].all() and found.summary["sampler"] == "vllm"
