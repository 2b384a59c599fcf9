"""What reward functions may return, and what is said of those that return something else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.runs import fix_rollouts, rows, trainer

from vppo.errors import InputError
from vppo.rewards.checks import checked

ROWS = {"prompts": ["a"] * 3, "completions": [[{"content": text}] for text in ("one", "two", "three")]}
TAKES = "takes a number or None for each of 3 rows"


def returning(value: Any) -> Any:
    def reward(**inputs: Any) -> Any:
        return value

    return checked(reward, "mine")


@pytest.mark.parametrize(
    "value",
    [[1, None, True], (0.5, 1, 2), np.array([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0]), [np.float32(1), 0, 0]],
    ids=str,
)
def test_numbers_of_any_kind(value: Any) -> None:
    assert returning(value)(**ROWS) == [None if v is None else float(v) for v in value]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([0, float("inf"), 1], "returned inf at row 2 of 3 (response 'two'), takes a finite number or None"),
        ([0, 0, -np.inf], "returned -inf at row 3 of 3 (response 'three'), takes a finite number or None"),
        (["1", 0, 0], "returned '1' at row 1 of 3 (response 'one'), takes a finite number or None"),
        ([0, [1], 0], "returned [1] at row 2 of 3 (response 'two'), takes a finite number or None"),
        ([0, 1], f"returned 2 values, {TAKES}"),
        ([], f"returned 0 values, {TAKES}"),
        (None, f"returned None, {TAKES}"),
        (1.0, f"returned 1.0, {TAKES}"),
        ("abc", f"returned 'abc', {TAKES}"),
    ],
)
def test_what_is_refused(value: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"^reward function 'mine': {re.escape(message)}$"):
        returning(value)(**ROWS)


def refuses_two(completions: list[Any], answer: list[int], **inputs: Any) -> list[float]:
    assert len(completions) == len(answer)
    return [1 / (answer[i] - 2) for i in range(len(answer))]


def test_a_function_that_raises() -> None:
    message = "reward function 'mine' raised ZeroDivisionError: .* at row 2 of 3 \\(response 'two'\\)$"
    with pytest.raises(RuntimeError, match=message) as caught:
        checked(refuses_two, "mine")(**ROWS, answer=[1, 2, 3], trainer_state=object())
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def bad(completions: list[Any], **inputs: Any) -> list[Any]:
    return [float("inf"), *[0.5] * (len(completions) - 1)]


async def bad_later(completions: list[Any], **inputs: Any) -> list[Any]:
    return bad(completions)


async def raises_later(**inputs: Any) -> list[Any]:
    raise KeyError("nothing")


def nothing(completions: list[Any], **inputs: Any) -> list[Any]:
    return [None] * len(completions)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (bad, "reward function 'bad': returned inf at row 1 of 4"),
        (bad_later, "reward function 'bad_later': returned inf at row 1 of 4"),
        (raises_later, "reward function 'raises_later' raised KeyError: 'nothing'"),
        (nothing, "reward_funcs: nothing: gave None for all 4 responses of a batch"),
    ],
)
def test_a_run_ends_at_once(reward: Any, message: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, rows(4), reward=reward)
    fix_rollouts(run)
    with pytest.raises((InputError, RuntimeError), match=re.escape(message)):
        run.train()


def test_one_function_may_leave_a_row_to_another(tmp_path: Path) -> None:
    def some(completions: list[Any], **inputs: Any) -> list[Any]:
        return [None, 0.2, None, 0.4]

    run = trainer(tmp_path, rows(4), reward=[some, nothing], max_steps=1)
    fix_rollouts(run)
    run.train()
    assert run.state.log_history[0]["rewards/some/mean"] == pytest.approx(0.3)
