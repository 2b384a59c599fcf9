"""What a policy of the study can do: reading and adding, told apart."""

from __future__ import annotations

import math
from typing import Any

import pytest

from vppo.demo.model import build_processor
from vppo.study.measure import reads_and_adds
from vppo.study.task import GUESS, LOOK, WORDS, Parser, questions


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_processor([*WORDS, LOOK, GUESS]).tokenizer


def test_reading_and_adding_are_told_apart(tokenizer: Any) -> None:
    """Of four answers three read well, of which two are right; the fourth says a digit that is not there."""
    asked = list(questions("narrated", "held-out", 4, seed=3))
    texts = [question.response for question in asked]
    texts[1] = texts[1].replace(rf"\boxed{{{asked[1].answer}}}", r"\boxed{99}")
    last = str(asked[3].strip.digits[2])
    place = texts[3].rindex(f"{last}=\\boxed")
    texts[3] = texts[3][:place] + str((int(last) + 1) % 10) + texts[3][place + 1 :]
    drawn = [tokenizer.encode(text) for text in texts]
    found = reads_and_adds(texts, drawn, asked, Parser(tokenizer))
    assert found == {"reads": 3 / 4, "adds": 2 / 3}


def test_nothing_is_added_where_nothing_is_read(tokenizer: Any) -> None:
    asked = list(questions("guess", "held-out", 2, seed=0))
    texts = [rf"{GUESS}\boxed{{1}}"] * 2
    found = reads_and_adds(texts, [tokenizer.encode(text) for text in texts], asked, Parser(tokenizer))
    assert found["reads"] == 0.0
    assert math.isnan(found["adds"])
