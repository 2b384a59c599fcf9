"""Stores what the demo's page sets a run beside: `python -m benchmarks.demo_baseline FOLDER ...`.

The folders are of finished runs of `vppo demo --algorithm dapo`, one for each seed.
"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path

from vppo.demo.baseline import FILE, Baseline, dump
from vppo.files import write_atomic
from vppo.progress import read_lines


def baseline_of(folders: list[Path]) -> Baseline:
    """What these runs came to.

    Raises:
        ValueError: A run is not DAPO's, or two differ in their number of steps.
    """
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    rewards = [[round(row["reward"], 4) for row in read_lines(folder / "metrics.jsonl")] for folder in folders]
    for folder, summary, own in zip(folders, summaries, rewards, strict=True):
        if summary["algorithm"] != "dapo" or len(own) != len(rewards[0]):
            raise ValueError(
                f"{folder}: got {len(own)} steps of {summary['algorithm']}, takes {len(rewards[0])} of dapo"
            )
    first = summaries[0]
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    about = f"vppo demo --algorithm dapo --seed S, {first['machine']}, {versions}, {datetime.now(UTC).date()}"
    return Baseline(
        [summary["seed"] for summary in summaries], [summary["accuracy_after"] for summary in summaries], rewards, about
    )


if __name__ == "__main__":
    write_atomic(FILE, dump(baseline_of([Path(folder) for folder in sys.argv[1:]])))
