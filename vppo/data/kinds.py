"""The type of each column of rows that come from JSON, where every row may have its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vppo.data.bad_rows import Where

Kind = Any  # None as long as only nulls were seen, the name of a scalar, a `_List` or a `_Object`


@dataclass
class _List:
    items: Kind = None


@dataclass
class _Object:
    fields: dict[str, Kind] = field(default_factory=dict)


class _KindError(Exception):
    """Why a value has no place in its column."""


def _different(seen: Kind, here: str) -> _KindError:
    return _KindError(f"a column has values of different types: {_name(seen)} in the rows before, {here} here")


class Kinds:
    """The types that the rows so far have; a row that differs does not change them."""

    def __init__(self) -> None:
        self._columns: dict[str, Kind] = {}

    def add(self, row: dict[str, Any], where: Where) -> None:
        """Takes a row in.

        Raises:
            BadRowError: A column holds another type than in the rows before, or what no column can hold.
        """
        merged = {}
        for column, value in row.items():
            try:
                merged[column] = _merge(self._columns.get(column), value)
            except _KindError as error:
                raise where.bad(column, str(error)) from None
        self._columns |= merged


def _merge(seen: Kind, value: Any) -> Kind:
    if value is None:
        return seen
    if isinstance(value, list):
        if not isinstance(seen, _List | None):
            raise _different(seen, "a list")
        items = seen.items if seen else None
        for item in value:
            items = _merge(items, item)
        return _List(items)
    if isinstance(value, dict):
        if not isinstance(seen, _Object | None):
            raise _different(seen, "an object")
        fields = dict(seen.fields) if seen else {}
        for name, inner in value.items():
            fields[name] = _merge(fields.get(name), inner)
        return _Object(fields)
    here = _scalar(value)
    if seen is not None and seen != here:
        raise _different(seen, here)
    return here


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise _KindError(f"takes whole numbers of 64 bits, got {value}")
        return "a number"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _KindError(f"takes text in Unicode: {error.reason}, got {value!r:.80}") from None
    return "text"


def _name(kind: Kind) -> str:
    return "a list" if isinstance(kind, _List) else "an object" if isinstance(kind, _Object) else kind
