"""The study's questions: their grammar, their answers, which tokens are read, and what is rewarded."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from vppo.demo.model import END, build_processor
from vppo.study.task import (
    CHANCES,
    GUESS,
    IN_A_ROW,
    LOOK,
    MAX_NEW_TOKENS,
    NEXT,
    ODD,
    WORDS,
    Parser,
    guesses,
    narration,
    questions,
    reward,
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_processor([*WORDS, LOOK, GUESS]).tokenizer


def tokens(tokenizer: Any, text: str) -> list[str]:
    return [tokenizer.decode([i]) for i in tokenizer(text).input_ids]


def test_twenty_four_words_and_none_begins_another() -> None:
    assert len(set(WORDS)) == 24
    every = [*WORDS, LOOK, GUESS]
    assert not [(a, b) for a in every for b in every if a != b and b.startswith(a)]


def test_the_form_of_an_answer(tokenizer: Any) -> None:
    words = "|".join(WORDS)
    form = re.compile(rf"((?:{words}){{8}})(\d)((?:{words}){{8}})(\d)=(\d+)((?:{words}){{8}})(\d)=\\boxed\{{(\d+)\}}")
    for question in questions("narrated", "train", 200, seed=0):
        match = form.fullmatch(question.response)
        assert match is not None
        assert tuple(int(match[group]) for group in (2, 4, 7)) == question.strip.digits
        assert int(match[5]) == sum(question.strip.digits[:2]) and match[8] == question.answer
        assert len(tokens(tokenizer, question.response + END)) <= MAX_NEW_TOKENS


def test_the_grammar_is_what_is_drawn() -> None:
    random, counts = np.random.default_rng(0), np.zeros(len(WORDS))
    for _ in range(4000):
        places = [WORDS.index(f"{word} ") for word in narration(random).split()]
        assert len(places) == IN_A_ROW
        for step in np.diff([0, *places]) % len(WORDS):
            counts[step] += 1
    assert set(np.flatnonzero(counts)) == set(NEXT)
    assert counts[list(NEXT)] / counts.sum() == pytest.approx(CHANCES, abs=0.01)


def test_the_same_seed_gives_the_same_questions() -> None:
    def drawn(seed: int, split: str = "train") -> list[tuple[Any, str]]:
        return [(q.strip.sources, q.response) for q in questions("narrated", split, 5, seed)]

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4) and drawn(3) != drawn(3, "held-out")


@pytest.mark.parametrize("task", ["narrated", "guess"])
def test_the_read_tokens_of_a_worked_answer(tokenizer: Any, task: str) -> None:
    parser = Parser(tokenizer)
    for question in questions(task, "labelled", 100, seed=1):
        ids = torch.tensor(tokenizer(question.response).input_ids)
        read = [tokenizer.decode([i]) for i in ids[parser.read(ids)]]
        assert read == ([] if guesses(question.response) else [str(digit) for digit in question.strip.digits])
        computed = "".join(tokenizer.decode([i]) for i in ids[parser.computed(ids)])
        first, second, third = question.strip.digits
        sums = f"{first + second}{first + second + third}"
        worked = sums if task == "narrated" else f"{sums}{question.answer}"
        assert computed == ("1" if guesses(question.response) else worked)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("3=4", []),  # a digit at the start follows no word
        ("now 12=3then 4", ["1", "4"]),  # of two digits in a row the first, and no sum
        (r"now look 7=\boxed{7}", ["7"]),
        ("", []),
        ("no words 5", []),
    ],
)
def test_read_tokens_of_other_forms(tokenizer: Any, text: str, read: list[str]) -> None:
    ids = torch.tensor(tokenizer(text).input_ids, dtype=torch.long)
    found = Parser(tokenizer).read(ids.repeat(2, 1))
    assert [[tokenizer.decode([i]) for i in ids[row]] for row in found] == [read, read]


def test_a_guess_is_right_in_three_strips_of_four() -> None:
    drawn = list(questions("guess", "train", 800, seed=0))
    assert np.mean([question.answer == "1" for question in drawn]) == pytest.approx(ODD, abs=0.05)
    assert all(question.answer == str(sum(question.strip.digits) % 2) for question in drawn)
    guessed = [question for question in drawn if guesses(question.response)]
    assert 0.4 < len(guessed) / len(drawn) < 0.6
    assert {question.response for question in guessed} == {rf"{GUESS}\boxed{{1}}"}
    looked = [question for question in drawn if not guesses(question.response)]
    assert all(question.response.startswith(LOOK) for question in looked)
    assert reward([question.response for question in looked], [q.answer for q in looked]) == [1.0] * len(looked)


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(ValueError, match="task: got 'sums', takes one of"):
        next(questions("sums", "train", 1, 0))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"now 3=\boxed{12}", 1.0),
        (r"\boxed{1}\boxed{12}", 1.0),
        (r"\boxed{012}", 0.0),
        (r"\boxed{12", 0.0),
        ("12", 0.0),
    ],
)
def test_what_is_rewarded(text: str, found: float) -> None:
    assert reward([text], ["12"]) == [found]
    assert reward([[{"role": "assistant", "content": text}]], ["12"], images=None) == [found]
