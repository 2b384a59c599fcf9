"""Dataset files, and datasets on the hub, as they are stored."""

from __future__ import annotations

import glob
import json
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vppo.data.bad_rows import BadRowError, Where
from vppo.data.kinds import Kinds
from vppo.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

FORMATS = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Source:
    """One file, or one dataset of the hub.

    Attributes:
        name: How messages call it.
        folder: What its image paths are relative to by default.
        rows: Parquet and hub: a dataset. JSON: each row as it was read, or why it could not be.
        from_hub: The dataset came from the hub, so image paths in it may be those of its own cache.
    """

    name: str
    folder: Path
    rows: Dataset | list[dict[str, Any] | BadRowError]
    from_hub: bool = False


def read_sources(name_or_path: str | Path, split: str) -> list[Source]:
    """The parts of a dataset.

    Args:
        name_or_path: A JSONL, JSON (a list of rows) or parquet file, a folder of such files, or a dataset on the hub.
        split: See `DataOptions`.

    Raises:
        InputError: There is no such dataset, a file cannot be read, or it has no row that can be.
    """
    files = _local_files(name_or_path, split)
    if files:
        sources = [
            Source(str(file), file.parent, _read_parquet(file) if file.suffix == ".parquet" else json_rows(file))
            for file in files
        ]
    else:
        sources = [Source(str(name_or_path), Path(), _read_hub(str(name_or_path), split), from_hub=True)]
    for source in sources:
        if not len(source.rows):
            raise InputError(f"{source.name}: it has no rows")
        if isinstance(source.rows, list) and all(isinstance(row, BadRowError) for row in source.rows):
            raise typing.cast(BadRowError, source.rows[0])
    return sources


def read_file(file: Path) -> Dataset:
    """The rows of a JSONL, JSON or parquet file as they are stored.

    Raises:
        InputError: It cannot be read, a row is not an object, or a column has values of different types.
    """
    if file.suffix == ".parquet":
        return _read_parquet(file)
    rows, bad = table(json_rows(file), str(file))
    for error in bad.values():
        raise error
    return rows


def table(rows: list[dict[str, Any] | BadRowError], name: str) -> tuple[Dataset, dict[int, BadRowError]]:
    """JSON's rows as a dataset, whose columns have one type each.

    Returns:
        The dataset, and the rows (from 0) that have no place in it; these are empty there.

    Raises:
        InputError: Arrow finds no type for a column.
    """
    from datasets import Dataset
    from pyarrow import ArrowException

    kinds, bad, kept = Kinds(), {}, []
    for index, row in enumerate(rows):
        try:
            if isinstance(row, BadRowError):
                raise row
            kinds.add(row, Where(name, index + 1))
            kept.append(row)
        except BadRowError as error:
            bad[index] = error
            kept.append({})
    columns = dict.fromkeys(column for row in kept for column in row)
    try:
        return Dataset.from_dict({column: [row.get(column) for row in kept] for column in columns}), bad
    except ArrowException as error:
        raise InputError(f"{name}: a column has values of different types: {error}") from error


def json_rows(file: Path) -> list[dict[str, Any] | BadRowError]:
    """Each row of a JSONL or JSON file as it was read, or why it could not be.

    Raises:
        InputError: The file as a whole cannot be read.
    """
    rows = []
    for where, row in _json_values(file):
        usable = isinstance(row, dict | BadRowError)
        rows.append(row if usable else where.bad(None, f"must be an object of columns and values; got {row!r:.80}"))
    return rows


def _json_values(file: Path) -> Iterator[tuple[Where, Any]]:
    try:
        text = file.read_text(encoding="utf-8-sig")  # Windows writes a mark at the start
        lines = text.rstrip().split("\n") if text.strip() else []
        rows = json.loads(text) if file.suffix == ".json" else lines
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not valid JSON in UTF-8: {error}") from error
    if not isinstance(rows, list):
        raise InputError(f"{file}: must be a list of rows, got {type(rows).__name__} (one object a line is .jsonl)")
    for number, row in enumerate(rows, 1):
        where = Where(str(file), number)
        if file.suffix == ".json":
            yield where, row
            continue
        try:
            yield where, json.loads(row)
        except (ValueError, RecursionError) as error:
            yield where, where.bad(None, f"not valid JSON: {error}")


def _local_files(name_or_path: str | Path, split: str) -> list[Path]:
    """The data files of a local path; none if it can only be the name of a hub dataset."""
    path = Path(name_or_path).expanduser()
    if path.is_file():
        if path.suffix not in FORMATS:
            raise InputError(f"{path}: dataset files are {', '.join(FORMATS)}, got {path.suffix or 'no suffix'!r}")
        return [path]
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix in FORMATS and file.is_file())
        files = [file for file in found if file.name.startswith(split)] or found
        if not files:
            raise InputError(f"{path}: no {', '.join(FORMATS)} file in this folder")
        return files
    if path.suffix in FORMATS or path.is_absolute() or str(name_or_path).startswith((".", "~")):
        raise InputError(f"{path}: no such dataset file or folder")
    return []


def _read_hub(name: str, split: str) -> Dataset:
    from datasets import load_dataset

    try:
        return load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: neither a local file or folder nor a readable hub dataset: {error}") from error


def _read_parquet(file: Path) -> Dataset:
    from datasets import Dataset

    try:
        return Dataset.from_parquet(glob.escape(str(file)))  # it takes patterns
    except Exception as error:  # datasets wraps whatever its reader met
        raise InputError(f"{file}: not a readable parquet file: {error.__cause__ or error}") from error
