import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vppo.data import INSTRUCTION, SYSTEM_PROMPT, Problems, load_training_data
from vppo.errors import InputError

Row = dict[str, Any]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def picture(path: Path, shade: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (20, 10), shade).save(path)
    return path


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10), (shade, shade, shade)).save(buffer, "PNG")
    return buffer.getvalue()


def jsonl(path: Path, *rows: Row) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def error_of(path: Path | str, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        load_training_data(path, **options)
    return str(caught.value)


def test_a_row_becomes_a_conversation(tmp_path: Path) -> None:
    picture(tmp_path / "pictures" / "a.png", shade=7)
    path = jsonl(tmp_path / "train.jsonl", {"problem": "1+1?", "answer": 2, "images": ["pictures/a.png"], "level": 3})
    row = load_training_data(path)[0]
    assert row["prompt"] == [
        {"role": "system", "content": [{"type": "text", "text": SYSTEM_PROMPT}]},
        {
            "role": "user",
            "content": [{"type": "image", "text": None}, {"type": "text", "text": f"1+1? {INSTRUCTION}"}],
        },
    ]
    assert row["answer"] == "2" and row["level"] == 3 and "problem" not in row
    assert row["images"][0].mode == "RGB" and row["images"][0].getpixel((0, 0)) == (7, 7, 7)


def test_the_template_is_free(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    path = jsonl(tmp_path / "x.jsonl", {"problem": "P", "answer": "A", "images": ["a.png"]})
    prompt = load_training_data(path, system_prompt="", instruction="")[0]["prompt"]
    assert [message["role"] for message in prompt] == ["user"]
    assert prompt[0]["content"][-1] == {"type": "text", "text": "P"}


def test_images_stand_where_the_problem_marks_them(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    row = {"problem": "<image>Left of <image>?", "answer": "A", "images": ["a.png", "a.png"]}
    content = load_training_data(jsonl(tmp_path / "x.jsonl", row), instruction="Think.")[0]["prompt"][1]["content"]
    assert [part["type"] for part in content] == ["image", "text", "image", "text"]
    assert content[3]["text"] == "? Think."
    row["images"] = ["a.png"]
    message = error_of(jsonl(tmp_path / "y.jsonl", row))
    assert "y.jsonl, row 1, column 'problem'" in message and "2 times for 1 images" in message


def test_trl_accepts_the_rows(tmp_path: Path) -> None:
    from trl.data_utils import is_conversational, prepare_multimodal_messages

    picture(tmp_path / "a.png")
    path = jsonl(
        tmp_path / "x.jsonl",
        {"problem": "P", "answer": "A", "images": ["a.png"]},
        {"problem": "Q", "answer": "B", "images": []},
    )
    for row in load_training_data(path):
        assert is_conversational(row)
        messages = prepare_multimodal_messages(row["prompt"], images=row["images"])
        found = [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
        assert found == row["images"]


@pytest.mark.parametrize("missing", [[], None, "no such key"])
def test_text_only_rows_have_no_images(tmp_path: Path, missing: object) -> None:
    picture(tmp_path / "a.png")
    text_only: Row = {"problem": "Q", "answer": "B", "images": missing}
    if missing == "no such key":
        del text_only["images"]
    rows = load_training_data(
        jsonl(tmp_path / "x.jsonl", {"problem": "P", "answer": "A", "images": ["a.png"]}, text_only)
    )
    assert len(rows[0]["images"]) == 1
    assert rows[1]["images"] == []


def test_a_single_image_column(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", shade=5)
    path = jsonl(
        tmp_path / "x.jsonl",
        {"problem": "P", "answer": "A", "image": "a.png"},
        {"problem": "Q", "answer": "B", "image": None},
    )
    rows = load_training_data(path)
    assert rows[0]["images"][0].getpixel((0, 0)) == (5, 5, 5)
    assert rows[1]["images"] == [] and "image" not in rows.column_names


def test_json_list(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    path = tmp_path / "x.json"
    path.write_text(json.dumps([{"problem": "P", "answer": "A", "images": ["a.png"]}]))
    assert load_training_data(path)["answer"] == ["A"]
    path.write_text('{"problem": "P"}')
    assert "must be a list of rows, got dict" in error_of(path)


@pytest.mark.parametrize("annotated", [True, False])
@pytest.mark.parametrize("column", ["image", "images"])
def test_parquet_with_embedded_images(tmp_path: Path, column: str, annotated: bool) -> None:
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    path = tmp_path / "train [1].parquet"
    stored = [{"bytes": png(shade), "path": None} for shade in (3, 4)]
    columns = {
        "problem": ["P", "Q"],
        "answer": [1, 2],
        column: stored if column == "image" else [[one] for one in stored],
    }
    if annotated:  # as the hub has them
        kind = ImageFeature() if column == "image" else List(ImageFeature())
        features = Features({"problem": Value("string"), "answer": Value("int64"), column: kind})
        Dataset.from_dict(columns, features=features).to_parquet(str(path))
    else:
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    rows = load_training_data(path)
    assert [row["images"][0].getpixel((0, 0))[0] for row in rows] == [3, 4]
    assert rows["answer"] == ["1", "2"]


def test_parquet_with_relative_paths(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    picture(tmp_path / "a.png")
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"problem": ["P"], "answer": ["A"], "images": [["a.png"]]}), path)
    assert load_training_data(path)[0]["images"][0].size == (20, 10)
    (tmp_path / "a.png").unlink()
    assert "x.parquet, row 1, column 'images': cannot read" in error_of(path)


def test_a_folder_has_splits_by_file_name(tmp_path: Path) -> None:
    for name in ("train-0", "train-1", "test"):
        picture(tmp_path / name / "a.png")
        jsonl(tmp_path / f"{name}.jsonl", {"problem": "P", "answer": name, "images": [f"{name}/a.png"]})
    assert load_training_data(tmp_path)["answer"] == ["train-0", "train-1"]
    assert load_training_data(tmp_path, split="test")["answer"] == ["test"]
    assert len(load_training_data(tmp_path, split="other")) == 3


def test_missing_places(tmp_path: Path) -> None:
    assert error_of(tmp_path / "no.jsonl") == f"{tmp_path}/no.jsonl: no such dataset file or folder"
    assert "no .jsonl, .json, .parquet file in this folder" in error_of(tmp_path)
    (tmp_path / "x.csv").touch()
    assert "dataset files are .jsonl, .json, .parquet, got '.csv'" in error_of(tmp_path / "x.csv")
    (tmp_path / "empty.jsonl").touch()
    assert "empty.jsonl" in error_of(tmp_path / "empty.jsonl")


def test_an_unknown_hub_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_found(name: str, split: str) -> None:
        raise FileNotFoundError(f"{name} is not on the hub")

    monkeypatch.setattr("datasets.load_dataset", not_found)
    message = error_of("someone/nothing")
    assert message.startswith("someone/nothing: neither a local file or folder nor a readable hub dataset")


def test_a_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    asked = []

    def hub(name: str, split: str) -> Dataset:
        asked.append((name, split))
        return Dataset.from_dict({"problem": ["P"], "answer": ["A"], "images": [[{"bytes": png(9), "path": "a.png"}]]})

    monkeypatch.setattr("datasets.load_dataset", hub)
    assert load_training_data("someone/problems", split="mini")[0]["images"][0].size == (20, 10)
    assert asked == [("someone/problems", "mini")]


GOOD: Row = {"problem": "P", "answer": "A", "images": ["a.png"]}


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ({**GOOD, "answer": ""}, "row 2, column 'answer': it is empty"),
        ({**GOOD, "answer": None}, "row 2, column 'answer': it is empty"),
        ({**GOOD, "problem": "  "}, "row 2, column 'problem': it is empty"),
        ({**GOOD, "images": ["b.png"]}, "row 2, column 'images': cannot read"),
        ({**GOOD, "images": ["text.png"]}, "row 2, column 'images': cannot read"),
        ({**GOOD, "images": ["broken.png"]}, "row 2, column 'images': cannot read"),
        ({**GOOD, "images": ["half.jpg"]}, "row 2, column 'images': cannot read"),
        ({**GOOD, "images": [""]}, "row 2, column 'images': an image is a path or an embedded picture, got ''"),
        ({**GOOD, "images": "a.png"}, "a column has values of different types"),
        ([1], "row 2: must be an object of columns and values; got [1]"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, bad: Any, expected: str) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "text.png").write_text("not a picture")
    broken = bytearray(png(1))
    broken[45] ^= 0xFF  # a pixel chunk whose checksum no longer holds
    (tmp_path / "broken.png").write_bytes(broken)
    Image.effect_noise((200, 200), 50).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    message = error_of(jsonl(tmp_path / "x.jsonl", GOOD, bad, GOOD))
    assert message.startswith(f"{tmp_path}/x.jsonl")
    assert expected in message


@pytest.mark.parametrize("column", ["problem", "answer", "images"])
def test_a_missing_column_is_named(tmp_path: Path, column: str) -> None:
    row = {name: value for name, value in GOOD.items() if name != column}
    message = error_of(jsonl(tmp_path / "x.jsonl", row))
    assert message == f"{tmp_path}/x.jsonl: no column '{column}', it has {list(row)}"


def test_not_json(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"problem": "P"}\n{oops\n')
    assert "x.jsonl, row 2: not valid JSON" in error_of(path)
    path.write_bytes(b'{"problem": "\xff"}')
    assert "x.jsonl: not valid JSON in UTF-8" in error_of(path)
    path.write_text('{"problem": "P"}\n' + "[" * 100_000)  # Python gives up with an error of another kind
    assert "x.jsonl, row 2: not valid JSON" in error_of(path)
    path = tmp_path / "x.json"
    path.write_text("[" * 100_000)
    assert "x.json: not valid JSON in UTF-8" in error_of(path)
    path = tmp_path / "x.parquet"
    path.write_text("no parquet")
    assert "x.parquet: not a readable parquet file" in error_of(path)


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    for text in ("", "\n \n"):
        path.write_text(text)
        with pytest.raises(InputError, match="it has no rows"):
            load_training_data(path)


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    row = {"problem": "é?", "answer": "1", "images": ["a.png"]}
    for name, text in (("data.jsonl", json.dumps(row, ensure_ascii=False) + "\n"), ("data.json", json.dumps([row]))):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert load_training_data(tmp_path / name)["answer"] == ["1"]


def test_no_row_has_an_image(tmp_path: Path) -> None:
    message = error_of(jsonl(tmp_path / "x.jsonl", {**GOOD, "images": []}))
    assert "no row has an image" in message and "x.jsonl" in message


# -- problems read one by one ------------------------------------------------------------------------------------------


def test_problems_are_those_of_training(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", shade=7)
    (tmp_path / "data").mkdir()
    jsonl(tmp_path / "data/train-1.jsonl", {"problem": "1+1?", "answer": 2, "images": ["../a.png"]})
    jsonl(tmp_path / "data/train-2.jsonl", {"problem": "See <image>!", "answer": " x ", "images": ["../a.png"]})
    for more in ({}, {"system_prompt": "", "instruction": ""}):
        options: dict[str, Any] = {"trust_image_paths": True, **more}
        rows, problems = load_training_data(tmp_path / "data", **options), Problems(tmp_path / "data", **options)
        assert len(problems) == len(rows) == 2
        for problem, row in zip(problems, rows, strict=True):
            assert (problem.prompt, problem.answer) == (row["prompt"], row["answer"])
            assert [image.tobytes() for image in problem.images] == [image.tobytes() for image in row["images"]]
    assert problems[1].question == "See \n!"


def test_a_conversation_is_taken_as_it_is(tmp_path: Path) -> None:
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Sum?"}]
    path = jsonl(tmp_path / "x.jsonl", {"prompt": prompt, "images": []}, {"prompt": None, "images": []})
    problems = Problems(path)
    assert (problems[0].prompt, problems[0].answer, problems[0].question) == (prompt, None, "Sum?")
    with pytest.raises(InputError, match="row 2, column 'prompt': it is empty"):
        problems[1]
    with pytest.raises(IndexError):
        problems[2]


def test_problems_in_memory(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    rows = [
        {"problem": "P", "image": Image.new("L", (3, 2), 5)},
        {"problem": "Q", "image": str(path)},
        {"problem": "R"},
    ]
    problems = Problems(rows)
    assert [[image.size for image in problem.images] for problem in problems] == [[(3, 2)], [(20, 10)], []]
    assert problems[0].images[0].mode == "RGB" and problems[0].images[0].getpixel((0, 0)) == (5, 5, 5)
    assert problems.ids is None


def test_a_broken_problem_spares_the_others(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    problems = Problems(jsonl(tmp_path / "x.jsonl", GOOD, {**GOOD, "images": ["b.png"]}, GOOD))
    assert problems[0].images and problems[2].images
    with pytest.raises(InputError, match=r"row 2, column 'images': cannot read .*b.png: FileNotFoundError"):
        problems[1]


def test_ids_of_several_files(tmp_path: Path) -> None:
    for name, ids in (("1", [7, 3]), ("2", [5])):
        jsonl(tmp_path / f"{name}.jsonl", *({**GOOD, "id": i} for i in ids))
    assert Problems(tmp_path).ids == {"7": 0, "3": 1, "5": 2}
