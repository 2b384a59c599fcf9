"""A folder goes on only with the same weights, processor and data; broken files of a run are named, with a remedy."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from support import families
from support.runs import FAMILY, rows

import vppo.analysis.run
from vppo import Analysis, analyze
from vppo.analysis.model import Subject
from vppo.analysis.options import AnalysisOptions
from vppo.contents import digest, digest_model, digest_problems
from vppo.data import Problems
from vppo.errors import InputError


@pytest.fixture(autouse=True)
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes seconds, and does not matter here."""
    monkeypatch.setattr("vppo.analysis.report.write_analysis_pages", lambda out: out / "report.html")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model, three problems, and the finished analysis of them."""
    folder = tmp_path_factory.mktemp("made")
    model, processor = families.build(FAMILY)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    lines = []
    for i in range(3):
        families.picture(i).save(folder / f"{i}.png")
        lines.append({"problem": f"How much {i}?", "answer": str(i), "images": [f"{i}.png"], "note": i})
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vppo.analysis.report.write_analysis_pages", lambda out: out / "report.html")
        run(folder)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same under the same relative names, to be changed."""
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def run(folder: Path, **changes: Any) -> Analysis:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        options = {"system_prompt": "", "instruction": "", "max_tokens": 3, "limit": 2, "device": "cpu", **changes}
        return analyze("./model", "data.jsonl", out="out", **options)


def one_weight(folder: Path) -> None:
    """One number of one tensor, in its last digit."""
    file = folder / "model" / "model.safetensors"
    weights = load_file(file)
    weight = next(iter(weights.values()))
    weight.view(-1)[0] = torch.nextafter(weight.view(-1)[0], torch.tensor(torch.inf, dtype=weight.dtype))
    size = file.stat().st_size
    save_file(weights, file, metadata={"format": "pt"})
    assert file.stat().st_size == size


def setting(folder: Path) -> None:
    file = folder / "model" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"top_k": 7}))


def data(**changed: Any) -> Callable[[Path], None]:
    """Rewrites fields of the second problem; the number of rows and their order stay."""

    def edit(folder: Path) -> None:
        lines = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
        lines[1] |= changed
        (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    return edit


def image(folder: Path) -> None:
    ImageOps.invert(Image.open(folder / "1.png").convert("RGB")).save(folder / "1.png")


CHANGES: list[tuple[Callable[[Path], None], str]] = [
    (one_weight, "--model: ./model has other weights than when the analysis in out was started; choose another --out"),
    (setting, "--model: ./model has another configuration, tokenizer or processor than when the analysis in out"),
    (data(problem="How many?"), "--data: data.jsonl has other problems, answers or images than when the analysis in"),
    (data(answer="7"), "--data: data.jsonl has other problems, answers or images"),
    (image, "--data: data.jsonl has other problems, answers or images"),
    (lambda f: (f / "1.png").unlink(), "--data: data.jsonl has other problems, answers or images"),
]
HARMLESS: list[Callable[[Path], Any]] = [
    data(note=5),
    lambda f: (f / "model" / "trainer_state.json").write_text("{}"),
    lambda f: (f / "model" / "optimizer.pt").write_text("momenta"),
    lambda f: [path.touch() for path in f.rglob("*") if path.is_file()],
    lambda f: families.picture(9).save(f / "2.png"),  # beyond the limit
]


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=[f"{i} {m[:40]}" for i, (_, m) in enumerate(CHANGES)])
def test_what_changed_under_the_same_name_is_refused(
    folder: Path, change: Callable[[Path], None], message: str
) -> None:
    change(folder)
    with pytest.raises(InputError, match=re.escape(message)):
        run(folder)


@pytest.mark.parametrize("change", HARMLESS, ids=["note", "state", "optimizer", "touched", "beyond"])
def test_what_makes_no_difference_goes_on(
    folder: Path, change: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    change(folder)
    monkeypatch.setattr(vppo.analysis.run, "score_tokens", None)
    assert len(run(folder).trajectories) == 2


def test_a_folder_that_noted_no_contents_is_refused(folder: Path) -> None:
    marker = folder / "out" / "options.json"
    noted = json.loads(marker.read_text())
    assert all(re.fullmatch("[0-9a-f]{16}", noted[name]) for name in ("weights", "processor", "rows"))
    marker.write_text(json.dumps({name: value for name, value in noted.items() if name != "weights"}))
    with pytest.raises(InputError, match="the analysis in out did not note the contents of its model and data"):
        run(folder)


def test_a_model_in_memory_is_told_by_its_weights(tmp_path: Path) -> None:
    model, processor = families.build(FAMILY)
    options: dict[str, Any] = {"max_tokens": 3, "out": tmp_path / "out", "system_prompt": "", "instruction": ""}
    analyze((model, processor), rows(1), **options)
    analyze((model, processor), rows(1), **options)
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] += 1
    with pytest.raises(InputError, match="has other weights than when"):
        analyze((model, processor), rows(1), **options)


