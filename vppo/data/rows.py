"""One row of a dataset: its problem, its answer and its images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vppo.data.answers import reference_answer
from vppo.data.bad_rows import Where
from vppo.data.columns import Columns, value_at
from vppo.data.conversations import Message, conversation
from vppo.data.options import DataOptions
from vppo.data.pictures import ImagePaths, stored_pictures


@dataclass(frozen=True)
class RowReader:
    """Reads the rows of one source.

    Attributes:
        columns: What is read.
        options: System prompt and instruction.
        paths: Where images may be.
    """

    columns: Columns
    options: DataOptions
    paths: ImagePaths

    def read(self, row: Mapping[str, Any], where: Where) -> tuple[list[Message], str | None, list[Any]]:
        """The conversation, the answer if there is one, and the images as they are stored.

        Raises:
            BadRowError: One of them cannot be used.
        """
        columns = self.columns
        answer = None
        if columns.answer is not None:
            answer = reference_answer(value_at(row, columns.answer), columns.answer, where)
        images = stored_pictures(value_at(row, columns.images), columns.images, where, self.paths)
        problem = value_at(row, columns.problem)
        return conversation(problem, len(images), columns.problem, where, self.options), answer, images


def image_paths(options: DataOptions, folder: Path, *, from_hub: bool = False, kind: Any = None) -> ImagePaths:
    """Where images may be; those of a hub dataset's own image column are wherever its cache put them."""
    paths = ImagePaths.of(options, folder)
    own = from_hub and "Image(" in repr(kind)
    return ImagePaths(paths.root, paths.anywhere or own)
