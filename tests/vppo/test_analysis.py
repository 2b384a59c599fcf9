"""`vppo.analyze`: every column against float64, what is skipped and why, several models, and killed runs.

Run as a script, this file is an analysis that kills itself at given points; see `killed_and_resumed`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support import families
from support.runs import FAMILY, plain_views, rows

import vppo.analysis.run
from vppo import Analysis, analyze
from vppo.errors import InputError
from vppo.locks import claimed
from vppo_kernels import reference, sampled_divergence

NAMES = [f.name for f in families.FAMILIES]
TEXTS = ("3+5=8", "=", "one of two", "?")
SAMPLED = {"system_prompt": "", "instruction": "", "max_tokens": 6, "samples": 2}
TABLES = ("tokens.parquet", "trajectories.parquet")


def ids_of(text: str) -> list[int]:
    return [*(families.VOCABULARY[c] for c in text), families.VOCABULARY["<eos>"]]


def given(count: int) -> list[dict[str, Any]]:
    """Two responses of different lengths to each problem."""
    return [{"sample": i // 2, "response_ids": ids_of(TEXTS[i % len(TEXTS)])} for i in range(2 * count)]


def columns_by_hand(family: str, row: dict[str, Any], sample: int, draws: int) -> dict[str, np.ndarray]:
    """All columns of one response in float64, from two ordinary forwards a draw."""
    model, processor = families.build(family)
    targets = torch.tensor(row["response_ids"])
    found: dict[str, list[torch.Tensor]] = {}
    for draw in range(draws):
        p, q = plain_views(model, processor, row, (7, sample, draw))
        logprobs, logprobs_perturbed = reference.logprob(p, targets), reference.logprob(q, targets)
        for name, value in {
            "kl": reference.kl(p, q),
            "reverse_kl": reference.kl(q, p),
            "jsd": reference.jsd(p, q),
            "k3": sampled_divergence(logprobs, logprobs_perturbed, kind="k3"),
            "logprob": logprobs,
            "logprob_perturbed": logprobs_perturbed,
            "entropy": reference.entropy(p),
            "entropy_perturbed": reference.entropy(q),
        }.items():
            found.setdefault(name, []).append(value)
    values = {name: torch.stack(draws).numpy() for name, draws in found.items()}
    first = {f"{name}_first": values[name][0] for name in ("kl", "k3")}
    return {**{name: x.mean(0) for name, x in values.items()}, **first, "all": values["kl"]}


@pytest.mark.parametrize("memory", [1e-9, 4.0], ids=["one by one", "together"])
@pytest.mark.parametrize("family", NAMES)
def test_every_column_of_every_family(family: str, memory: float) -> None:
    """Means over draws, standard errors and kept sets; batches of several problems, padded to each other."""
    model, processor = families.build(family)
    data, draws = rows(3, sizes=((56, 28), (28, 56))), 3
    found = analyze((model, processor), data, responses=given(3), draws=draws, seed=7, memory=memory)
    assert found.tokens["model"].unique().tolist() == ["responses"] and found.out is None
    assert list(found.trajectories["tokens"]) == [len(row["response_ids"]) for row in given(3)]
    groups = found.tokens.groupby(["sample", "response"])
    assert len(groups) == 6
    for ((sample, number), group), row in zip(groups, given(3), strict=True):
        assert (group["token_id"] == row["response_ids"]).all() and (group["position"] == range(len(group))).all()
        assert "".join(group["text"]) == TEXTS[(2 * sample + number) % 4] + "<eos>"
        expected = columns_by_hand(family, {**data[sample], **row}, sample, draws)
        every = expected.pop("all")
        expected["dependency"] = expected["kl"]
        expected["dependency_se"] = every.std(0, ddof=1) / np.sqrt(draws)
        for name, values in expected.items():
            assert group[name].dtype == np.float32
            np.testing.assert_allclose(group[name], values, rtol=1e-3, atol=2e-5, err_msg=name)
        scores = torch.from_numpy(expected["kl"])[None]
        keep = reference.topk_mask(scores, torch.ones_like(scores), 0.4)[0]
        assert group["kept"].tolist() == keep.tolist()


def test_small_divergences_keep_their_digits() -> None:
    """A divergence is not the difference of two entropies: relative accuracy also where it is tiny."""
    model, processor = families.build(FAMILY)
    with torch.no_grad():
        model.get_output_embeddings().weight *= 1e-3
    found = analyze((model, processor), rows(1), responses=given(1)[:1], seed=7)
    with torch.no_grad():
        model.double()
        p, q = plain_views(model, processor, {**rows(1)[0], **given(1)[0]}, (7, 0))
    kl = reference.kl(p, q).numpy()
    assert kl.max() < 1e-4
    error = np.abs(found.tokens["kl"] - kl)
    assert (error <= 1e-3 * kl + 3e-6 * np.sqrt(kl) + 1e-8).all()


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "jsd", "k3"])
def test_dependency_is_the_chosen_divergence(divergence: str) -> None:
    found = analyze(
        families.build(FAMILY), rows(2), responses=given(2), divergence=divergence, keep_ratio=0.3, temperature=0.7
    )
    assert (found.tokens["dependency"] == found.tokens[divergence]).all()
    assert found.tokens["dependency_se"].isna().all()
    assert (found.tokens["kl"] == found.tokens["kl_first"]).all()
    for (_, group), (_, row) in zip(
        found.tokens.groupby(["sample", "response"]), found.trajectories.iterrows(), strict=True
    ):
        sets = {}
        for name in ("dependency", "kl", "k3"):
            scores = torch.tensor(group[name].to_numpy())[None]
            sets[name] = reference.topk_mask(scores, torch.ones_like(scores), 0.3)[0].numpy()
        assert (group["kept"] == sets["dependency"]).all()
        assert row["kept_overlap_k3"] == pytest.approx((sets["kl"] & sets["k3"]).sum() / sets["kl"].sum())
        for name in ("dependency", "kl", "k3"):
            assert row[f"mean_{name}"] == pytest.approx(group[name].mean(), rel=1e-5)
        assert row["tokens"] == len(group) and row["text"] == "".join(group["text"])


def test_temperature_and_model_mode() -> None:
    model, processor = families.build(FAMILY)
    model.train()
    hot = analyze((model, processor), rows(1), responses=given(1), temperature=5.0).tokens
    assert model.training and "forward" not in vars(model.get_output_embeddings())
    assert (hot["entropy"] > analyze((model, processor), rows(1), responses=given(1)).tokens["entropy"]).all()


def test_a_draw_belongs_to_seed_sample_and_number() -> None:
    """Neither to the batch, nor to what else is analysed."""
    model = families.build(FAMILY)
    whole = analyze(model, rows(3), responses=given(3), draws=2).tokens
    alone = analyze(model, rows(3), responses=given(3)[4:], draws=2, memory=1e-9).tokens
    np.testing.assert_allclose(alone["kl"], whole[whole["sample"] == 2]["kl"], rtol=1e-3, atol=1e-7)
    first = analyze(model, rows(3), responses=given(3)).tokens
    np.testing.assert_allclose(first["kl"], whole["kl_first"], rtol=1e-3, atol=1e-7)
    other = analyze(model, rows(3), responses=given(3), seed=1).tokens
    assert not np.allclose(first["kl"], other["kl"], rtol=0.1)


# -- folders -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model, and six problems beside it."""
    folder = tmp_path_factory.mktemp("saved")
    model, processor = families.build(FAMILY)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    lines = []
    for i in range(6):
        families.picture(i).save(folder / f"{i}.png")
        lines.append({"problem": f"How much {i}?", "answer": str(i), "images": [f"{i}.png"], "id": f"q{i}"})
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def run(saved: Path, out: Path, **changes: Any) -> Analysis:
    return analyze(saved / "model", saved / "data.jsonl", out=out, device="cpu", **{**SAMPLED, **changes})