def test_a_model_on_the_hub_is_told_by_its_commit(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    subject = Subject(str(made / "model"), AnalysisOptions(device="cpu", revision="v2"))
    subject.name = "owner/model"
    asked = []

    def cached(name: str, file: str, **options: Any) -> str:
        asked.append((name, file, options))
        return f"/cache/models--owner--model/snapshots/{commit}/{file}"

    monkeypatch.setattr("transformers.utils.hub.cached_file", cached)
    assert subject.contents() == {"weights": commit, "processor": commit}
    assert asked == [("owner/model", "config.json", {"revision": "v2"})]


def test_equal_rows_have_one_digest_and_others_another() -> None:
    picture = families.picture(0)
    values: list[Any] = [
        None, True, 1, 1.0, "1", b"1", ["1"], [["1"]], ["1", ""], {"a": 1}, {"b": 1}, {"a": "1"}, [], {}, "",
        float("nan"), np.float32(1), np.arange(3), np.arange(3.0), np.zeros(5000), np.arange(5000) // 4999,
        picture, ImageOps.invert(picture), picture.resize((picture.height, picture.width)), torch.zeros(2),
        torch.zeros(2, 1), torch.zeros(2, dtype=torch.bfloat16),
    ]  # fmt: skip
    digests = [digest(value) for value in values]
    assert len(set(digests)) == len(values)
    assert [digest(value) for value in values] == digests
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest(picture) == digest(picture.copy())
    model, _ = families.build(FAMILY)
    assert digest_model(model) == digest_model(model.train())
    problems = Problems(rows(3))
    assert digest_problems(problems, 2) == digest_problems(Problems(rows(3)), 2) != digest_problems(problems, 3)


# -- broken files ------------------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An analysis that has its parts and not yet its tables."""
    shutil.rmtree(folder / "out")
    with monkeypatch.context() as patch:
        patch.setattr(vppo.analysis.run, "join_tables", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(folder)
    return folder


SCORES = "remove out/parts/scores-00000.json, and the same command makes that part anew"
BROKEN = [
    ("options.json", b"", "out/options.json: is no JSON"),
    ("options.json", b"[]", "out/options.json: got a list, takes an object; choose another --out, or remove"),
    ("parts/scores-00000.json", b"{", f"out/parts/scores-00000.json: is no JSON .*; {SCORES}"),
    ("parts/scores-00000.json", b"{}", f"out/parts/scores-00000.json: has no skipped; {SCORES}"),
    (
        "parts/scores-00000-tokens.parquet",
        b"PAR1",
        f"tokens.parquet: is no whole parquet file .*; {SCORES}",
    ),
    ("parts/scores-00000-trajectories.parquet", None, f"scores-00000-trajectories.parquet: does not exist; {SCORES}"),
    ("parts/responses-00000.json", b"null", r"got a NoneType.*remove out/parts/responses-00000.json, and the same"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN, ids=[f"{n} {c!r}" for n, c, _ in BROKEN])
def test_a_broken_part_is_named_and_the_remedy_works(
    stopped: Path, name: str, content: bytes | None, message: str
) -> None:
    file = stopped / "out" / name
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    with pytest.raises(InputError, match=message) as raised:
        run(stopped)
    remedy = re.search(r"remove (out/parts/\S+), and", str(raised.value))
    if remedy:
        (stopped / remedy[1]).unlink()
        assert len(run(stopped).trajectories) == 2


FINISHED = [
    ("summary.json", b"{", "out/summary.json: is no JSON .*; remove that folder, and the same command makes it anew"),
    ("summary.json", b"{}", "out/summary.json: has no model, scored, tokens, skipped; remove that folder"),
    ("tokens.parquet", b"PAR1", "out/tokens.parquet: is no whole parquet file .*; remove that folder"),
    ("trajectories.parquet", None, "out/trajectories.parquet: does not exist; remove that folder"),
]


@pytest.mark.parametrize(("name", "content", "message"), FINISHED, ids=[f"{n} {c!r}" for n, c, _ in FINISHED])
def test_a_broken_file_of_a_finished_run_is_named(folder: Path, name: str, content: bytes | None, message: str) -> None:
    (folder / "out" / name).unlink()
    if content is not None:
        (folder / "out" / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        run(folder)


def test_a_table_of_other_columns_is_refused(folder: Path) -> None:
    file = folder / "out" / "tokens.parquet"
    pd.read_parquet(file).drop(columns="k3").to_parquet(file)
    with pytest.raises(InputError, match=r"tokens.parquet: has other columns than an analysis writes"):
        run(folder)


def test_the_folder_of_a_demo_is_refused_as_such(folder: Path) -> None:
    shutil.rmtree(folder / "out")
    (folder / "out" / "warmup").mkdir(parents=True)
    (folder / "out" / "options.json").write_text('{"algorithm": "vppo", "steps": 180}')
    with pytest.raises(InputError, match="--out: out holds a run of `vppo demo`, no analysis; choose another --out"):
        run(folder)


def test_a_file_in_place_of_the_folder_is_refused(folder: Path) -> None:
    shutil.rmtree(folder / "out")
    (folder / "out").write_text("a file")
    with pytest.raises(InputError, match="--out: out is a file; takes a new or empty folder"):
        run(folder)


def test_a_folder_of_markup_is_printed_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "[red]" / "[/x]:smile:"
    good = {"problem": "How many?", "images": [families.picture(0)]}
    bad = {"problem": "How many?", "images": ["[/x].png"]}
    analyze(families.build(FAMILY), [good, bad], max_tokens=3, out=out, system_prompt="", instruction="")
    said = capsys.readouterr().out
    assert f"Report: {out / 'report.html'}\n" in said and "[/x].png" in said
