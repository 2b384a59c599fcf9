"""DAPO's runs of the demo with several seeds: what a run that trains on fewer tokens is set beside.

`dapo_runs.json` is made by `python -m benchmarks.demo_baseline` from the folders of those runs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = Path(__file__).with_name("dapo_runs.json")


@dataclass(frozen=True)
class Baseline:
    """What DAPO's runs came to.

    Attributes:
        seeds: Of the runs.
        accuracy: Of each run, greedy on the held-out strips after training.
        rewards: Of each run, the mean reward of every step's rollouts.
        about: Machine, versions, date and command.
    """

    seeds: Sequence[int]
    accuracy: Sequence[float]
    rewards: Sequence[Sequence[float]]
    about: str

    @property
    def steps(self) -> int:
        return len(self.rewards[0])


def load(file: Path = FILE) -> Baseline:
    """The stored runs."""
    return Baseline(**json.loads(file.read_text()))


def dump(baseline: Baseline) -> str:
    """The text of the stored file."""
    return json.dumps(asdict(baseline), ensure_ascii=False) + "\n"


def beside(algorithm: str, steps: int) -> Baseline | None:
    """The runs to set a run beside: none for DAPO itself, or for a run of another length."""
    return None if algorithm == "dapo" or steps != (baseline := load()).steps else baseline
