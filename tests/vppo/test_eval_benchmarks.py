"""The published sets as the hub has them, in copies of a few rows; sets of one's own; and what is wrong with a row."""

from __future__ import annotations

import fnmatch
import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from support.datafiles import picture as picture_file
from support.evaluations import picture, publish, rows_of

from vppo.data import INSTRUCTION, BadRowError, DataOptions
from vppo.data.pictures import decode
from vppo.errors import InputError
from vppo.evaluation.benchmarks import PUBLISHED_SETS, load_benchmarks
from vppo.evaluation.blind import blinded
from vppo.evaluation.published import BENCHMARKS, PUBLISHED

OPTIONS = DataOptions()
EXPECTED = {"geo3k": 601, "wemath": 1740, "mmk12": 2000, "mathverse": 2180, "logicvista": 447, "mmmu_pro": 1730}
EXPECTED |= {"dynamath": 3666, "mathvision": 2907}


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(tmp_path_factory.mktemp("hub"), dict.fromkeys(PUBLISHED_SETS, 3))


def test_the_eight_sets(mirror: Path) -> None:
    assert {name: entry.questions for name, entry in PUBLISHED_SETS.items()} == EXPECTED
    found = load_benchmarks(list(PUBLISHED_SETS), [], OPTIONS, mirror)
    assert [(b.name, b.label, len(b.problems), b.published) for b in found] == [
        (name, entry.label, 3, entry.questions) for name, entry in PUBLISHED_SETS.items()
    ]
    for benchmark in found:
        problem = benchmark.problems[1]
        assert problem.answer == "2" and benchmark.problems.without_images(1).answer == "2"
        assert problem.question == f"What is 1 + 1? {INSTRUCTION}"  # once, and not as the file has it besides
        assert [part["type"] for part in problem.prompt[1]["content"]] == ["image", "text"]
        assert np.array_equal(problem.images[0], decode({"bytes": picture(1), "path": None}))
    assert len({benchmark.fingerprint for benchmark in found}) == len(found)


def test_the_runs_own_instruction_takes_the_place_of_the_published_one(mirror: Path) -> None:
    (found,) = load_benchmarks(["geo3k"], [], DataOptions(instruction="Be brief.", system_prompt=""), mirror)
    assert found.problems[0].question == "What is 0 + 1? Be brief." and len(found.problems[0].prompt) == 1


def test_from_the_hub_only_what_is_needed(mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repo: str, *, repo_type: str, allow_patterns: list[str]) -> str:
        assert repo_type == "dataset"
        for file in sorted(path for path in (mirror / repo).rglob("*") if path.is_file()):
            name = file.relative_to(mirror / repo).as_posix()
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (tmp_path / repo / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, tmp_path / repo / name)
        return str(tmp_path / repo)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for name in ("mmk12", "mathvision"):
        (found,) = load_benchmarks([name], [], OPTIONS)
        assert len(found.problems[2].images) == 1
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 2 + 4  # rows and zip; rows and images

    def unreachable(repo: str, **options: Any) -> str:
        raise OSError("no network\nhere")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(InputError, match=r"geo3k: PAPO-Galaxy/PAPO_eval cannot be fetched .*no network here.*--mirror"):
        load_benchmarks(["geo3k"], [], OPTIONS)


def broken(change: dict[str, Any]) -> list[dict[str, Any]]:
    """Three rows, the second one changed."""
    found = rows_of("DynaMath_DynaMath_Sample", 3)
    return [found[0], {**found[1], **change}, found[2]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": []}, "row 2, column 'messages': takes a user's and an assistant's message, got"),
        ({"messages": None}, "row 2, column 'messages': takes a user's and an assistant's message, got None"),
        ({"messages": [{"role": "user", "content": "1?"}]}, "row 2, column 'messages': takes a user's and an"),
        (
            {"messages": [{"role": "user", "content": "1?"}, {"role": "assistant", "content": ""}]},
            "row 2, column 'messages': the assistant's message, which is the answer, is empty",
        ),
        (
            {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "1"}]},
            "row 2, column 'messages': it is empty",
        ),
        (
            {"messages": [{"role": "user", "content": "<image><image>?"}, {"role": "assistant", "content": "1"}]},
            "row 2, column 'messages': it says <image> 2 times for 1 images",
        ),
        ({"images": ["./data/images/DynaMath_DynaMath_Sample/9.png"]}, "row 2, column 'images': .*9.png' is not in"),
        ({"images": "0.png"}, "row 2, column 'images': a column has values of different types"),
    ],
)
def test_a_row_that_is_not_as_published_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    publish(tmp_path, {"dynamath": 3}, {"dynamath": broken(change)})
    with pytest.raises(BadRowError, match=rf"DynaMath_DynaMath_Sample\.json, {message}"):
        load_benchmarks(["dynamath"], [], OPTIONS, tmp_path)


