"""One row of a dataset: its problem, its answer and its images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vppo.data.answers import reference_answer
from vppo.data.bad_rows import Where
from vppo.data.columns import Columns, value_at
from vppo.data.conversations import Message, conversation
from vppo.data.files import Source
from vppo.data.options import DataOptions
from vppo.data.pictures import ImagePaths, stored_pictures


@dataclass(frozen=True)
class RowReader:
    """Reads the rows of one source.

    Attributes:
        columns: What is read.
        options: System prompt and instruction.
        paths: Where images may be.
        narrow: The type of the answer's column where it is a float of 16 or 32 bits.
    """

    columns: Columns
    options: DataOptions
    paths: ImagePaths
    narrow: str | None = None

    @classmethod
    def of(cls, source: Source, columns: Columns, options: DataOptions, features: Mapping[str, Any]) -> RowReader:
        """For the rows of a source; `features` are those of its dataset, if it is one."""
        paths = ImagePaths.of(options, source.folder)
        if source.from_hub and "Image(" in repr(features.get(columns.images)):
            paths = replace(paths, anywhere=True)  # they are wherever the cache of the hub's datasets put them
        kind = getattr(features.get(columns.answer or ""), "dtype", None)
        return cls(columns, options, paths, kind if kind in ("float16", "float32") else None)

    def read(self, row: Mapping[str, Any], where: Where) -> tuple[list[Message], str | None, list[Any]]:
        """The conversation, the answer if there is one, and the images as they are stored.

        Raises:
            BadRowError: One of them cannot be used.
        """
        columns = self.columns
        answer = None
        if columns.answer is not None:
            value = value_at(row, columns.answer)
            if self.narrow and isinstance(value, float):
                value = float(str(np.dtype(self.narrow).type(value)))  # 0.1, and not 0.10000000149011612
            answer = reference_answer(value, columns.answer, where)
        images = stored_pictures(value_at(row, columns.images), columns.images, where, self.paths)
        problem = value_at(row, columns.problem)
        return conversation(problem, len(images), columns.problem, where, self.options), answer, images
