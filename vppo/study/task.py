r"""The tasks of the study: strips of three digits, read aloud in the middle of free words.

A worked answer says eight free words and the first digit, eight more, the second digit and the sum so far, eight more,
the third digit and the boxed sum. So of some 36 tokens three are read from the image, two thirds are words that follow
one fixed grammar, and the rest follows from what was said before.

In the task "guess" the question is whether the sum is odd, as it is in three strips of four, and an answer may skip all
reading and say so; one that reads says the sum before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vppo.demo.digits import SPLITS, Strip, strips
from vppo.rewards.accuracy import last_boxed, response_text
from vppo.study.options import TASKS

WORDS = tuple(
    f"{word} "
    for word in (
        *("now", "look", "here", "the", "first", "next", "shape", "is", "bold", "thin", "round", "one"),
        *("line", "with", "a", "gap", "so", "it", "reads", "quite", "clearly", "as", "well", "then"),
    )
)
NEXT, CHANCES = (1, 5, 10, 17), (0.4, 0.3, 0.2, 0.1)  # the grammar: how far around the list the next word lies
IN_A_ROW = 8
LOOK, GUESS = "look: ", "guess: "
LABELLED = 8  # images of each digit that the warm-up sees; by the demo's 4 this smaller model reads too little at first
ODD, GUESSED = 0.75, 0.5  # in the task "guess": odd strips, and worked answers that guess
MAX_NEW_TOKENS = 48


@dataclass(frozen=True)
class Question:
    """A strip, what is asked about it, and a worked answer, with the attributes that `vppo.demo.batches` needs."""

    task: str
    strip: Strip
    response: str

    @property
    def image(self) -> Image.Image:
        return self.strip.image

    @property
    def prompt(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": "Odd?"}] if self.task == "guess" else self.strip.prompt

    @property
    def answer(self) -> str:
        return str(sum(self.strip.digits) % 2) if self.task == "guess" else self.strip.answer

    @property
    def row(self) -> dict[str, Any]:
        """As TRL takes it."""
        return {"prompt": self.prompt, "images": [self.image], "answer": self.answer}


def questions(task: str, split: str, count: int, seed: int) -> Iterator[Question]:
    """Random questions with worked answers; the same arguments give the same sequence.

    Args:
        task: "narrated" or "guess".
        split: "train", "labelled" or "held-out"; see `vppo.demo.digits`.
        count: How many.
        seed: Of the draw.

    Raises:
        ValueError: There is no such task or split.
    """
    if task not in TASKS:
        raise ValueError(f"task: got {task!r}, takes one of {list(TASKS)}")
    endless = strips(split, 1 << 40, seed, LABELLED)
    random = np.random.default_rng([seed, SPLITS[split], 1])
    for _ in range(count):
        strip = next(endless)
        if task == "guess":
            odd = random.random() < ODD
            while sum(strip.digits) % 2 != odd:
                strip = next(endless)
        yield Question(task, strip, worked(task, strip, random))


def worked(task: str, strip: Strip, random: np.random.Generator) -> str:
    """A right answer in the form that the warm-up teaches; in the task "guess", half of them a guess."""
    if task == "guess" and random.random() < GUESSED:
        return rf"{GUESS}\boxed{{1}}"
    first, second, third = strip.digits
    total = sum(strip.digits)
    told = "".join(f"{narration(random)}{said}" for said in (first, f"{second}={first + second}", third))
    if task == "guess":  # the sum is said first: whether it is odd is then one step away
        return rf"{LOOK}{told}={total}=\boxed{{{total % 2}}}"
    return rf"{told}=\boxed{{{total}}}"


def narration(random: np.random.Generator) -> str:
    """Free words: each lies one of four fixed distances behind the last one on the list, the first behind its start."""
    places = np.cumsum(random.choice(NEXT, IN_A_ROW, p=CHANCES)) % len(WORDS)
    return "".join(WORDS[place] for place in places)


class Parser:
    """Tells the tokens of a response apart, of any form.

    Args:
        tokenizer: Of the study's model, which has every word and every digit as one token.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._words = torch.tensor(tokenizer.convert_tokens_to_ids(list(WORDS)))
        self._digits = torch.tensor(tokenizer.convert_tokens_to_ids(list("0123456789")))

    def words(self, ids: Tensor) -> Tensor:
        """`[..., T]` bool: the free words of responses."""
        return torch.isin(ids, self._words)

    def read(self, ids: Tensor) -> Tensor:
        """`[..., T]` bool: tokens that are read from the image. A digit after a free word is; sums follow a sign."""
        after_word = torch.zeros_like(ids, dtype=torch.bool)
        after_word[..., 1:] = self.words(ids[..., :-1])
        return after_word & torch.isin(ids, self._digits)

    def digits(self, ids: Sequence[int]) -> tuple[int, ...]:
        """What one response, `[T]` tokens, reads from the image."""
        tokens = torch.tensor(ids)
        _, digits = (tokens[self.read(tokens), None] == self._digits).nonzero(as_tuple=True)
        return tuple(digits.tolist())

    def computed(self, ids: Tensor) -> Tensor:
        """`[..., T]` bool: digits that follow from what was said before: all that are not read."""
        return torch.isin(ids, self._digits) & ~self.read(ids)


def guesses(text: str) -> bool:
    """Whether an answer says that it guesses."""
    return text.startswith(GUESS)


def reward(completions: Sequence[Any], answer: Sequence[str], **kwargs: Any) -> list[float]:
    """1.0 where the last box of a completion holds the very digits of the answer: no verifier is needed for those."""
    boxed = [last_boxed(response_text(completion)) for completion in completions]
    return [float(found == right) for found, right in zip(boxed, answer, strict=True)]
