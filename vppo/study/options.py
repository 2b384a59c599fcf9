"""What a study is told, and where its parts lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vppo.errors import InputError
from vppo.study.arms import ARMS, BASE, arms_of

TASKS = ("narrated", "guess")
STEPS, SEEDS, HELD_OUT = 100, 10, 256
WARM_TARGET = 0.01  # nats per token, so that of four digits of sums in an answer hardly one is wrong
WARM_STEPS = 600
WARM_UP = {"warm_target": WARM_TARGET, "warm_steps": WARM_STEPS}


@dataclass(frozen=True)
class StudyOptions:
    """What `vppo study` was asked for.

    Attributes:
        out: Folder of the study.
        arms: Names of `vppo.study.arms.ARMS`; the differences are to "dapo", which is among them.
        seeds: How many, from 0.
        jobs: Runs side by side, each on one thread.
        task: "narrated" or "guess".
        steps: Of reinforcement, each of 8 prompts x 8 rollouts.
        held_out: Questions by which policies are measured.

    Raises:
        InputError: One of them cannot be used; the message names it, what it got and what it takes.
    """

    out: Path
    arms: Sequence[str] = tuple(ARMS)
    seeds: int = SEEDS
    jobs: int = 2
    task: str = "narrated"
    steps: int = STEPS
    held_out: int = HELD_OUT

    def __post_init__(self) -> None:
        arms_of(self.arms)
        if BASE not in self.arms:
            raise InputError(
                f"--arms: got {','.join(self.arms)}, takes {BASE} among them: it is what others are set against"
            )
        for name in ("seeds", "jobs", "steps", "held_out"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')}: got {getattr(self, name)}, takes a number from 1")
        if self.task not in TASKS:
            raise InputError(f"--task: got {self.task!r}, takes {' or '.join(TASKS)}")

    @property
    def identity(self) -> dict[str, Any]:
        """What the runs of a folder have in common; arms and seeds may be added."""
        return {"study": self.task, "steps": self.steps, "held_out": self.held_out, **WARM_UP}

    def warm_folder(self, seed: int) -> Path:
        """Of the policy that the arms of a seed begin with."""
        return self.out / "warm" / f"seed-{seed}"

    def run_file(self, arm: str, seed: int) -> Path:
        """Of the numbers of one run."""
        return self.out / "runs" / f"{arm}-{seed}.json"