def test_a_folder(saved: Path, tmp_path: Path) -> None:
    found = run(saved, tmp_path / "a", draws=2)
    out = tmp_path / "a"
    assert {path.name for path in out.iterdir()} >= {
        *TABLES,
        "summary.json",
        "report.html",
        "images",
        "responses.jsonl",
    }
    assert not (out / "parts").exists() and not list(out.rglob("*.tmp"))
    for name, table in zip(TABLES, (found.tokens, found.trajectories), strict=True):
        pd.testing.assert_frame_equal(pd.read_parquet(out / name), table)
    assert json.loads((out / "summary.json").read_text()) == found.summary
    summary = found.summary
    assert (summary["questions"], summary["scored"], summary["tokens"]) == (6, 12, len(found.tokens))
    assert (summary["draws"], summary["seed"], summary["perturbation"]["patch_size"]) == (2, 0, 14)
    assert summary["skipped"] == [] and summary["seconds_scoring"] > 0 and summary["versions"]["torch"]
    for _, row in found.trajectories.iterrows():
        assert row["question"] == f"How much {row['sample']}?" and row["answer"] == str(row["sample"])
        assert row["correct"] is False and row["truncated"] == (not row["text"].endswith("<eos>"))
        views = [np.asarray(_open(out / row[name])) for name in ("image", "perturbed_image")]
        assert np.array_equal(views[0], np.asarray(families.picture(row["sample"])))
        assert views[0].shape == views[1].shape and (views[1] != views[0]).any()
    # what was sampled can be given again, and then comes out the same
    again = run(saved, tmp_path / "b", draws=2, responses=out / "responses.jsonl")
    pd.testing.assert_frame_equal(again.tokens, found.tokens)


