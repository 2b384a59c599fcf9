"""What the harness, the suites and the peers agree on: contestants, cases, verdicts, and the record of each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal, NamedTuple

import torch

from benchmarks.inputs import PRESETS

Role = Literal["floor", "ours", "peer"]
Call = Callable[[], Any]


class Elsewhere:
    """A call whose work is done in other processes, where its memory cannot be weighed."""


class Setting(NamedTuple):
    """One case of a suite: a preset (a head unless the suite says else), rows, device, and whether it has gradients."""

    preset: str
    rows: int
    backward: bool
    device: torch.device


@dataclass(frozen=True)
class Contestant:
    """One way to compute a case.

    Attributes:
        name: As the table shows it.
        role: "floor" is what no one can beat and everyone is set against; its result is not judged.
        prepare: Returns the call that is timed; may compile and allocate. Raising means: skipped, for that reason.
        note: What the reader has to know to compare it.
        cut: Whether its logits are sums that tensor cores cut off, which have a bound of their own.
    """

    name: str
    role: Role
    prepare: Callable[[], Call]
    note: str = ""
    cut: bool = False


@dataclass(frozen=True)
class Verdict:
    """How far a result lies from float64.

    Attributes:
        right: Whether it is timed.
        error: Largest error as a multiple of the bound that our own backends are held to; None if nothing is judged.
        gradient_error: The same for gradients.
        reason: What is wrong, in words.
    """

    right: bool
    error: float | None = None
    gradient_error: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Case:
    """What a suite makes of a setting.

    Attributes:
        labels: Everything that tells it from other cases and that a reader wants to know: sizes, dtypes.
        contestants: In the order of the table.
        judge: Calls a contestant's call once, or more often, and compares with the truth.
    """

    labels: dict[str, Any]
    contestants: list[Contestant]
    judge: Callable[[Contestant, Call], Verdict]


class Suite(ABC):
    """What is measured. A file in `suites/` has one, named `SUITE`.

    Attributes:
        name: Of its file.
        summary: A line for `list`.
        modes: Forward alone (False), forward with backward (True), or both.
        known: The presets that the user can name.
    """

    name: str
    summary: str
    modes: tuple[bool, ...] = (False, True)
    known: Mapping[str, Any] = PRESETS

    @abstractmethod
    def rows(self, preset: str, device: torch.device) -> list[int]:
        """Rows to measure unless the user says how many."""

    @abstractmethod
    def presets(self, device: torch.device) -> list[str]:
        """Presets to measure unless the user names some."""

    @abstractmethod
    def case(self, setting: Setting, peers: list[str]) -> Case:
        """Inputs, contestants (the floor, ours, and the named peers) and truth."""


@dataclass
class Record:
    """What became of a contestant in a case; a line of the table.

    Attributes:
        status: "timed", "wrong" (result outside the gate, timed only if asked for) or "skipped" (it raised).
        seconds: Every repetition, in order; round k of all contestants ran before round k + 1 of any.
        cpu_seconds: Of each of them the time that its processes had on all cores.
        workspace: Bytes beyond inputs and outputs; None where it did not run, or not in this process.
    """

    name: str
    role: Role
    note: str
    status: Literal["timed", "wrong", "skipped"] = "timed"
    reason: str = ""
    error: float | None = None
    gradient_error: float | None = None
    workspace: int | None = None
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return median(self.seconds)
