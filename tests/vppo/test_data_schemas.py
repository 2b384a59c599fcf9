"""Well-known datasets, each as a small file of the same columns and types."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.datafiles import Row, jsonl, parquet, picture, png, shades

from vppo.data import INSTRUCTION, SYSTEM_PROMPT, Problems, load_training_data
from vppo.errors import InputError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def loaded(path: Path, **options: Any) -> list[Row]:
    """The rows as training sees them, after analysis has seen the same."""
    rows = list(load_training_data(path, **options))
    for row, problem in zip(rows, Problems(path, **options), strict=True):
        assert problem.answer == row["answer"]
        assert [image.tobytes() for image in problem.images] == [image.tobytes() for image in row["images"]]
    return rows


def parts(row: Row) -> list[str | None]:
    """The user's text, None for an image."""
    return [part["text"] for part in row["prompt"][-1]["content"]]


def error_of(path: Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        load_training_data(path, **options)
    return str(caught.value)


def stored(shade: int) -> Row:
    return {"bytes": png(shade), "path": None}


def test_geometry3k(tmp_path: Path) -> None:
    from datasets import Features, Image, List, Value

    features = Features({"images": List(Image()), "problem": Value("string"), "answer": Value("string")})
    rows = [{"images": [stored(3)], "problem": "<image>Find x.", "answer": "3"}]
    (row,) = loaded(parquet(tmp_path / "train-00000-of-00001.parquet", rows, features))
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]
    assert row["prompt"][0]["content"][0]["text"] == SYSTEM_PROMPT
    assert parts(row) == [None, f"Find x. {INSTRUCTION}"]
    assert (row["answer"], shades(row)) == ("3", [3])


def test_virl39k(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "Processed-1.png", 8)
    row = {
        "qid": "Processed-1",
        "question": "<image>Which?",
        "answer": r"\boxed{B}",
        "image": ["images/Processed-1.png"],
        "PassRate_32BTrained": 0.25,
        "PassRate_7BBase": -1.0,
        "category": "Science",
        "source": "Processed",
    }
    (got,) = loaded(parquet(tmp_path / "39Krelease.parquet", [row]))
    assert parts(got) == [None, f"Which? {INSTRUCTION}"]
    assert (got["answer"], shades(got)) == (r"\boxed{B}", [8])
    assert (got["PassRate_32BTrained"], got["qid"]) == (0.25, "Processed-1")


def test_virl39k_with_its_pictures_elsewhere(tmp_path: Path) -> None:
    picture(tmp_path / "unpacked" / "images" / "a.png", 8)
    path = parquet(tmp_path / "x.parquet", [{"question": "Q", "answer": "A", "image": ["images/a.png"]}])
    assert "cannot read" in error_of(path)
    assert shades(loaded(path, image_dir=tmp_path / "unpacked")[0]) == [8]


def test_mmk12(tmp_path: Path) -> None:
    from datasets import Features, Image, Value

    text = Value("string")
    features = Features({"id": text, "question": text, "answer": text, "subject": text, "image": Image()})
    row = {"id": "1", "question": "As shown <image>, find", "answer": "50", "subject": "math", "image": stored(4)}
    (got,) = loaded(parquet(tmp_path / "train.parquet", [row], features))
    assert parts(got) == ["As shown ", None, f", find {INSTRUCTION}"]
    assert (got["answer"], shades(got), got["subject"]) == ("50", [4], "math")


@pytest.mark.parametrize("name", ["MMR1", "EasyR1"])
def test_problem_answer_images(tmp_path: Path, name: str) -> None:
    row = {"images": [stored(5), stored(6)], "problem": "Compare <image> and <image>.", "answer": "1/2"}
    (got,) = loaded(parquet(tmp_path / f"{name}.parquet", [row]), instruction="")
    assert parts(got) == ["Compare ", None, " and ", None, "."]
    assert (got["answer"], shades(got)) == ("1/2", [5, 6])


