"""The same contestants under pytest-benchmark: its statistics, its storage, its comparison of runs.

    python -m pytest benchmarks --preset tiny --benchmark-autosave

Contestants run one after the other here; `python -m benchmarks run` times them in turn, which is the fairer contest.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.contest import Case, Setting, load_suite, peers
from benchmarks.harness import enter
from benchmarks.timing import synchronised


@lru_cache(maxsize=1)
def _case(suite: str, setting: Setting) -> Case:
    return load_suite(suite).case(setting, list(peers(suite)))


def test_contestant(benchmark: BenchmarkFixture, suite: str, setting: Setting, contestant: str) -> None:
    case = _case(suite, setting)
    entrant = next(c for c in case.contestants if c.name == contestant)
    record, call = enter(entrant, case, setting.device)
    if call is None and record.status == "skipped":
        pytest.skip(record.reason)
    assert call is not None, record.reason
    benchmark.group = f"{suite}, {case.labels}"
    benchmark.extra_info.update(workspace=record.workspace, error=record.error, gradient_error=record.gradient_error)
    benchmark(synchronised(call, setting.device))
