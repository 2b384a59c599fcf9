"""Which columns of a dataset hold problem, answer and images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vppo.data.options import DataOptions
from vppo.errors import InputError

PROBLEMS = ("problem", "question", "prompt")
ANSWERS = ("answer", "ground_truth", "reward_model.ground_truth")
WORKED_ANSWERS = ("solution",)  # often a derivation; taken where there is nothing shorter
IMAGES = ("images", "image")


@dataclass(frozen=True)
class Names:
    """What a dataset's columns are called.

    Attributes:
        columns: In their order.
        inner: Fields of columns that are objects, as `column.field`.
        lists: Columns that hold lists.
        empty: Columns that hold nothing in any row.
    """

    columns: Sequence[str]
    inner: frozenset[str]
    lists: frozenset[str]
    empty: frozenset[str]

    @classmethod
    def of_features(cls, features: Mapping[str, Any]) -> Names:
        """Of a `datasets.Dataset`."""
        inner = {f"{name}.{field}" for name, kind in features.items() if isinstance(kind, dict) for field in kind}
        lists = {name for name, kind in features.items() if isinstance(kind, list) or hasattr(kind, "feature")}
        empty = {name for name, kind in features.items() if getattr(kind, "dtype", None) == "null"}
        return cls(list(features), frozenset(inner), frozenset(lists), frozenset(empty))

    @classmethod
    def of_rows(cls, rows: Iterable[Mapping[str, Any]]) -> Names:
        """Of rows in memory."""
        columns: dict[str, None] = {}
        inner, lists, filled = set(), set(), set()
        for row in rows:
            columns |= dict.fromkeys(row)
            inner |= {f"{name}.{field}" for name, value in row.items() if isinstance(value, dict) for field in value}
            lists |= {name for name, value in row.items() if isinstance(value, list)}
            filled |= {name for name, value in row.items() if value is not None}
        return cls(list(columns), frozenset(inner), frozenset(lists), frozenset(columns.keys() - filled))

    def __contains__(self, name: str) -> bool:
        return name in self.columns or name in self.inner


@dataclass(frozen=True)
class Columns:
    """The columns that are read; `answer` is None where the data has none."""

    problem: str
    answer: str | None
    images: str

    @classmethod
    def find(cls, names: Names, options: DataOptions, source: str) -> Columns:
        """The columns that the options name, and otherwise the well-known ones.

        The problem is a `prompt` that holds messages; otherwise `problem`, `question`, or a `prompt` that is a text.
        The answer is `answer`, `ground_truth` or `reward_model.ground_truth`; otherwise `solution`. Images are `images`
        or `image`.

        Raises:
            InputError: There is no such column, or there are two between which nothing decides.
        """
        for option in ("problem_key", "answer_key", "image_key"):
            given = getattr(options, option)
            if given is not None and given not in names:
                raise InputError(f"{source}: {option}: no column {given!r}, it has {list(names.columns)}")
        problem = options.problem_key
        if problem is None:
            messages = "prompt" in names.lists
            problem = "prompt" if messages else _only(names, PROBLEMS, "problem_key", source)
        answer = options.answer_key or _only(names, ANSWERS, "answer_key", source)
        answer = answer or _only(names, WORKED_ANSWERS, "answer_key", source)
        images = options.image_key or _only(names, IMAGES, "image_key", source)
        for name, found in (("problem", problem), ("images", images)):
            if found is None:
                raise _missing(name, names, source)
        assert problem is not None and images is not None
        return cls(problem, answer, images)

    def need_answer(self, names: Names, source: str) -> str:
        """The column of the answer.

        Raises:
            InputError: There is none.
        """
        if self.answer is None:
            raise _missing("answer", names, source)
        return self.answer


def _missing(name: str, names: Names, source: str) -> InputError:
    return InputError(f"{source}: no column {name!r}, it has {list(names.columns)}")


def _only(names: Names, candidates: Sequence[str], option: str, source: str) -> str | None:
    there = [name for name in candidates if name in names]
    found = [name for name in there if name not in names.empty] or there[:1]
    if len(found) > 1:
        raise InputError(f"{source}: {option}: it has columns {' and '.join(map(repr, found))}; say which one to take")
    return found[0] if found else None


def value_at(row: Mapping[str, Any], name: str) -> Any:
    """What a row holds in a column, or in a field of one (`column.field`); None where it has nothing there."""
    if name in row or "." not in name:
        return row.get(name)
    column, field = name.split(".", 1)
    inner = row.get(column)
    return value_at(inner, field) if isinstance(inner, dict) else None


def with_value(row: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """The row with another value in a column, or in a field of one, where it has something there."""
    if name in row:
        return {**row, name: value}
    column, _, field = name.partition(".")
    inner = row.get(column)
    return {**row, column: with_value(inner, field, value)} if isinstance(inner, dict) else row