def test_columns_named_as_in_a_config_of_easyr1(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    picture(tmp_path / "pictures" / "a.png", 9)
    row = {"query": "Q", "label": 7, "pics": ["a.png"], "problem": "no", "answer": "no", "images": ["no.png"]}
    path = jsonl(tmp_path / "train.jsonl", row)
    options = {"problem_key": "query", "answer_key": "label", "image_key": "pics", "image_dir": tmp_path / "pictures"}
    (got,) = loaded(path, instruction="", **options)
    assert (parts(got), got["answer"], shades(got)) == ([None, "Q"], "7", [9])
    assert error_of(path, problem_key="quer") == f"{path}: problem_key: no column 'quer', it has {list(row)}"


def test_trl_multimodal(tmp_path: Path) -> None:
    """lmms-lab/multimodal-open-r1-8k-verified, and the messages that TRL's example adds."""
    row = {
        "image": stored(7),
        "problem": "How many?",
        "solution": "<think>One, two.</think>\n\n<answer>2</answer>",
        "original_question": "How many?",
        "original_answer": "2",
    }
    (got,) = loaded(parquet(tmp_path / "a.parquet", [row]))
    assert parts(got) == [None, f"How many? {INSTRUCTION}"]
    assert (got["answer"], shades(got), got["solution"]) == ("2", [7], row["solution"])
    messages = [{"role": "system", "content": "Use tags."}, {"role": "user", "content": "How many?"}]
    (got,) = loaded(parquet(tmp_path / "b.parquet", [{**row, "prompt": messages}]))
    assert [message["role"] for message in got["prompt"]] == ["system", "user"]
    assert got["prompt"][0]["content"] == [{"type": "text", "text": "Use tags."}]
    assert (parts(got), got["answer"], shades(got)) == ([None, "How many?"], "2", [7])


def test_messages_made_of_parts(tmp_path: Path) -> None:
    content = [{"type": "text", "text": "See"}, {"type": "image"}, {"type": "text", "text": "and say."}]
    path = jsonl(
        tmp_path / "x.jsonl",
        {"prompt": [{"role": "user", "content": content}], "image": base64.b64encode(png(2)).decode(), "answer": 1},
    )
    (got,) = loaded(path)
    assert (parts(got), got["answer"], shades(got)) == (["See", None, "and say."], "1", [2])


def test_a_prompt_that_is_a_text(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (got,) = loaded(jsonl(tmp_path / "x.jsonl", {"prompt": "Sum?", "image": "a.png", "ground_truth": 3}))
    assert (parts(got), got["answer"]) == ([None, f"Sum? {INSTRUCTION}"], "3")


def test_verl_geo3k(tmp_path: Path) -> None:
    row = {
        "data_source": "hiyouga/geometry3k",
        "prompt": [{"role": "user", "content": "<image>Find x. Think first."}],
        "images": [stored(9)],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "2 \\sqrt { 3 }"},
        "extra_info": {"split": "train", "index": 0, "answer": "2 \\sqrt { 3 }", "question": "<image>Find x."},
    }
    (got,) = loaded(parquet(tmp_path / "train.parquet", [row]))
    assert [message["role"] for message in got["prompt"]] == ["user"]
    assert (parts(got), got["answer"], shades(got)) == ([None, "Find x. Think first."], "2 \\sqrt { 3 }", [9])
    assert (got["reward_model"], got["extra_info"]) == (row["reward_model"], row["extra_info"])
    (got,) = loaded(tmp_path / "train.parquet", problem_key="extra_info.question", instruction="", system_prompt="")
    assert parts(got) == [None, "Find x."]


def test_verl_as_json(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"<image>{truth}?"}],
            "images": [{"path": "a.png", "bytes": None}],
            "reward_model": {"style": "rule", "ground_truth": truth},
        }
        for truth in (7, "1/2", ["0"])
    ]
    got = loaded(jsonl(tmp_path / "train.jsonl", *rows))
    assert [row["answer"] for row in got] == ["7", "1/2", "0"]
    assert [row["reward_model"]["style"] for row in got] == ["rule"] * 3


# -- one of several


@pytest.mark.parametrize(
    ("more", "option"),
    [
        ({"question": "Q"}, "problem_key: it has columns 'problem' and 'question'"),
        ({"prompt": "Q"}, "problem_key: it has columns 'problem' and 'prompt'"),
        ({"ground_truth": "B"}, "answer_key: it has columns 'answer' and 'ground_truth'"),
        (
            {"reward_model": {"ground_truth": "B"}},
            "answer_key: it has columns 'answer' and 'reward_model.ground_truth'",
        ),
        ({"image": "b.png"}, "image_key: it has columns 'images' and 'image'"),
    ],
)
def test_two_columns_that_could_be_meant(tmp_path: Path, more: Row, option: str) -> None:
    picture(tmp_path / "a.png", 1)
    picture(tmp_path / "b.png", 2)
    row = {"problem": "P", "answer": "A", "images": ["a.png"], **more}
    path = jsonl(tmp_path / "x.jsonl", row)
    assert error_of(path) == f"{path}: {option}; say which one to take"
    key = option.partition(":")[0]
    (got,) = loaded(path, **{key: next(iter(more))} if "reward_model" not in more else {key: "answer"})
    assert (shades(got) == [2]) == ("image" in more)
    assert (got["answer"] == "B") == ("ground_truth" in more)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_an_empty_column_is_not_meant(tmp_path: Path, form: str) -> None:
    row = {"problem": "P", "question": None, "prompt": None, "answer": None, "ground_truth": "A", "image": None}
    row["images"] = [{"bytes": base64.b64encode(png(2)).decode()}]
    path = tmp_path / f"x.{form}"
    parquet(path, [row]) if form == "parquet" else jsonl(path, row)
    (got,) = loaded(path, instruction="")
    assert (parts(got), got["answer"], shades(got)) == ([None, "P"], "A", [2])