def _open(path: Path) -> Any:
    from PIL import Image

    return Image.open(path)


def test_the_reward_judges_where_there_is_an_answer() -> None:
    data = [{**row, "answer": answer} for row, answer in zip(rows(3), ("8", None, "9"), strict=True)]
    responses = [{"sample": i, "response": r"\boxed{8}"} for i in range(3)]
    found = analyze(families.build(FAMILY), data, responses=responses).trajectories
    assert found["correct"].tolist() == [True, None, False] and found["answer"].isna().tolist() == [False, True, False]


def test_several_models_side_by_side(saved: Path, tmp_path: Path) -> None:
    """By file, or by a label in the file; found by index or by the data's own id; as text or as tokens."""
    (tmp_path / "first.jsonl").write_text('{"id": "q3", "response": "3+5"}\n{"id": "q3", "response": "12"}\n')
    (tmp_path / "x").mkdir()
    pd.DataFrame({"sample": [3, 0], "response_ids": [ids_of("ab"), ids_of("c")]}).to_parquet(tmp_path / "x/two.parquet")
    (tmp_path / "labels.json").write_text('[{"sample": 3, "response": "q", "model": "third", "truncated": true}]')
    files = [tmp_path / "first.jsonl", tmp_path / "x/two.parquet", tmp_path / "labels.json"]
    found = run(saved, tmp_path / "out", responses=files)
    shown = found.trajectories[["model", "sample", "response", "text", "truncated"]].to_numpy().tolist()
    assert shown == [
        ["two", 0, 0, "c<eos>", False],
        ["first", 3, 0, "3+5", False],
        ["first", 3, 1, "12", False],
        ["two", 3, 0, "ab<eos>", False],
        ["third", 3, 0, "q", True],
    ]
    assert found.summary["responses"].keys() == {str(file) for file in files}
    assert len(run(saved, tmp_path / "limited", responses=files, limit=2).trajectories) == 1


def test_files_of_one_name_are_told_apart(saved: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "responses.jsonl").write_text('{"sample": 1, "response": "3"}\n')
    files = [str(tmp_path / name / "responses.jsonl") for name in ("a", "b")]
    assert run(saved, tmp_path / "out", responses=files).trajectories["model"].tolist() == files


# -- what is broken ----------------------------------------------------------------------------------------------------


