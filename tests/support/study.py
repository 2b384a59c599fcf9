"""Rows of a pretended study."""

from __future__ import annotations

from typing import Any


def run(arm: str, seed: int, sampled: float, tokens: float = 100.0) -> dict[str, Any]:
    """The numbers of one run."""
    return {
        "arm": arm,
        "seed": seed,
        "seconds": 50.0,
        "reward": sampled - 0.1,
        "rewards": [0.2, sampled],
        "kept": 0.1,
        "sampled": sampled,
        "greedy": sampled + 0.05,
        "drift": 0.1,
        "drift_read": 0.5,
        "reads": 0.6,
        "adds": 0.9,
        "read": 0.09,
        "products": {
            "scoring": 2 * tokens,
            "forward": tokens,
            "backward": 0.3 * tokens,
            "tokens": tokens,
            "active": 0.1 * tokens,
        },
    }