def test_an_answer_wins_over_a_worked_solution(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    row = {"problem": "P", "solution": "It follows that 3.", "answer": "3", "image": "a.png"}
    (got,) = loaded(jsonl(tmp_path / "x.jsonl", row))
    assert (got["answer"], got["solution"]) == ("3", "It follows that 3.")


# -- images of every make


def data_uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize(
    "made",
    [
        lambda content: base64.b64encode(content).decode(),
        lambda content: base64.encodebytes(content).decode(),  # in lines
        data_uri,
        lambda content: {"bytes": base64.b64encode(content).decode(), "path": "a.png"},
        lambda content: {"path": data_uri(content), "width": 20},
        lambda content: {"image": data_uri(content)},
    ],
)
def test_images_inside_json(tmp_path: Path, made: Any, several: bool) -> None:
    image = made(png(6))
    row = {"problem": "P", "answer": "A", "images" if several else "image": [image] if several else image}
    assert shades(loaded(jsonl(tmp_path / "x.jsonl", row))[0]) == [6]


@pytest.mark.parametrize("form", ["JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_formats_inside_json(tmp_path: Path, form: str) -> None:
    content = io.BytesIO()
    Image.new("RGB", (20, 10), (6, 6, 6)).save(content, form)
    row = {"problem": "P", "answer": "A", "image": f"data:;base64,{base64.b64encode(content.getvalue()).decode()}"}
    assert loaded(jsonl(tmp_path / "x.jsonl", row))[0]["images"][0].size == (20, 10)
    if form != "BMP":  # whose base64 begins with two letters only
        row["image"] = base64.b64encode(content.getvalue()).decode()
        assert loaded(jsonl(tmp_path / "y.jsonl", row))[0]["images"][0].size == (20, 10)


@pytest.mark.parametrize("several", [True, False])
def test_raw_bytes_in_parquet(tmp_path: Path, several: bool) -> None:
    import pyarrow
    import pyarrow.parquet

    column = [[png(3), png(4)]] if several else [png(3)]
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"problem": ["P"], "answer": ["A"], "image": column}), path)
    assert shades(loaded(path)[0]) == ([3, 4] if several else [3])


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("https://example.org/a.png", "https://example.org/a.png is on the network; takes pictures that are here"),
        ("data:image/png,rawtext", "takes data URIs in base64, got 'data:image/png,rawtext'"),
        ("data:image/png;base64,%%%", "not valid base64"),
        ({"url": "a.png"}, "an image is a path or an embedded picture, got {'url': 'a.png'}"),
        (f"data:image/png;base64,{base64.b64encode(b'hello').decode()}", "cannot read the embedded picture"),
    ],
)
def test_what_is_no_image(tmp_path: Path, image: Any, reason: str) -> None:
    message = error_of(jsonl(tmp_path / "x.jsonl", {"problem": "P", "answer": "A", "images": [image]}))
    assert "x.jsonl, row 1, column 'images': " in message and reason in message


# -- where image paths may lead


def test_paths_stay_in_the_folder(tmp_path: Path) -> None:
    picture(tmp_path / "elsewhere" / "a.png", 3)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    for number, image in enumerate(("../elsewhere/a.png", str(tmp_path / "elsewhere" / "a.png"), "link/a.png")):
        row = {"problem": "P", "answer": "A", "images": [image]}
        path = jsonl(tmp_path / "data" / f"{number}.jsonl", row)
        message = error_of(path)
        assert f"{number}.jsonl, row 1, column 'images': {image} is outside of {tmp_path}/data; image_dir: " in message
        assert "image_dir: / allows every absolute path" in message and "trust_image_paths" in message
        assert shades(loaded(path, trust_image_paths=True)[0]) == [3]
        if image.startswith("/"):
            assert shades(loaded(path, image_dir="/")[0]) == [3]
    with pytest.raises(InputError, match="image_dir: nowhere: no such folder"):
        load_training_data(path, image_dir="nowhere")


