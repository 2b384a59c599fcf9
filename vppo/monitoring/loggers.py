"""Completion tables for the loggers of `report_to` that show such: Weights & Biases, Trackio and TensorBoard."""

from __future__ import annotations

import html
import importlib
import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from vppo.monitoring.completions import Row, plain_text

WITH_IMAGES = ("wandb", "trackio")
WITH_TEXT = "tensorboard"


def log_completions(
    names: Sequence[str], callbacks: Sequence[Any], key: str, step: int, rows: Sequence[Row], pictures: Sequence[Any]
) -> None:
    """Sends completions to every logger among `names` that can show a table; the others are left out.

    Messages are sent as text: Weights & Biases refuses a table whose messages differ in their parts.

    Args:
        names: What `report_to` says.
        callbacks: Of the trainer; the one of TensorBoard holds its writer.
        key: What the table is called there.
        step: The optimizer steps done.
        rows: Of a `CompletionLog`.
        pictures: The images of each row, or none at all.
    """
    if not rows:
        return
    table = pd.DataFrame([{"step": step, **row, **_texts(row)} for row in rows])
    for name in WITH_IMAGES:
        if name not in names:
            continue
        backend = importlib.import_module(name)
        if name == "wandb" and backend.run is None:
            continue
        shown = table
        if pictures:
            shown = table.assign(image=[[backend.Image(image) for image in images] for images in pictures])
        backend.log({key: backend.Table(dataframe=shown)})
    if WITH_TEXT in names:
        for callback in callbacks:
            writer = getattr(callback, "tb_writer", None)
            if writer is not None:
                writer.add_text(key, markdown(table), step)


def markdown(table: pd.DataFrame) -> str:
    """A table in Markdown, as TensorBoard renders it; cells are text, not markup."""
    lines = [list(table.columns), ["---"] * len(table.columns)]
    lines += [[_cell(value) for value in row] for row in table.itertuples(index=False)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _texts(row: Row) -> dict[str, str]:
    said = {name: plain_text(row[name]) for name in ("prompt", "completion")}
    return {
        name: texts[0][1] if len(texts) == 1 else "\n\n".join(f"{role}: {text}" for role, text in texts)
        for name, texts in said.items()
    }


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4g}"
    text = html.escape(str(value), quote=False)
    return "".join(f"\\{c}" if c in "\\`*_[]|#" else c for c in text).replace("\n", "<br>")
