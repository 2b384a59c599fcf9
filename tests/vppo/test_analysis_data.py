"""Data that people have, under `vppo.analyze`: other columns, and rows that cannot be used between good ones."""

import json
import re
from pathlib import Path
from typing import Any

from support import families
from support.datafiles import broken_stream, picture

from vppo import analyze

OPTIONS: dict[str, Any] = {"system_prompt": "", "instruction": "", "max_tokens": 3}


def test_rows_that_cannot_be_used_are_skipped(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", size=(56, 28))
    picture(tmp_path / "long.png", size=(4000, 10))
    (tmp_path / "broken.png").write_bytes(broken_stream())
    good = {"question": "1+1?", "ground_truth": 2, "image": "a.png"}
    bad: list[tuple[Any, str]] = [
        ({**good, "image": [None]}, "row 2, column 'image': an image is a path or an embedded picture, got None"),
        ({**good, "image": [["a.png"]]}, r"row 3, column 'image': an image is .* got \['a.png'\]"),
        ({**good, "image": "broken.png"}, "row 4, column 'image': cannot read .*broken.png"),
        ({**good, "image": "long.png"}, "processor does not take it"),
        ({**good, "question": "<|image_pad|>?"}, "it says <|image_pad|>, which to this model stands for an image"),
        ({**good, "question": 3}, "row 7, column 'question': takes text or messages, got int: 3"),
        ({**good, "ground_truth": [1, 2]}, "row 8, column 'ground_truth': takes one answer"),
        ([1], "row 9: must be an object"),
    ]
    lines = [good, *(row for row, _ in bad), {**good, "question": "1+2?", "ground_truth": "3"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = analyze(families.build("qwen2_5_vl"), tmp_path / "x.jsonl", **OPTIONS)
    assert found.trajectories["sample"].tolist() == [0, 9]
    assert found.trajectories["answer"].tolist() == ["2", "3"]
    skipped = {row["sample"]: row["reason"] for row in found.summary["skipped"]}
    assert sorted(skipped) == list(range(1, 9))
    for sample, (_, reason) in enumerate(bad, 1):
        assert re.search(reason.replace("|", r"\|"), skipped[sample]), skipped[sample]


def test_columns_can_be_named(tmp_path: Path) -> None:
    picture(tmp_path / "pictures" / "a.png", size=(56, 28))
    (tmp_path / "x.jsonl").write_text(json.dumps({"q": "1+1?", "key": 2, "pic": "a.png"}) + "\n")
    named = {"problem_key": "q", "answer_key": "key", "image_key": "pic", "image_dir": str(tmp_path / "pictures")}
    found = analyze(families.build("qwen2_5_vl"), tmp_path / "x.jsonl", **OPTIONS, **named)
    assert found.trajectories[["question", "answer"]].values.tolist() == [["1+1?", "2"]]
