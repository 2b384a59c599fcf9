"""Completions on a terminal: each prompt once, its completions below it, their numbers in line under each."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from typing import Any

from rich.columns import Columns
from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule
from rich.text import Text

from vppo.monitoring.completions import Row, plain_text

WIDTH = 6  # of a number, so that those of all completions stand in line
FEW = 8  # of an evaluation's completions, where the config does not say how many


def chosen(rows: Sequence[Row], count: int | None, step: int) -> list[Row]:
    """`count` rows of a generation, drawn anew at every step but in their order; None takes all."""
    if count is None or count >= len(rows):
        return list(rows)
    return [rows[index] for index in sorted(random.Random(step).sample(range(len(rows)), max(0, count)))]


def show(console: Console, rows: Sequence[Row], title: str) -> None:
    """Prints completions.

    Args:
        console: Where to; what is printed fits its width.
        rows: Of a `CompletionLog`; those of one prompt follow each other.
        title: Of the whole.
    """
    if not rows:
        return
    console.print(Rule(title, style="bold"))
    for _, group in itertools.groupby(rows, key=lambda row: plain_text(row["prompt"])):
        answers = list(group)
        console.print(_conversation(answers[0]["prompt"], "yellow"))
        for row in answers:
            console.print(Padding(_conversation(row["completion"], "green"), (1, 0, 0, 2)))
            console.print(Padding(Columns(_numbers(row), equal=True, padding=(0, 3)), (0, 0, 0, 2)))
        console.print()


def _conversation(messages: Any, style: str) -> Text:
    said = plain_text(messages)
    lines = Text(style=style)
    for number, (role, text) in enumerate(said):
        if number:
            lines.append("\n")
        if role and not (len(said) == 1 and role == "assistant"):
            lines.append(f"{role}: ", style="bold")
        lines.append(_printable(text) or "(empty)", style="" if text else "italic")
    return lines


def _numbers(row: Row) -> list[Text]:
    named = [(name, value) for name, value in row.items() if name not in ("prompt", "completion")]
    return [Text.assemble((f"{name} ", "dim"), (_short(value), "cyan")) for name, value in named]


def _short(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-".rjust(WIDTH)
    return f"{value:.3g}".rjust(WIDTH) if isinstance(value, int | float) else _printable(str(value))


def _printable(text: str) -> str:
    """A sampled text may hold anything: what would steer the terminal is shown as a box."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text).rstrip()