def test_what_is_broken_is_listed_and_spares_the_rest(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n, but not for long")
    families.picture(1).save(tmp_path / "good.png")
    families.picture(2, (1200, 4)).save(tmp_path / "thin.png")  # the processor refuses such shapes
    problems = [
        {"problem": "fine", "answer": "1", "images": ["good.png"]},
        {"problem": "not there", "answer": "1", "images": ["missing.png"]},
        {"problem": "not an image", "answer": "1", "images": ["bad.png"]},
        {"problem": "text only", "answer": "1", "images": []},
        {"problem": " ", "answer": "1", "images": ["good.png"]},
        {"problem": "thin", "answer": "1", "images": ["thin.png"]},
        {"problem": "two marks <image><image>", "answer": "1", "images": ["good.png"]},
        {"problem": "fine too", "images": ["good.png"]},
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    image = families.VOCABULARY["<|image_pad|>"]
    responses = [{"sample": i, "response_ids": ids_of("7")} for i in range(8)]
    responses += [
        {"sample": 0, "response_ids": []},
        {"sample": 0, "response_ids": None, "response": ""},
        {"sample": 0, "response_ids": [20] * 300},
        {"sample": 0, "response_ids": [20, image, 21]},
        {"sample": 0, "response_ids": [20, 10**6]},
        {"sample": 8, "response_ids": [20]},
        {"sample": 0, "response_ids": ids_of("9")},
    ]
    (tmp_path / "given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in responses))
    model, processor = families.build(FAMILY)
    model.config.text_config.max_position_embeddings = 300
    found = analyze((model, processor), tmp_path / "data.jsonl", responses=tmp_path / "given.jsonl", out=tmp_path / "o")
    kept = found.trajectories[["sample", "response", "text"]].to_numpy().tolist()
    assert kept == [[0, 0, "7<eos>"], [0, 6, "9<eos>"], [7, 0, "7<eos>"]]
    reasons = {(row["sample"], row.get("response")): row["reason"] for row in found.summary["skipped"]}
    assert len(reasons) == len(found.summary["skipped"]) == 12
    expected = {
        (8, None): "no such row, it has 8",
        (1, None): r"row 2, column 'images': cannot read .*missing.png: FileNotFoundError",
        (2, None): r"row 3, column 'images': cannot read .*bad.png: ",
        (3, None): "it has no image",
        (4, None): "row 5, column 'problem': it is empty",
        (5, None): "processor does not take it: .*aspect ratio",
        (6, None): "says <image> 2 times for 1 images",
        (0, 1): "the response is empty",
        (0, 2): "the response is empty",
        (0, 3): r"the prompt has \d+ tokens, the response 300, the model's context 300",
        (0, 4): "holds a token that stands for an image",
        (0, 5): "tokens that the model does not know",
    }
    assert reasons.keys() == expected.keys()
    for key, pattern in expected.items():
        assert re.search(pattern, reasons[key]), (key, reasons[key])


def test_no_room_for_a_response(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, processor = families.build(FAMILY)
    model.config.text_config.max_position_embeddings = 40
    data = [{"problem": "x" * length, "images": [families.picture(0)]} for length in (3, 40)]
    options = {**SAMPLED, "samples": 1}
    found = analyze((model, processor), data, out=tmp_path / "a", **options)
    assert found.trajectories["sample"].tolist() == [0]
    (skipped,) = found.summary["skipped"]
    assert skipped["sample"] == 1 and "no room for a response of 6" in skipped["reason"]
    shown = " ".join(capsys.readouterr().out.split())
    assert "Skipped 1, listed in" in shown and "sample 1: the prompt has" in shown
    with pytest.raises(InputError, match=r"no response could be scored; the first reason: .*no room"):
        analyze((model, processor), data[1:], **options)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"query": "?", "image": "0.png"}', r"no column 'problem', it has \['image', 'query'\]"),
        ('{"problem": "?", "picture": "0.png"}', r"no column 'images', it has \['picture', 'problem'\]"),
        ("", "has no rows"),
    ],
)
def test_data_that_cannot_be_used(saved: Path, tmp_path: Path, lines: str, message: str) -> None:
    (tmp_path / "data.jsonl").write_text(lines)
    with pytest.raises(InputError, match=message):
        analyze(saved / "model", tmp_path / "data.jsonl", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"row": 1, "response": "3"}', r"given: no column sample or id, it has \['response', 'row'\]"),
        ('{"sample": 1, "answer": "3"}', r"no column response or response_ids, it has \['answer', 'sample'\]"),
        ("{", "row 1: not valid JSON"),
    ],
)
def test_responses_that_cannot_be_used(saved: Path, tmp_path: Path, lines: str, message: str) -> None:
    file = tmp_path / "given.jsonl"
    file.write_text(lines)
    with pytest.raises(InputError, match=message):
        run(saved, tmp_path / "out", responses=file)
    with pytest.raises(InputError, match=r"responses: .*nowhere.jsonl: no such file"):
        run(saved, tmp_path / "out", responses=tmp_path / "nowhere.jsonl")


