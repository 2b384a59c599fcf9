"""The contest: every contestant of a case is judged, weighed, warmed up, and then timed in turn with all others."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable

import torch

from benchmarks.contest import Call, Case, Contestant, Elsewhere, Record
from benchmarks.memory import Scale
from benchmarks.timing import Stopwatch, cpu_seconds

MIN_ROUNDS, MAX_ROUNDS = 3, 100


def run_case(
    case: Case,
    device: torch.device,
    seconds: float,
    report: Callable[[str, float], None] = lambda what, share: None,
    time_wrong: bool = False,
) -> list[Record]:
    """One record per contestant, in their order.

    Args:
        case: What is measured.
        device: Where.
        seconds: Time for the timed rounds; at least `MIN_ROUNDS` are run, whatever they take.
        report: Told what happens now and which share of the case is done.
        time_wrong: Time what is wrong as well.
    """
    records, calls = [], []
    for index, contestant in enumerate(case.contestants):
        report(f"checking {contestant.name}", 0.5 * index / len(case.contestants))
        record, call = _enter(contestant, case, device, time_wrong)
        records.append(record)
        if call is not None:
            calls.append((record, call))
    _time(calls, Stopwatch(device), seconds, report)
    for record in records:
        if record.status == "skipped":
            record.seconds, record.cpu_seconds = [], []
    return records


def _enter(
    contestant: Contestant, case: Case, device: torch.device, time_wrong: bool
) -> tuple[Record, Call | None]:  # fmt: skip
    """Judge and weigh a contestant, which warms it up; its call, if it may be timed."""
    record = Record(contestant.name, contestant.role, contestant.note)
    call: Call | None = None
    try:
        scale = Scale(device)
        call = scale.prepare(contestant.prepare)
        verdict = case.judge(contestant, call)
        record.error, record.gradient_error = verdict.error, verdict.gradient_error
        if not verdict.right:
            record.status, record.reason = "wrong", verdict.reason
            call = call if time_wrong else None
        if call is not None:
            record.workspace = None if isinstance(call, Elsewhere) else scale.workspace(call)
    except Exception as error:  # out of memory, a missing package, an unsupported device: all of them its own affair
        call = None
        _skip(record, error)
    _tidy(device)
    return record, call


def _time(
    calls: list[tuple[Record, Call]], stopwatch: Stopwatch, seconds: float, report: Callable[[str, float], None]
) -> None:
    """Rounds in which each call is timed once, so that a slow minute of the machine hits all of them alike."""
    rounds = MIN_ROUNDS
    for done in itertools.count():
        if done == 1:
            spent = sum(record.seconds[0] for record, _ in calls if record.seconds)
            rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / spent))) if spent else 0
        if done >= rounds:
            return
        report(f"round {done + 1} of {rounds if done else '?'}", 0.5 + 0.5 * done / rounds)
        for record, call in list(calls):
            try:
                before = cpu_seconds()
                record.seconds.append(stopwatch.seconds(call))
                record.cpu_seconds.append(cpu_seconds() - before)
            except Exception as error:
                calls.remove((record, call))
                _skip(record, error)
                _tidy(stopwatch.device)


def _skip(record: Record, error: Exception) -> None:
    first_line = next(iter(str(error).strip().splitlines()), "")
    record.status, record.reason = "skipped", f"{type(error).__name__}: {first_line}".removesuffix(": ")
    error.__traceback__ = None  # its frames hold tensors


def _tidy(device: torch.device) -> None:
    if (
        device.type == "cuda"
    ):  # the CPU's allocator gives back by itself, and a collection takes a good part of a second
        gc.collect()
        torch.cuda.empty_cache()
