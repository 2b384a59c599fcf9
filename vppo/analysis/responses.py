"""Responses that were given: read from files, whichever models wrote them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vppo.data import Problems, read_file
from vppo.errors import InputError


@dataclass(frozen=True)
class Response:
    """One response to one problem.

    Attributes:
        model: Who gave it, as tables and figures call it.
        sample: Index of the problem in the data.
        number: It is the `number`-th response of this model to this problem, from 0.
        ids: `[n]` int32 token ids.
        truncated: It was cut off where it became too long.
    """

    model: str
    sample: int
    number: int
    ids: np.ndarray
    truncated: bool


@dataclass(frozen=True)
class Skipped:
    """What could not be scored, and why.

    Attributes:
        sample: Index of the problem in the data, or what was given as such.
        reason: For a person to read.
        model, response: The response, where not the problem itself is at fault.
    """

    sample: Any
    reason: str
    model: str | None = None
    response: int | None = None


def read_responses(
    sources: Sequence[str | Path] | Sequence[dict[str, Any]], problems: Problems, tokenizer: Any
) -> tuple[list[Response], list[Skipped]]:
    """Reads responses and finds their problems.

    A row names its problem by `sample` (its index in the data, from 0) or by `id` (the value of the data's own column
    `id`), and holds a `response` (text) or `response_ids` (token ids, which win: a text may be cut into other tokens
    than those that were sampled). `model` is a label, by default the file's name; `truncated` may say that the response
    was cut off.

    Args:
        sources: JSONL, JSON or parquet files, or rows in memory.
        problems: The data.
        tokenizer: Of the model that scores; for responses given as text.

    Returns:
        The responses, by problem and, within one, in the order of the files; and the rows whose problem is not there.

    Raises:
        InputError: A file cannot be read or lacks a column; the message names those it has.
    """
    found: list[Response] = []
    lost: list[Skipped] = []
    counts: dict[tuple[str, int], int] = {}
    for label, columns, rows in _tables(sources):
        for wanted in (("sample", "id"), ("response", "response_ids")):
            if not columns & set(wanted):
                raise InputError(f"responses: {label}: no column {' or '.join(wanted)}, it has {sorted(columns)}")
        known = None if "sample" in columns else problems.ids
        if "sample" not in columns and known is None:
            raise InputError(
                f"responses: {label}: its column 'id' needs one in the data, which has none; takes 'sample', the index "
                "of a row"
            )
        for row in rows:
            name = str(row.get("model") or label)
            sample = row.get("sample") if known is None else known.get(str(row.get("id")))
            if not isinstance(sample, int) or not 0 <= sample < len(problems):
                given = row.get("sample") if known is None else row.get("id")
                lost.append(Skipped(given, f"the data has no such row, it has {len(problems)}", name))
                continue
            ids = row.get("response_ids")
            if ids is None:
                ids = tokenizer(row.get("response") or "", add_special_tokens=False)["input_ids"]
            number = counts.get((name, sample), 0)
            counts[name, sample] = number + 1
            found.append(Response(name, sample, number, np.array(ids, np.int32), bool(row.get("truncated"))))
    return sorted(found, key=lambda response: response.sample), lost


def _tables(sources: Sequence[Any]) -> Iterator[tuple[str, set[str], Iterator[dict[str, Any]] | Sequence[Any]]]:
    """A label, the columns and the rows of each source."""
    if sources and isinstance(sources[0], dict):
        yield "responses", {name for row in sources for name in row}, sources
        return
    paths = [Path(source).expanduser() for source in sources]
    stems = [path.stem for path in paths]
    for path in paths:
        if not path.is_file():
            raise InputError(f"responses: {path}: no such file")
        table = read_file(path)
        label = path.stem if stems.count(path.stem) == 1 else str(path)
        yield label, set(table.column_names), iter(table)
