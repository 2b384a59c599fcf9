"""The demo's data: real digits, split by image, and answers that a verifier accepts."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from vppo.demo.digits import DIGITS, LABELLED_PER_DIGIT, QUESTION, as_dataset, images_of, read_places, strips
from vppo.demo.model import CELL
from vppo.rewards import accuracy_reward


def test_no_image_is_in_both_splits() -> None:
    train, held_out = set(images_of("train").tolist()), set(images_of("held-out").tolist())
    assert not train & held_out
    assert train | held_out == set(range(len(load_digits().target)))
    assert len(held_out) > 300


def test_few_training_images_are_labelled_and_all_digits_among_them() -> None:
    labels = load_digits().target
    labelled = images_of("labelled").tolist()
    assert len(labelled) == len(set(labelled)) < 100
    assert set(labelled) <= set(images_of("train").tolist())
    assert Counter(labels[labelled].tolist()) == {digit: LABELLED_PER_DIGIT for digit in range(10)}


@pytest.mark.parametrize("split", ["train", "labelled", "held-out"])
def test_strips_are_made_of_their_own_splits_images(split: str) -> None:
    pool = set(images_of(split).tolist())
    assert all(set(strip.sources) <= pool for strip in strips(split, 500, seed=3))


def test_a_strip_shows_the_digits_it_says() -> None:
    data = load_digits()
    for strip in strips("train", 20, seed=0):
        assert strip.digits == tuple(data.target[list(strip.sources)])
        assert strip.image.size == (DIGITS * CELL, CELL) and strip.image.mode == "RGB"
        for place, source in enumerate(strip.sources):
            cell = strip.image.convert("L").crop((place * CELL, 0, (place + 1) * CELL, CELL))
            reduced = np.asarray(cell.resize((8, 8), Image.Resampling.BOX), dtype=float) / 255 * 16
            distance = np.abs(data.images - reduced).mean((1, 2))
            assert distance.argmin() == source


def test_the_seed_is_the_sequence() -> None:
    def sources(split: str, seed: int) -> list[tuple[int, ...]]:
        return [strip.sources for strip in strips(split, 8, seed)]

    assert sources("train", 5) == sources("train", 5)
    assert sources("train", 5) != sources("train", 6)


def test_every_digit_and_the_extreme_sums_occur() -> None:
    drawn = list(strips("held-out", 2000, seed=0))
    assert {digit for strip in drawn for digit in strip.digits} == set(range(10))
    assert all(0 <= int(strip.answer) <= 27 for strip in drawn)


def test_an_unknown_split_is_named() -> None:
    with pytest.raises(ValueError, match="split: got 'test'"):
        next(strips("test", 1, seed=0))


def test_the_worked_answer_is_verified_and_a_wrong_one_is_not() -> None:
    for strip in strips("train", 20, seed=1):
        wrong = strip.response.replace(f"{{{strip.answer}}}", f"{{{int(strip.answer) + 1}}}")
        unboxed = strip.response.replace("\\boxed{", "").replace("}", "")
        rewards = accuracy_reward([strip.response, wrong, unboxed], [strip.answer] * 3)
        assert rewards == [1.0, 0.0, 0.0]


def test_the_places_where_a_response_reads() -> None:
    for strip in strips("train", 200, seed=1):
        read = [strip.response[place] for place in read_places(strip.response)]
        assert read == [str(digit) for digit in strip.digits]
    assert read_places(r"9+9=18,18+7=\boxed{25}") == [0, 2, 10]
    assert read_places("I cannot read 3+5=8,8+1=") == []


def test_dataset_is_in_trls_form() -> None:
    drawn = list(strips("train", 3, seed=0))
    dataset = as_dataset(drawn)
    assert dataset.column_names == ["prompt", "images", "answer"]
    for row, strip in zip(dataset, drawn, strict=True):
        assert row["prompt"] == [{"role": "user", "content": QUESTION}]
        assert row["answer"] == strip.answer
        assert np.array_equal(np.asarray(row["images"][0]), np.asarray(strip.image))
