"""Whether a training set has any image to look at."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

COLUMNS = ("images", "image")  # where TRL looks, in this order


def missing_images(dataset: Any) -> str:
    """Why no row of a data set shows an image; "" where one does, or where that cannot be known without reading it.

    Args:
        dataset: With a column `images` (lists of them) or `image`, or with images among the parts of its `prompt`.
    """
    if not isinstance(dataset, Dataset):
        return ""
    name = next((name for name in COLUMNS if name in dataset.column_names), None)
    if (name is not None and _in_column(dataset, name)) or _in_prompts(dataset):
        return ""
    if name is not None:
        return f"its column {name!r} is empty in all of its {len(dataset)} rows"
    return f"it has neither of the columns 'images' and 'image', only {dataset.column_names}"


def _in_column(dataset: Dataset, name: str) -> bool:
    """Reads no picture, and no further than the first row that has one."""
    for table in dataset.select_columns([name]).with_format("arrow").iter(batch_size=1000):
        column = table[name]
        if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            found = pc.any(pc.greater(pc.list_value_length(column), 0)).as_py()
        else:
            found = column.null_count < len(column)
        if found:
            return True
    return False


def _in_prompts(dataset: Dataset) -> bool:
    if "prompt" not in dataset.column_names:
        return False
    for row in dataset.select_columns(["prompt"]):
        if isinstance(row["prompt"], str):
            return False
        contents = [message["content"] for message in row["prompt"] if isinstance(message.get("content"), list)]
        if any(part.get("type") == "image" for content in contents for part in content):
            return True
    return False
