"""A run without an image says so: when it is built, or when none has come for as long as a line of its log covers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, Image, List
from support.families import picture
from support.runs import rows, trainer

from vppo.sight import missing_images

TEXT = [{"role": "user", "content": "How much?"}]
SHOWN = [{"role": "user", "content": [{"type": "image", "image": "1.png"}, {"type": "text", "text": "How much?"}]}]


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("vppo")]
    return [message.removeprefix("[RANK 0] ") for message in messages if "image" in message]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ({"prompt": [TEXT] * 3, "images": [[], [], [picture(0)]]}, ""),
        ({"prompt": [TEXT] * 2, "image": [None, picture(0)]}, ""),
        ({"prompt": [TEXT, TEXT], "images": [[], []]}, "its column 'images' is empty in all of its 2 rows"),
        ({"prompt": [TEXT, TEXT], "images": [None, None]}, "its column 'images' is empty in all of its 2 rows"),
        ({"prompt": [TEXT], "image": [None]}, "its column 'image' is empty in all of its 1 rows"),
        (
            {"prompt": [TEXT], "picture": ["1.png"]},
            "it has neither of the columns 'images' and 'image', only ['prompt', 'picture']",
        ),
        ({"prompt": ["How much?"]}, "it has neither of the columns 'images' and 'image', only ['prompt']"),
    ],
)
def test_where_images_are_looked_for(data: dict[str, Any], why: str) -> None:
    assert missing_images(Dataset.from_dict(data)) == why


def test_images_among_the_parts_of_a_prompt() -> None:
    assert missing_images(Dataset.from_dict({"prompt": [SHOWN, SHOWN]})) == ""
    assert missing_images(Dataset.from_dict({"prompt": [SHOWN], "images": [[]]})) == ""


def test_rows_that_were_selected_and_pictures_that_are_not_read(tmp_path: Path) -> None:
    columns = {"prompt": [TEXT] * 2, "images": [[{"path": str(tmp_path / "none.png"), "bytes": None}], []]}
    broken = Dataset.from_dict(columns).cast_column("images", List(Image()))
    assert isinstance(broken.features, Features)
    assert missing_images(broken) == ""
    assert missing_images(broken.select([1])) == "its column 'images' is empty in all of its 1 rows"
    assert missing_images(broken.to_iterable_dataset()) == ""


def test_a_run_of_text_warns_once_when_it_is_built(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        run = trainer(tmp_path, rows(4, images=(0,)), max_steps=3)
        assert len(said(caplog)) == 1
        run.train()
    assert said(caplog) == [
        "train_dataset: no row shows an image: its column 'images' is empty in all of its 4 rows. No token can depend "
        "on an image then: algorithm 'vppo' filters and shapes nothing, and trains as 'dapo' does."
    ]


def test_a_run_that_scores_nothing_needs_no_image(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, rows(4, images=(0,)), algorithm="dapo").train()
    assert said(caplog) == []


@pytest.mark.parametrize(("logging_steps", "warnings"), [(2, 1), (10, 0)])
def test_a_run_whose_images_do_not_come(
    logging_steps: int, warnings: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = [*rows(5, images=(0,)), *rows(1)]
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, data, max_steps=5, logging_steps=logging_steps, shuffle_dataset=False).train()
    assert len(said(caplog)) == warnings
    if warnings:
        assert said(caplog)[0].startswith("No prompt of steps 0 to 2 has shown the model an image. No token can depend")


def test_a_run_of_pictures_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, rows(4, images=(1, 0)), max_steps=4, logging_steps=3, shuffle_dataset=False).train()
    assert said(caplog) == []
