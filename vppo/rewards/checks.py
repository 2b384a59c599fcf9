"""Reward functions that are held to what they must return, before one bad number spoils a whole batch in silence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from torch import nn

from vppo.errors import InputError
from vppo.trl_utils import is_async_callable


def checked(function: Any, name: str) -> Any:
    """A reward function whose answers are looked at; models are left as they are.

    Args:
        function: Called as TRL calls rewards; may be async.
        name: As TRL's metrics name it.

    Returns:
        The same function, which raises an `InputError` that names it and the row unless it returns, for every row, a
        finite number or None. Where it raises itself, a `RuntimeError` names it and the first row at which it does.
    """
    if isinstance(function, nn.Module):
        return function
    if is_async_callable(function):

        @wraps(function)
        async def call_async(**inputs: Any) -> list[float | None]:
            try:
                found = await function(**inputs)
            except Exception as error:
                raise RuntimeError(f"reward function {name!r} raised {_told(error)}") from error
            return _numbers(found, name, inputs)

        return call_async

    @wraps(function)
    def call(**inputs: Any) -> list[float | None]:
        try:
            found = function(**inputs)
        except Exception as error:
            row = _first_failing(function, inputs)
            where = "" if row is None else f" at {_place(row, inputs)}"
            raise RuntimeError(f"reward function {name!r} raised {_told(error)}{where}") from error
        return _numbers(found, name, inputs)

    return call


def _numbers(found: Any, name: str, inputs: dict[str, Any]) -> list[float | None]:
    rows = len(inputs["prompts"])
    takes = f"takes a number or None for each of {rows} rows"
    if not hasattr(found, "__len__") or isinstance(found, str | bytes | dict):
        raise InputError(f"reward function {name!r}: returned {_short(found)}, {takes}")
    if len(found) != rows:
        raise InputError(f"reward function {name!r}: returned {len(found)} values, {takes}")
    return [_number(value, name, row, inputs) for row, value in enumerate(found)]


def _number(value: Any, name: str, row: int, inputs: dict[str, Any]) -> float | None:
    if value is None:
        return None
    try:
        number = math.inf if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError):
        number = math.inf
    if math.isinf(number):
        raise InputError(
            f"reward function {name!r}: returned {_short(value)} at {_place(row, inputs)}, "
            "takes a finite number or None"
        )
    return number


def _first_failing(function: Callable[..., Any], inputs: dict[str, Any]) -> int | None:
    """The first row that fails when it is alone; None where each alone succeeds."""
    rows = len(inputs["prompts"])
    for row in range(rows):
        alone = {
            key: value[row : row + 1] if isinstance(value, Sequence) and len(value) == rows else value
            for key, value in inputs.items()
        }
        try:
            function(**alone)
        except Exception:
            return row
    return None


def _place(row: int, inputs: dict[str, Any]) -> str:
    completion = inputs["completions"][row]
    text = completion if isinstance(completion, str) else completion[-1].get("content") if completion else ""
    return f"row {row + 1} of {len(inputs['prompts'])} (response {_short(text)})"


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _short(value: Any) -> str:
    told = repr(value)
    return told if len(told) <= 80 else told[:77] + "..."