def test_the_hub_s_own_cache_is_trusted_and_its_texts_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset, Features, Image, Value

    path = str(picture(tmp_path / "cache" / "a.png", 3))
    text = Value("string")
    for kind in (Image(), text):
        rows = {"problem": ["P"], "answer": ["A"], "image": [path]}
        data = Dataset.from_dict(rows, features=Features({"problem": text, "answer": text, "image": kind}))
        monkeypatch.setattr("datasets.load_dataset", lambda name, split, data=data: data)
        if kind is text:
            with pytest.raises(InputError, match=r"row 1, column 'image': .* is outside of"):
                load_training_data("someone/problems")
            with pytest.raises(InputError, match=r"row 1, column 'image': .* is outside of"):
                Problems("someone/problems")[0]
        else:
            assert shades(load_training_data("someone/problems")[0]) == [3]
            assert Problems("someone/problems")[0].images[0].size == (20, 10)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.png")
    row = {"problem": "P", "answer": "A", "images": ["pipe.png"]}
    assert "pipe.png: OSError: not a regular file" in error_of(jsonl(tmp_path / "x.jsonl", row))


def test_only_pictures_are_opened(tmp_path: Path) -> None:
    Image.new("RGB", (20, 10)).save(tmp_path / "a.eps")  # Pillow reads it by starting Ghostscript
    row = {"problem": "P", "answer": "A", "images": ["a.eps"]}
    assert "a.eps: UnidentifiedImageError" in error_of(jsonl(tmp_path / "x.jsonl", row))


def test_the_largest_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 1000)
    picture(tmp_path / "a.png", size=(50, 50))
    path = jsonl(tmp_path / "x.jsonl", {"problem": "P", "answer": "A", "images": ["a.png"]})
    assert "DecompressionBombError" in error_of(path)
    assert load_training_data(path, image_pixel_limit=2500)[0]["images"][0].size == (50, 50)
    assert "DecompressionBombError" in error_of(path, image_pixel_limit=2499)


# -- answers


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (0.00005, "0.00005"),
        (1e22, "10000000000000000000000"),
        (2.5, "2.5"),
        (-3, "-3"),
        (["0"], "0"),
        ([7], "7"),
        (2**70, "1180591620717411303424"),
        (True, "True"),
        (" <answer> B </answer> ", "B"),
        ("x<answer>1</answer> then <answer>2</answer>", "2"),
        (r"\boxed{\frac{1}{2}}", r"\boxed{\frac{1}{2}}"),
    ],
)
def test_an_answer_is_one_text(tmp_path: Path, answer: Any, text: str) -> None:
    picture(tmp_path / "a.png")
    (got,) = loaded(jsonl(tmp_path / "x.jsonl", {"problem": "P", "answer": answer, "images": ["a.png"]}))
    assert got["answer"] == text


@pytest.mark.parametrize("kind", ["float16", "float32", "float64"])
def test_answers_of_fewer_bits(tmp_path: Path, kind: str) -> None:
    from datasets import Features, Image, Value

    features = Features({"problem": Value("string"), "answer": Value(kind), "image": Image()})
    rows = [{"problem": "P", "answer": answer, "image": stored(1)} for answer in (0.1, 2.5, 0.001)]
    assert [row["answer"] for row in loaded(parquet(tmp_path / "x.parquet", rows, features))] == ["0.1", "2.5", "0.001"]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"value": 3}, "takes text or a number, got dict: {'value': 3}"),
        (["1", "2"], "takes one answer, got a list of 2: ['1', '2']"),
        (float("nan"), "takes text or a number, got nan"),
        (float("inf"), "takes text or a number, got inf"),
        ([], "it is empty"),
        ([[1, 2]], "takes text or a number, got list: [1, 2]"),
    ],
)
def test_an_answer_that_no_response_could_match(tmp_path: Path, answer: Any, reason: str, form: str) -> None:
    picture(tmp_path / "a.png")
    rows = [{"problem": "P", "answer": answer, "images": ["a.png"]}]
    path = tmp_path / f"x.{form}"
    parquet(path, rows) if form == "parquet" else path.write_text(json.dumps(rows[0]))
    assert error_of(path) == f"{path}, row 1, column 'answer': {reason}"
