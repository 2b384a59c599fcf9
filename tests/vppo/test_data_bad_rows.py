"""Rows that cannot be used: found before the first step, named, and skipped where that is asked for."""

import json
from pathlib import Path
from typing import Any

import pytest
from support import families
from support.datafiles import Row, broken_stream, jsonl, parquet, picture, png

import vppo.data.prompts
from vppo.data import BadRowError, Problems, load_training_data
from vppo.data.bad_rows import read_bad_rows, write_bad_rows
from vppo.data.checks import ENOUGH, placeholders
from vppo.errors import InputError

GOOD: Row = {"problem": "P", "answer": "A", "images": ["a.png"]}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def processor() -> Any:
    return families.build("qwen2_5_vl")[1]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    picture(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(broken_stream())
    picture(tmp_path / "long.png", size=(4000, 10))
    return tmp_path


def error_of(path: Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        load_training_data(path, **options)
    return str(caught.value)


def skipping(path: Path, **options: Any) -> tuple[list[str], list[tuple[int, str | None, str]]]:
    """The answers that are left, and row, column and reason of what was left out."""
    skipped: list[BadRowError] = []
    rows = load_training_data(path, bad_rows="skip", skipped=skipped, **options)
    assert all(len(row["images"]) <= 2 for row in rows)  # every row can be read
    return list(rows["answer"]), [(bad.row, bad.column, bad.reason) for bad in skipped]


BAD: list[tuple[Any, str | None, str]] = [
    ([1], None, "must be an object of columns and values; got [1]"),
    ({**GOOD, "answer": ""}, "answer", "it is empty"),
    ({**GOOD, "answer": {"a": 1}}, "answer", "takes text or a number, got dict: {'a': 1}"),
    ({**GOOD, "answer": ["1", "2"]}, "answer", "takes one answer, got a list of 2: ['1', '2']"),
    ({**GOOD, "answer": float("nan")}, "answer", "takes text or a number, got nan"),
    ({**GOOD, "problem": None}, "problem", "it is empty"),
    (
        {**GOOD, "problem": 3},
        "problem",
        "a column has values of different types: text in the rows before, a number here",
    ),
    ({**GOOD, "problem": "\ud800"}, "problem", "takes text in Unicode: surrogates not allowed, got '\\ud800'"),
    (
        {**GOOD, "problem": "<image> <image>"},
        "problem",
        "it says <image> 2 times for 1 images; once for each, or not at",
    ),
    ({**GOOD, "images": [None]}, "images", "an image is a path or an embedded picture, got None"),
    (
        {**GOOD, "images": [["a.png"]]},
        "images",
        "a column has values of different types: text in the rows before, a list here",
    ),
    ({**GOOD, "images": ["no.png"]}, "images", "cannot read {folder}/no.png: FileNotFoundError"),
    ({**GOOD, "images": ["broken.png"]}, "images", "cannot read {folder}/broken.png: OSError"),
    ({**GOOD, "images": ["/a.png"]}, "images", "/a.png is outside of {folder}; image_dir: names another folder"),
    ({**GOOD, "level": "x"}, "level", "a column has values of different types: a number in the rows before, text here"),
]


@pytest.mark.parametrize(("bad", "column", "reason"), BAD)
def test_a_bad_row_is_named_or_skipped(pictures: Path, bad: Any, column: str | None, reason: str) -> None:
    path = pictures / "x.json"
    path.write_text(json.dumps([{**GOOD, "level": 1}, bad, {**GOOD, "answer": "B"}]))
    reason = reason.replace("{folder}", str(pictures))
    place = f", column {column!r}" if column else ""
    assert error_of(path).startswith(f"{path}, row 2{place}: {reason}")
    answers, ((row, named, why),) = skipping(path)
    assert (answers, row, named) == (["A", "B"], 2, column) and why.startswith(reason)


def test_a_line_that_is_not_json_is_skipped(pictures: Path) -> None:
    path = jsonl(pictures / "x.jsonl", GOOD)
    path.write_text(path.read_text() + "{oops\n" + path.read_text())
    answers, ((row, column, reason),) = skipping(path)
    assert (answers, row, column) == (["A", "A"], 2, None) and reason.startswith("not valid JSON")


def test_bad_rows_of_parquet_are_skipped(tmp_path: Path) -> None:
    rows = [
        {"problem": "P", "answer": 0.1, "images": [{"bytes": png(1)}], "nested": {"a": 1, "b": "x"}},
        {"problem": None, "answer": 2.0, "images": [{"bytes": png(1)}], "nested": {"a": 2, "b": "y"}},
        {"problem": "R", "answer": float("nan"), "images": [{"bytes": png(1)}], "nested": None},
        {"problem": "S", "answer": 4.0, "images": [{"bytes": broken_stream()}], "nested": None},
        {"problem": "T", "answer": 5.0, "images": [None], "nested": None},
        {"problem": "U", "answer": 6.0, "images": None, "nested": {"a": 6, "b": "z"}},
    ]
    path = parquet(tmp_path / "x.parquet", rows)
    answers, skipped = skipping(path)
    assert answers == ["0.1", "6.0"]
    assert [(row, column) for row, column, _ in skipped] == [
        (2, "problem"),
        (3, "answer"),
        (4, "images"),
        (5, "images"),
    ]
    loaded = load_training_data(path, bad_rows="skip")
    assert loaded["nested"] == [{"a": 1, "b": "x"}, {"a": 6, "b": "z"}] and "_fault" not in loaded.column_names
    again: list[BadRowError] = []  # now that the rows are in the cache
    load_training_data(path, bad_rows="skip", skipped=again)
    assert [bad.row for bad in again] == [2, 3, 4, 5]


def test_no_row_can_be_used(pictures: Path) -> None:
    path = jsonl(pictures / "x.jsonl", {**GOOD, "answer": ""}, {**GOOD, "images": ["broken.png"]})
    message = error_of(path, bad_rows="skip")
    assert message.startswith(
        f"{path}: none of its 2 rows can be used; the first: {path}, row 1, column 'answer': it is"
    )
    assert error_of(path, bad_rows="ignore") == "bad_rows: got 'ignore', takes 'error' or 'skip'"


def test_several_files(pictures: Path) -> None:
    jsonl(pictures / "data" / "1.jsonl", {**GOOD, "answer": ""}, GOOD)
    jsonl(pictures / "data" / "2.jsonl", {**GOOD, "answer": "B"}, {**GOOD, "images": ["broken.png"]})
    jsonl(pictures / "data" / "3.jsonl", {**GOOD, "answer": ""})
    skipped: list[BadRowError] = []
    rows = load_training_data(pictures / "data", bad_rows="skip", skipped=skipped, image_dir=pictures)
    assert rows["answer"] == ["A", "B"]
    assert [(Path(bad.file).name, bad.row) for bad in skipped] == [("1.jsonl", 1), ("2.jsonl", 2), ("3.jsonl", 1)]


def test_the_list_can_be_read_again(tmp_path: Path) -> None:
    rows = [BadRowError("f [/x]\u2028.jsonl", 3, "answer", "it is “empty”"), BadRowError("g", 1, None, "why")]
    write_bad_rows(tmp_path / "skipped.jsonl", rows)
    assert [bad.args for bad in read_bad_rows(tmp_path / "skipped.jsonl")] == [bad.args for bad in rows]


def test_a_run_that_goes_on_leaves_out_the_same_rows(pictures: Path) -> None:
    path = jsonl(pictures / "x.jsonl", GOOD, {**GOOD, "images": ["later.png"]}, {**GOOD, "answer": "C"})
    skipped: list[BadRowError] = []
    load_training_data(path, bad_rows="skip", skipped=skipped)
    picture(pictures / "later.png")  # put right since
    again: list[BadRowError] = []
    rows = load_training_data(path, bad_rows="skip", skipped_before=skipped, skipped=again)
    assert rows["answer"] == ["A", "C"] and [bad.args for bad in again] == [bad.args for bad in skipped]
    (pictures / "a.png").write_bytes(broken_stream())  # broken since: the order of rows would be another
    with pytest.raises(InputError, match=r"row 1, column 'images': cannot read"):
        load_training_data(path, bad_rows="skip", skipped_before=skipped)


# -- what only the model's processor refuses


def test_sizes_that_the_processor_refuses(pictures: Path, processor: Any) -> None:
    path = jsonl(pictures / "x.jsonl", GOOD, {**GOOD, "images": ["long.png"]}, {**GOOD, "answer": "C"})
    assert load_training_data(path)["answer"] == ["A", "A", "C"]  # without a processor nobody knows
    message = error_of(path, processor=processor)
    assert message.startswith(f"{path}, row 2, column 'images': an image of 4000 x 10 pixels: the model's processor")
    assert "aspect ratio" in message
    answers, ((row, column, _),) = skipping(path, processor=processor)
    assert (answers, row, column) == (["A", "C"], 2, "images")


def test_more_refused_sizes_than_are_tried(tmp_path: Path, processor: Any) -> None:
    """All that the processor refuses are found, however many sizes it takes."""
    from PIL import Image

    rows = []
    for number in range(30):
        for kind, size in (("long", (4000 + number, 10)), ("good", (40 + number, 30))):
            Image.new("L", size).save(tmp_path / f"{kind}{number}.png")
            rows.append({**GOOD, "answer": kind, "images": [f"{kind}{number}.png"]})
    answers, skipped = skipping(jsonl(tmp_path / "x.jsonl", *rows), processor=processor)
    assert answers == ["good"] * 30 and [row for row, *_ in skipped] == list(range(1, 61, 2))


def test_the_processor_meets_every_kind_of_row_once(
    tmp_path: Path, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    met = []
    prompts = vppo.data.prompts.Prompts
    monkeypatch.setattr(vppo.data.prompts, "Prompts", lambda *given: met.append(given) or prompts(*given))
    rows = []
    for number in range(100):
        picture(tmp_path / f"{number}.png", size=(20 + number, 20))
        rows.append({**GOOD, "problem": str(number), "images": [f"{number}.png"] * (1 + number % 2)})
    assert len(load_training_data(jsonl(tmp_path / "x.jsonl", *rows), processor=processor)) == 100
    assert len(met) == 2 + 2 * ENOUGH  # shapes, and the longest and the smallest of a hundred sizes


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>"])
@pytest.mark.parametrize("images", [["a.png"], []])
def test_placeholders_in_a_problem(pictures: Path, processor: Any, token: str, images: list[str]) -> None:
    bad = {**GOOD, "problem": f"What is {token}?", "images": images}
    path = jsonl(pictures / "x.jsonl", GOOD, bad)
    reason = f"it says {token}, which to this model stands for an image"
    assert error_of(path, processor=processor) == f"{path}, row 2, column 'problem': {reason}"
    assert skipping(path, processor=processor) == (["A"], [(2, "problem", reason)])


def test_a_conversation_that_the_template_refuses(pictures: Path, processor: Any, monkeypatch: Any) -> None:
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system prompts') }}{% endif %}"
    monkeypatch.setattr(processor, "chat_template", refusing + families.chat_template(families.QWEN_IMAGE))
    path = jsonl(pictures / "x.jsonl", GOOD)
    message = error_of(path, processor=processor)
    assert message.startswith(f"{path}, row 1, column 'problem': the model's processor does not take it")
    assert "no system prompts" in message
    assert len(load_training_data(path, processor=processor, system_prompt="")) == 1


@pytest.mark.parametrize("family", [family.name for family in families.FAMILIES])
def test_every_family_takes_what_is_good(pictures: Path, family: str) -> None:
    processor = families.build(family)[1]
    image = {"llava": "<image>", "gemma3": "<start_of_image>", "idefics3": "<image>"}.get(family, "<|image_pad|>")
    assert image in placeholders(processor)
    two = {**GOOD, "images": ["a.png", "a.png"], "problem": "<image> or <image>?"}
    path = jsonl(pictures / "x.jsonl", GOOD, {**GOOD, "images": []}, two)
    assert len(load_training_data(path, processor=processor)) == 3


@pytest.mark.parametrize("column", ["prompts", "completions", "completion_ids", "trainer_state", "log_metric"])
def test_columns_that_rewards_cannot_be_given(pictures: Path, column: str) -> None:
    path = jsonl(pictures / "x.jsonl", {**GOOD, column: "x"})
    assert error_of(path).startswith(f"{path}: column {column!r}: rewards are given something else under this name")
    rows = load_training_data(path, bad_rows="skip")
    assert len(rows) == 1 and column not in rows.column_names


# -- analysis reads row by row


@pytest.mark.parametrize(
    "images", [[None], [["a.png"]], {"bytes": None, "path": None}, 3, ["broken.png"], ["/etc/passwd"]]
)
def test_a_problem_with_broken_images_spares_the_others(pictures: Path, images: Any) -> None:
    problems = Problems(jsonl(pictures / "x.jsonl", GOOD, {**GOOD, "images": images}, {**GOOD, "answer": 3}))
    assert [problems[row].answer for row in (0, 2)] == ["A", "3"]
    with pytest.raises(BadRowError, match=r"x.jsonl, row 2, column 'images': "):
        problems[1]


@pytest.mark.parametrize("line", ["{oops", "[1]", json.dumps({**GOOD, "answer": ["1", "2"]})])
def test_a_broken_line_spares_the_others(pictures: Path, line: str) -> None:
    path = jsonl(pictures / "x.jsonl", GOOD)
    path.write_text(path.read_text() + line + "\n")
    problems = Problems(path)
    assert len(problems) == 2 and problems[0].answer == "A" and problems.ids is None
    with pytest.raises(BadRowError, match=r"x.jsonl, row 2"):
        problems[1]


def test_the_first_row_that_differs_is_named(pictures: Path) -> None:
    rows = [{**GOOD, "meta": {"tags": ["a"], "n": 1}}, {**GOOD, "meta": None}, {**GOOD, "meta": {"tags": [3]}}, GOOD]
    path = jsonl(pictures / "x.jsonl", *rows)
    different = "a column has values of different types: text in the rows before, a number here"
    assert error_of(path) == f"{path}, row 3, column 'meta': {different}"
