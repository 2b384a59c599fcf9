"""Rows that cannot be used, and the list that is kept of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vppo.errors import InputError
from vppo.files import write_atomic


class BadRowError(InputError):
    """A row that cannot be used as it is.

    Args:
        file: The file, or the name on the hub, as messages call it.
        row: Counts from 1.
        column: The column at fault; None where it is the row as a whole.
        reason: For a person to read.
    """

    def __init__(self, file: str, row: int, column: str | None, reason: str) -> None:
        super().__init__(file, row, column, reason)
        self.file, self.row, self.column, self.reason = file, row, column, reason

    def __str__(self) -> str:
        column = f", column {self.column!r}" if self.column else ""
        return f"{self.file}, row {self.row}{column}: {self.reason}"


class Where(NamedTuple):
    """A row's place: its file, and its number from 1."""

    file: str
    row: int

    def bad(self, column: str | None, reason: str) -> BadRowError:
        return BadRowError(self.file, self.row, column, reason)


def write_bad_rows(path: Path, rows: Sequence[BadRowError]) -> None:
    """A line of JSON a row: `file`, `row`, `column`, `reason`."""
    lines = [
        json.dumps({"file": r.file, "row": r.row, "column": r.column, "reason": r.reason}, ensure_ascii=False) + "\n"
        for r in rows
    ]
    write_atomic(path, "".join(lines))


def read_bad_rows(path: Path) -> list[BadRowError]:
    """What `write_bad_rows` wrote.

    Raises:
        InputError: A line is none of those; the message names file and line.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            rows += [BadRowError(**json.loads(line))] if line else []
        except (ValueError, TypeError, RecursionError):
            raise InputError(
                f"{path}, line {number}: is no skipped row: {line[:60].decode(errors='replace')!r}; without that list "
                "the run cannot go on with the rows that it had"
            ) from None
    return rows
