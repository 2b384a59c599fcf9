"""Problems that are read one by one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from PIL import Image

from vppo.data.bad_rows import BadRowError, Where
from vppo.data.columns import Columns, Names, value_at
from vppo.data.conversations import IMAGE_MARK, texts
from vppo.data.files import Source, read_sources
from vppo.data.options import DataOptions
from vppo.data.pictures import ImagePaths, decode
from vppo.data.rows import RowReader
from vppo.errors import InputError


@dataclass(frozen=True)
class Problem:
    """A question about images.

    Attributes:
        prompt: Messages as TRL and chat templates take them.
        images: Its pictures, RGB; none for a text-only problem.
        answer: The reference answer, or None where the data has none.
    """

    prompt: list[dict[str, Any]]
    images: list[Image.Image]
    answer: str | None

    @property
    def question(self) -> str:
        """The user's text, as a person reads it."""
        return "\n".join(texts([message for message in self.prompt if message["role"] == "user"]))


@dataclass(frozen=True)
class _Part:
    """The rows of one source, and who reads them."""

    name: str
    rows: Any
    names: Names
    reader: RowReader


class Problems:
    """Problems that are read when they are asked for, so that a broken one spares the others.

    The rows are those of `load_training_data`, with two liberties: the answer may be missing, and a row may have no
    image. Messages whose contents are texts are used as they are.

    Args:
        data: As `load_training_data` takes it, or rows in memory, whose images may be PIL images, anywhere.
        options: How they are read.
        **changes: Fields of `DataOptions` that are other than in `options`.

    Raises:
        InputError: A missing file, or one that lacks a column; the message names those it has.
    """

    def __init__(
        self, data: str | Path | Sequence[dict[str, Any]], options: DataOptions | None = None, **changes: Any
    ) -> None:
        self.options = replace(options or DataOptions(), **changes)
        self._parts: list[_Part] = []
        if isinstance(data, str | Path):
            for source in read_sources(data, self.options.split):
                self._parts.append(self._of_source(source))
        else:
            if not len(data):
                raise InputError("data: it has no rows")
            names = _sorted(Names.of_rows(data))
            columns = Columns.find(names, self.options, "data")
            paths = ImagePaths.of(self.options, Path())
            anywhere = ImagePaths(paths.root, anywhere=True)  # whoever holds rows in memory chose their paths
            self._parts.append(_Part("data", data, names, RowReader(columns, self.options, anywhere)))
        self._ends = list(accumulate(len(part.rows) for part in self._parts))

    def _of_source(self, source: Source) -> _Part:
        rows: Any = source.rows
        features: Mapping[str, Any] = {}
        if isinstance(rows, list):
            names = _sorted(Names.of_rows(row for row in rows if isinstance(row, dict)))
        else:
            features, rows = rows.features, rows.with_format("arrow")  # pictures stay encoded
            names = _sorted(Names.of_features(features))
        columns = Columns.find(names, self.options, source.name)
        return _Part(source.name, rows, names, RowReader.of(source, columns, self.options, features))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Problem:
        """Reads one row.

        Raises:
            BadRowError: It has no question, or an image that cannot be read; the message names file, row and column.
            IndexError: There is no such row.
        """
        part, row, where = self._row(index)
        prompt, answer, stored = part.reader.read(row, where)
        images = []
        for item in stored:
            try:
                images.append(decode(item, self.options.image_pixel_limit))
            except InputError as error:
                raise where.bad(part.reader.columns.images, str(error)) from error
        given = value_at(row, part.reader.columns.problem)
        return Problem(given if _of_plain_texts(given) else prompt, images, answer)

    def _row(self, index: int) -> tuple[_Part, dict[str, Any], Where]:
        """One row as it is stored, and where that is."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number = next(number for number, end in enumerate(self._ends) if index < end)
        part = self._parts[number]
        inside = index - self._ends[number] + len(part.rows)
        row = part.rows[inside]
        if isinstance(row, BadRowError):
            raise row
        return part, row if isinstance(row, dict) else row.to_pylist()[0], Where(part.name, inside + 1)

    def without_images(self, index: int) -> Problem:
        """One row as `[index]` reads it, its pictures left out and undecoded."""
        part, row, where = self._row(index)
        prompt, answer, _ = part.reader.read(row, where)
        return Problem(prompt, [], answer)

    def check_answered(self) -> str:
        """Reads every row, though no picture is decoded.

        Returns:
            A fingerprint of all questions and answers, and of the pictures as they are stored (of a path, its text).

        Raises:
            BadRowError: A row cannot be used or has no answer; the message names file, row and column.
        """
        found = hashlib.sha256()
        for index in range(len(self)):
            part, row, where = self._row(index)
            prompt, answer, stored = part.reader.read(row, where)
            if answer is None:
                raise where.bad(part.reader.columns.need_answer(part.names, part.name), "it is empty")
            columns = part.reader.columns
            for column, text in ((columns.problem, "\n".join(texts(prompt))), (columns.answer, answer)):
                try:
                    text.encode()
                except UnicodeEncodeError as error:  # what no tokenizer and no table takes
                    raise where.bad(column, f"takes text in Unicode: {error.reason}, got {text!r:.80}") from None
            pictures = [item if isinstance(item, dict) else {"bytes": item.tobytes(), "path": None} for item in stored]
            for picture in pictures:
                if picture["path"] is not None and not os.path.isfile(picture["path"]):
                    raise where.bad(part.reader.columns.images, f"{picture['path']}: no such file")
            for content in (repr(prompt), answer, *(picture["bytes"] or picture["path"] for picture in pictures)):
                data = content if isinstance(content, bytes) else content.encode(errors="surrogatepass")
                found.update(b"%d " % len(data) + data)
        return found.hexdigest()[:16]

    def column(self, name: str) -> list[Any] | None:
        """What each row has in a column; None where a part of the data has no such column."""
        found: list[Any] = []
        for part in self._parts:
            if name not in part.names.columns:
                return None
            if isinstance(part.rows, Sequence):
                found += [row.get(name) if isinstance(row, dict) else None for row in part.rows]
            else:
                found += part.rows.select_columns(name)[:][name].to_pylist()
        return found

    @cached_property
    def ids(self) -> dict[str, int] | None:
        """The row of each value of the column `id`, as text; None where the data has no such column.

        Raises:
            InputError: Two rows have the same.
        """
        column = self.column("id")
        if column is None:
            return None
        found = list(map(str, column))
        rows = {value: row for row, value in reversed(list(enumerate(found)))}
        if len(rows) < len(found):
            twice = next(value for row, value in enumerate(found) if rows[value] != row)
            raise InputError(f"{self._parts[0].name}: column 'id': {twice!r} is there twice, takes one row of each")
        return rows


def _sorted(names: Names) -> Names:
    return replace(names, columns=sorted(names.columns))


def _of_plain_texts(value: Any) -> bool:
    """Whether these are messages that TRL takes as they are: it puts images before the user's first text."""
    return isinstance(value, list) and all(
        isinstance(message["content"], str) and IMAGE_MARK not in message["content"] for message in value
    )
