"""The demo's data: strips of three real handwritten digits, and the question for their sum.

scikit-learn's `load_digits` has 1,797 images of 8 x 8 pixels. They are split by image, so a held-out strip shows no
image that the model was trained on. Of the training images only a few are "labelled": the warm-up sees worked answers
to strips of these; reinforcement learning sees strips of all training images and only checks the sum. So the policy
starts as one that adds well and reads badly, and what is left to learn is looking.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image
from sklearn.datasets import load_digits

from vppo.demo.model import CELL

DIGITS = 3
TRAIN_IMAGES = 1400
QUESTION = "Sum?"
LABELLED_PER_DIGIT = 4
SPLITS = {"train": 0, "held-out": 1, "labelled": 2}


READ = re.compile(r"(\d)\+(\d)=\d+,\d+\+(\d)=")


def read_places(response: str) -> list[int]:
    """Where a response says what it has read from the image, as character positions; none if it has another form.

    In `3+5=8,8+1=\\boxed{9}` these are the 3, the 5 and the 1; the model computes or copies all the others.
    """
    match = READ.match(response)
    return [match.start(group) for group in (1, 2, 3)] if match else []


@dataclass(frozen=True)
class Strip:
    """Three digits side by side.

    Attributes:
        image: `3 * 28` x 28 pixels, RGB.
        digits: What they say, left to right.
        sources: Their indices in scikit-learn's data.
    """

    image: Image.Image
    digits: tuple[int, ...]
    sources: tuple[int, ...]

    @property
    def answer(self) -> str:
        return str(sum(self.digits))

    @property
    def response(self) -> str:
        r"""The worked answer, such as `3+5=8,8+1=\boxed{9}`."""
        first, second, third = self.digits
        return f"{first}+{second}={first + second},{first + second}+{third}=\\boxed{{{self.answer}}}"

    @property
    def prompt(self) -> list[dict[str, str]]:
        """As TRL takes it; the image travels beside it."""
        return [{"role": "user", "content": QUESTION}]

    @property
    def row(self) -> dict[str, Any]:
        """A row of data, as `vppo.analyze` and TRL take it: "prompt", "images" and, for the reward, "answer"."""
        return {"prompt": self.prompt, "images": [self.image], "answer": self.answer}


@cache
def _cells() -> tuple[np.ndarray, np.ndarray]:
    """All images as `[n, 28, 28]` uint8, and their labels."""
    data = load_digits()
    images = (data.images * (255 / 16)).astype(np.uint8)
    enlarged = [np.asarray(Image.fromarray(image).resize((CELL, CELL), Image.Resampling.BICUBIC)) for image in images]
    return np.stack(enlarged), data.target


def images_of(split: str, labelled: int = LABELLED_PER_DIGIT) -> np.ndarray:
    """Indices of the images that belong to a split; the same in every run. "labelled" is a part of "train"."""
    labels = _cells()[1]
    order = np.random.default_rng(0).permutation(len(labels))
    train, held_out = order[:TRAIN_IMAGES], order[TRAIN_IMAGES:]
    if split == "labelled":
        return np.concatenate([train[labels[train] == digit][:labelled] for digit in range(10)])
    return train if split == "train" else held_out


def strips(split: str, count: int, seed: int, labelled: int = LABELLED_PER_DIGIT) -> Iterator[Strip]:
    """Random strips of a split; the same (split, seed) gives the same sequence.

    Args:
        split: "train", "labelled" or "held-out".
        count: How many.
        seed: Of the draw.
        labelled: How many images of each digit are "labelled".

    Raises:
        ValueError: There is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}, takes one of {list(SPLITS)}")
    cells, labels = _cells()
    pool = images_of(split, labelled)
    random = np.random.default_rng([seed, SPLITS[split]])
    for _ in range(count):
        chosen = random.choice(pool, DIGITS, replace=False)
        picture = Image.fromarray(np.concatenate(cells[chosen], axis=1)).convert("RGB")
        yield Strip(picture, tuple(int(labels[i]) for i in chosen), tuple(int(i) for i in chosen))


def as_dataset(items: list[Strip]) -> Dataset:
    """Strips as TRL takes them: "prompt", "images" and, for the reward, "answer"."""
    return Dataset.from_list([strip.row for strip in items])