def test_files_that_are_not_as_published_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"mirror: .* has neither PAPO-Galaxy/PAPO_eval nor PAPO_eval, where geo3k is"):
        load_benchmarks(["geo3k"], [], OPTIONS, tmp_path)
    publish(tmp_path, {"geo3k": 2, "mathvision": 2})
    papo, vppo = tmp_path / "PAPO-Galaxy" / "PAPO_eval", tmp_path / "chamber111" / "VPPO-Eval"
    with pytest.raises(InputError, match=r"mmk12: .*data/PAPO_MMK12-\*.parquet: no such file"):
        load_benchmarks(["mmk12"], [], OPTIONS, tmp_path)
    archive = papo / "hiyouga_geometry3k_images.zip"
    archive.write_bytes(archive.read_bytes()[:50])
    with pytest.raises(InputError, match=r"hiyouga_geometry3k_images\.zip: is no whole zip file"):
        load_benchmarks(["geo3k"], [], OPTIONS, tmp_path)
    archive.unlink()
    with pytest.raises(
        InputError, match=r"hiyouga_geometry3k_images\.zip: no such file or folder; it holds the images"
    ):
        load_benchmarks(["geo3k"], [], OPTIONS, tmp_path)
    file = vppo / "data/vppo/MathLLMs_MathVision.json"
    file.write_text(json.dumps([{"question": "1?"}]))
    with pytest.raises(InputError, match=r"MathLLMs_MathVision.json: no column 'messages', it has \['question'\]"):
        load_benchmarks(["mathvision"], [], OPTIONS, tmp_path)


def test_a_broken_picture_is_told_when_its_question_is_read(tmp_path: Path) -> None:
    publish(tmp_path, {"mathvision": 2})
    next(tmp_path.rglob("1.png")).write_bytes(b"no picture")
    (found,) = load_benchmarks(["mathvision"], [], OPTIONS, tmp_path)
    assert found.problems[0].images
    with pytest.raises(BadRowError, match=r"MathVision.json, row 2, column 'images': \./data/images/.*cannot read"):
        found.problems[1]


def own(folder: Path, rows: list[Any]) -> Path:
    picture_file(folder / "a.png", size=(56, 28))
    file = folder / "my set.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_set_of_ones_own(tmp_path: Path) -> None:
    good = {"problem": "1+1?", "answer": 2, "images": ["a.png"], "category": "sums"}
    file = own(tmp_path, [good, {**good, "category": "more"}])
    (found,) = load_benchmarks([], [file], OPTIONS)
    assert (found.name, found.subjects, found.published) == ("my_set", ["sums", "more"], None)
    assert found.chosen(None) == found.chosen(5) == [0, 1] and found.chosen(1) == [0]
    own(tmp_path, [good, {**good, "answer": 3}])
    (changed,) = load_benchmarks([], [file], OPTIONS)
    assert changed.fingerprint != found.fingerprint and changed.subjects == ["sums", "sums"]
    for bad, message in (
        ({**good, "answer": None}, "row 2, column 'answer': it is empty"),
        ({**good, "problem": "\ud800?"}, "row 2, column 'problem': takes text in Unicode: surrogates not allowed"),
        ({**good, "answer": "\ud800"}, "row 2, column 'answer': takes text in Unicode: surrogates not allowed"),
        ({**good, "problem": ""}, "row 2, column 'problem': it is empty"),
        ({**good, "images": ["b.png"]}, "row 2, column 'images': .*b.png: no such file"),
        ([1], "row 2: must be an object"),
    ):
        with pytest.raises(BadRowError, match=f"my set.jsonl, {message}"):
            load_benchmarks([], [own(tmp_path, [good, bad])], OPTIONS)
    with pytest.raises(InputError, match="no column 'answer'"):
        load_benchmarks([], [own(tmp_path, [{"problem": "1?", "images": []}])], OPTIONS)


def test_names(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="benchmarks: got 'geo3', takes mathverse, dynamath"):
        load_benchmarks(["geo3"], [], OPTIONS)
    with pytest.raises(InputError, match="benchmarks: got none"):
        load_benchmarks([], [], OPTIONS)
    file = own(tmp_path, [{"problem": "1?", "answer": 1, "images": []}])
    with pytest.raises(InputError, match="would be called 'my_set', as another set is"):
        load_benchmarks([], [file, file], OPTIONS)


def test_a_subset_is_spread_over_the_set(mirror: Path) -> None:
    (found,) = load_benchmarks(["geo3k"], [], OPTIONS, mirror)
    assert found.chosen(2) == [0, 1] and found.chosen(3) == [0, 1, 2]


@pytest.mark.parametrize("how", ["grey", "removed"])
def test_blind(mirror: Path, how: str) -> None:
    (found,) = load_benchmarks(["geo3k"], [], OPTIONS, mirror)
    problem = found.problems[0]
    blind = blinded(problem, how)
    assert (blind.question, blind.answer) == (problem.question, problem.answer)
    kinds = [part["type"] for part in blind.prompt[1]["content"]]
    if how == "removed":
        assert (blind.images, kinds) == ([], ["text"])
    else:
        assert kinds == ["image", "text"] and blind.images[0].size == problem.images[0].size
        assert set(blind.images[0].getdata()) == {(128, 128, 128)}
    assert len(problem.images) == 1 and problem.prompt[1]["content"][0]["type"] == "image"  # as it was


def test_the_published_table() -> None:
    """Each average is that of its row, within the rounding of the figures."""
    assert set(BENCHMARKS) == set(PUBLISHED_SETS)
    for model, row in PUBLISHED.items():
        assert abs(sum(row[name] for name in BENCHMARKS) / 8 - row["average"]) < 0.101, model
