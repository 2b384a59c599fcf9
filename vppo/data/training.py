"""Problems with images, checked and in the form that TRL trains on."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vppo.data.answers import reference_answer
from vppo.data.bad_rows import BadRowError, Where
from vppo.data.checks import AT_ONCE, Candidate, find_bad_rows
from vppo.data.columns import Columns, Names, value_at, with_value
from vppo.data.files import Source, read_sources, table
from vppo.data.options import DataOptions
from vppo.data.pictures import decode
from vppo.data.rows import RowReader
from vppo.errors import InputError

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset, Features

# what TRL itself passes to rewards under these names
RESERVED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments")
FAULT = "_fault"  # a column of the rows that are being read: why one cannot be used


def load_training_data(
    name_or_path: str | Path,
    *,
    bad_rows: Literal["error", "skip"] = "error",
    processor: Any = None,
    skipped: list[BadRowError] | None = None,
    skipped_before: Collection[BadRowError] | None = None,
    options: DataOptions | None = None,
    **changes: Any,
) -> Dataset:
    """Loads problems, checks every row, decodes every image once, and writes them as conversations.

    A row has a problem (a text, or messages), an answer, and images: a list, empty for a text-only problem, or one.
    `vppo.data.columns` says which columns they are found in, `vppo.data.pictures` what an image may be. Where the
    problem says `<image>`, once for each of its images, they stand there; otherwise they stand before it.

    Args:
        name_or_path: A JSONL, JSON (a list of rows) or parquet file, a folder of such files, or a dataset on the hub.
        bad_rows: "error" refuses the data where a row cannot be used, "skip" goes on without it, and without columns
            that rewards cannot be given.
        processor: Of the model; rows that it does not take are then bad, too.
        skipped: Receives the rows that were left out.
        skipped_before: What an earlier part of the same run left out: just that is left out again.
        options: How the rows are read.
        **changes: Fields of `DataOptions` that are other than in `options`.

    Returns:
        Columns `prompt` (messages as TRL and chat templates take them), `answer` (text), `images` (decoded to RGB when
        a row is read), and whatever else the rows had, for rewards of one's own.

    Raises:
        InputError: A missing file or column, a row that cannot be used, or no row that can, or no image in any row. The
            message names file, row and column; rows count from 1.
    """
    from datasets import concatenate_datasets

    if bad_rows not in ("error", "skip"):
        raise InputError(f"bad_rows: got {bad_rows!r}, takes 'error' or 'skip'")
    chosen = replace(options or DataOptions(), **changes)
    before = None if skipped_before is None else {(row.file, row.row) for row in skipped_before}
    lenient = bad_rows == "skip" and before is None
    parts = []
    for source in read_sources(name_or_path, chosen.split):
        parts.append(_read(source, chosen, lenient=lenient, before=before or set(), reserved=bad_rows == "error"))
    bad = {(row.file, row.row): row for part in parts for row in part.bad}
    if before is not None:
        known = {part.name for part in parts}
        bad |= {(row.file, row.row): row for row in skipped_before or () if row.file in known}
    for row in _check(parts, bad, processor, chosen):
        if not lenient:
            raise row
        bad[row.file, row.row] = row
    if skipped is not None:
        skipped += [bad[place] for part in parts for place in part.places() if place in bad]
    kept = [part.table.select(part.good(bad)).remove_columns(FAULT) for part in parts]
    count = sum(map(len, kept))
    if not count:
        first = next(iter(bad.values()))
        raise InputError(f"{name_or_path}: none of its {len(bad)} rows can be used; the first: {first}")
    if not any(_has_images(part) for part in kept):
        names = ", ".join(part.name for part in parts)
        raise InputError(f"{names}: no row has an image; training on images needs at least one")
    try:
        whole = concatenate_datasets([part for part in kept if len(part)])
    except ValueError as error:
        raise InputError(f"{name_or_path}: its files do not have the same columns: {error}") from error
    return whole.with_transform(_Decoding(chosen.image_pixel_limit))


@dataclass(frozen=True)
class _Part:
    """The rows of one source as conversations, images still encoded; bad ones keep their place."""

    name: str
    table: Dataset
    columns: Columns
    bad: list[BadRowError]

    def places(self) -> list[tuple[str, int]]:
        return [(self.name, number) for number in range(1, len(self.table) + 1)]

    def good(self, bad: Collection[tuple[str, int]]) -> list[int]:
        return [index for index, place in enumerate(self.places()) if place not in bad]


@dataclass(frozen=True)
class _Decoding:
    """Decodes the images of the rows that are read."""

    pixel_limit: int | None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        if "images" not in batch:
            return batch
        return {**batch, "images": [[decode(one, self.pixel_limit) for one in row] for row in batch["images"]]}


def _read(
    source: Source, options: DataOptions, *, lenient: bool, before: Collection[tuple[str, int]], reserved: bool
) -> _Part:
    unread = [row for row in source.rows if isinstance(row, BadRowError)] if isinstance(source.rows, list) else []
    if unread and not lenient and (unread[0].file, unread[0].row) not in before:
        raise unread[0]
    rows, bad, names = _typed(source, options)
    columns = Columns.find(names, options, source.name)
    columns.need_answer(names, source.name)
    taken = [name for name in names.columns if name in RESERVED]
    if taken and reserved:
        raise InputError(
            f"{source.name}: column {taken[0]!r}: rewards are given something else under this name; rename it, or "
            "leave it out with bad_rows: skip"
        )
    rows = rows.remove_columns(taken)
    bad = {index: row for index, row in bad.items() if (row.file, row.row) not in before}
    if bad and not lenient:
        raise next(iter(bad.values()))
    reader = RowReader.of(source, columns, options, rows.features)
    converted = _to_conversations(rows, source.name, reader, lenient=lenient, skip={*bad, *_indices(source, before)})
    faults = [json.loads(fault) if fault else None for fault in converted[FAULT]]
    bad |= {i: Where(source.name, i + 1).bad(*fault) for i, fault in enumerate(faults) if fault}
    return _Part(source.name, converted, columns, [bad[index] for index in sorted(bad)])


def _indices(source: Source, places: Collection[tuple[str, int]]) -> set[int]:
    return {row - 1 for file, row in places if file == source.name}


def _typed(source: Source, options: DataOptions) -> tuple[Dataset, dict[int, BadRowError], Names]:
    """The rows as a table with one type a column, and those that have no place in it."""
    if not isinstance(source.rows, list):
        return source.rows, {}, Names.of_features(source.rows.features)
    names = Names.of_rows(row for row in source.rows if isinstance(row, dict))
    column = Columns.find(names, options, source.name).need_answer(names, source.name)
    rows: list[dict[str, Any] | BadRowError] = []
    for number, row in enumerate(source.rows, 1):
        if isinstance(row, dict):
            try:  # 7 and "1/2" in one column: fine in JSON, not in a table
                answer = reference_answer(value_at(row, column), column, Where(source.name, number))
                row = with_value(row, column, answer)
            except BadRowError as error:
                row = error
        rows.append(row)
    typed, bad = table(rows, source.name)
    return typed, bad, names


def _to_conversations(rows: Dataset, name: str, reader: RowReader, *, lenient: bool, skip: Collection[int]) -> Dataset:
    columns, features = reader.columns, _features(rows, reader.columns)

    def convert(table: pyarrow.Table, indices: list[int]) -> dict[str, list[Any]]:
        found: list[tuple[list[Any], str, list[Any], str | None]] = []
        for index, row in zip(indices, table.to_pylist(), strict=True):
            where = Where(name, index + 1)
            try:
                if index in skip:
                    found.append(([], "", [], None))
                    continue
                prompt, answer, images = reader.read(row, where)
                if answer is None:
                    raise where.bad(columns.answer, "it is empty")
                found.append((prompt, answer, images, None))
            except BadRowError as error:
                if not lenient:
                    raise
                found.append(([], "", [], json.dumps([error.column, error.reason])))
        prompts, answers, images, faults = map(list, zip(*found, strict=True))
        others = {name: table[name].to_pylist() for name in rows.column_names if name in features}
        return {**others, "prompt": prompts, "answer": answers, "images": images, FAULT: faults}

    return (
        rows.with_format("arrow")  # pictures stay encoded
        .map(
            convert,
            batched=True,
            batch_size=256,
            with_indices=True,
            remove_columns=[column for column in rows.column_names if column not in features],
            features=features,
            desc="Reading rows",
        )
        .with_format(None)
    )


def _features(rows: Dataset, columns: Columns) -> Features:
    from datasets import Features, List, Value

    content = List({"type": Value("string"), "text": Value("string")})
    others = {name: kind for name, kind in rows.features.items() if name not in (columns.problem, columns.images)}
    return Features(
        {
            **others,
            "prompt": List({"role": Value("string"), "content": content}),
            "answer": Value("string"),
            "images": List({"bytes": Value("binary"), "path": Value("string")}),
            FAULT: Value("string"),
        }
    )


def _check(
    parts: list[_Part], bad: Collection[tuple[str, int]], processor: Any, options: DataOptions
) -> Iterator[BadRowError]:
    from rich.progress import track

    def candidates() -> Iterator[Candidate]:
        for part in parts:
            row = 0
            for rows in part.table.select_columns(["prompt", "images"]).with_format("arrow").iter(batch_size=AT_ONCE):
                for content in rows.to_pylist():
                    row += 1
                    if (part.name, row) not in bad:
                        yield Candidate(Where(part.name, row), part.columns, content["prompt"], content["images"])

    total = sum(len(part.table) for part in parts) - len(bad)
    yield from find_bad_rows(
        track(candidates(), "Checking rows", total, transient=True), processor, options.image_pixel_limit
    )


def _has_images(rows: Dataset) -> bool:
    from pyarrow import compute

    tables = rows.select_columns("images").with_format("arrow").iter(batch_size=1024)
    return any(compute.any(compute.greater(compute.list_value_length(table["images"]), 0)).as_py() for table in tables)