def test_ids_need_ids_and_each_once(tmp_path: Path) -> None:
    model, data = families.build(FAMILY), rows(2)
    with pytest.raises(InputError, match="column 'id' needs one in the data"):
        analyze(model, data, responses=[{"id": "a", "response": "3"}])
    with pytest.raises(InputError, match="column 'id': 'a' is there twice"):
        analyze(model, [{**row, "id": "a"} for row in data], responses=[{"id": "a", "response": "3"}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit: got 0, takes a whole number from 1"),
        ({"samples": 0}, "samples: got 0"),
        ({"draws": 1.5}, "draws: got 1.5"),
        ({"seed": -1}, "seed: got -1"),
        ({"divergence": "k1"}, "divergence: got 'k1', takes one of"),
        ({"sampler": "llm"}, "sampler: got 'llm', takes one of"),
        ({"memory": 0}, "memory: got 0, takes a number of GiB above 0"),
        ({"keep_ratio": 0.0}, "keep_ratio: got 0.0"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"temperature": 0, "samples": 2}, "samples: got 2, takes 1 at temperature 0"),
        ({"perturbation": "mirror"}, "perturbation: got 'mirror'"),
        ({"perturbation": "grey", "draws": 2}, "draws: got 2, takes 1 with 'grey'"),
        ({"patch_probability": 2}, "patch_probability: got 2"),
        ({"device": "abacus"}, "device: 'abacus' cannot be used"),
    ],
)
def test_options_out_of_range(saved: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        analyze(saved / "model", saved / "data.jsonl", **options)


def test_an_option_that_does_not_exist(saved: Path) -> None:
    with pytest.raises(TypeError, match="draw"):
        analyze(saved / "model", saved / "data.jsonl", draw=2)


def test_a_model_that_does_not_exist(saved: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no such folder"):
        analyze("./nowhere", saved / "data.jsonl")


# -- going on ----------------------------------------------------------------------------------------------------------


def test_a_finished_folder_is_not_computed_again(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(saved, tmp_path / "a", limit=2)
    monkeypatch.setattr(vppo.analysis.run, "score_tokens", None)
    again = run(saved, tmp_path / "a", limit=2)
    pd.testing.assert_frame_equal(again.tokens, found.tokens)
    assert again.summary == found.summary


def test_only_the_same_run_goes_on(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "g.jsonl").write_text('{"sample": 1, "response": "3"}\n')
    run(saved, tmp_path / "a", limit=2, responses=tmp_path / "g.jsonl")
    with pytest.raises(InputError, match=r"--draws: got 4, but the analysis in .* was started with 1"):
        run(saved, tmp_path / "a", limit=2, responses=tmp_path / "g.jsonl", draws=4)
    with pytest.raises(InputError, match=r"--keep-ratio: got 0.5, but"):
        run(saved, tmp_path / "a", limit=2, responses=tmp_path / "g.jsonl", keep_ratio=0.5)
    run(saved, tmp_path / "a", limit=2, responses=tmp_path / "g.jsonl", memory=1)  # only rounding
    (tmp_path / "g.jsonl").write_text('{"sample": 1, "response": "4"}\n')
    with pytest.raises(InputError, match=r"--responses: got .*g.jsonl"):
        run(saved, tmp_path / "a", limit=2, responses=tmp_path / "g.jsonl")


def test_two_analyses_in_one_folder(saved: Path, tmp_path: Path) -> None:
    with claimed(tmp_path / "run", "--out"), pytest.raises(InputError, match=r"--out: .*run is in use by process"):
        run(saved, tmp_path / "run")


def test_a_folder_of_other_files_is_refused(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds other files"):
        run(saved, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


KILL_POINTS = ("sampling", "between samples and scores", "scoring", "half a part", "tables", "page")


@pytest.mark.slow
def test_killed_anywhere_and_resumed_it_ends_the_same(saved: Path, tmp_path: Path) -> None:
    command = [sys.executable, __file__, str(saved), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # the helpers of the tests are on it
    script = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert script.returncode == 0, script.stderr[-4000:]
    assert script.stdout.count("killed at ") == len(KILL_POINTS), script.stdout
    for name in (*TABLES, "responses.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    straight, killed = (json.loads((tmp_path / x / "summary.json").read_text()) for x in ("straight", "killed"))
    seconds = ("seconds_sampling", "seconds_scoring")
    assert all({**killed, **{s: straight[s] for s in seconds}}[name] == value for name, value in straight.items())


def killed_and_resumed(saved: Path, path: Path) -> None:
    """One run as a whole, and one that dies at every kill point in turn and is resumed each time."""
    for out, point in [("straight", None), *(("killed", point) for point in (*KILL_POINTS, None))]:
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            vppo.analysis.run.PART = 2
            die_at(point)
            run(saved, path / out, draws=2)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if point is None:
            assert status == 0, status
        else:
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (point, status)
            print("killed at", point, flush=True)


def die_at(point: str | None) -> None:
    import vppo.analysis.report

    def die(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def after(calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
        seen: list[int] = []

        def counted(*args: Any, **kwargs: Any) -> Any:
            if len(seen) == calls:
                die()
            seen.append(1)
            return function(*args, **kwargs)

        return counted

    module: Any = vppo.analysis.run
    if point == "sampling":
        module._Run._sample = after(2, module._Run._sample)
    elif point == "between samples and scores":
        module.read_responses = die
    elif point == "scoring":
        module.score_tokens = after(2, module.score_tokens)
    elif point == "half a part":  # with its first table written and the second not
        module.write_table = after(3, module.write_table)
    elif point == "tables":
        module.join_tables = after(1, module.join_tables)
    elif point == "page":
        vppo.analysis.report.write_analysis_pages = die


if __name__ == "__main__":
    killed_and_resumed(Path(sys.argv[1]), Path(sys.argv[2]))
