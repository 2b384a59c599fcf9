"""The summary of a run as a table: what its keys are called, and its numbers with their units."""

from __future__ import annotations

import math
from typing import Any

from vppo.pages.page import NBSP, duration
from vppo.pages.plot import nats, percent

LABELS = {
    "accuracy_before": "accuracy before",
    "accuracy_after": "accuracy after",
    "held_out": "held-out questions",
    "dependency_digits": "dependency at digits read",
    "dependency_other": "dependency elsewhere",
    "seconds_warmup": "warm-up",
    "seconds_train": "training",
    "seconds_per_step": "a step",
    "peak_rss_mib": "peak memory",
    "warmup_steps": "warm-up steps",
}


def facts(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The summary as labels and values for a table: all its keys, and last, one by one, those of its dicts."""
    plain = [(key, value) for key, value in summary.items() if not isinstance(value, dict)]
    nested = [
        (name if key == "versions" else f"{key} {name}".replace("_", " "), _fact(name, entry))
        for key, value in summary.items()
        if isinstance(value, dict)
        for name, entry in value.items()
    ]
    return [(LABELS.get(key, key.replace("_", " ")), _fact(key, value)) for key, value in plain] + nested


def _fact(key: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return str(value)
    if key.startswith("accuracy"):
        return percent(value)
    if key.startswith("dependency"):
        return f"{nats(value)}{NBSP}nats"
    if key.startswith("seconds"):
        return duration(value)
    if key.endswith("_mib"):
        return f"{value:,.0f}{NBSP}MiB"
    return f"{value:,}" if isinstance(value, int) and key != "seed" else str(value)
