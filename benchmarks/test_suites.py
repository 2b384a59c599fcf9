"""The suites under pytest-benchmark: `pytest benchmarks`, with its tables, storage and comparisons, at the tiny size.

Cases, contestants and gates are those of `python -m benchmarks run`; that command times contestants in turn, weighs
their memory, and is what published numbers come from.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.contest import Case, Contestant, Setting
from benchmarks.peers import peers
from benchmarks.suites import load_suite, suite_names

CPU = torch.device("cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    entries = []
    for name in suite_names():
        suite = load_suite(name)
        for backward in suite.modes:
            case = suite.case(Setting("tiny", suite.rows("tiny", CPU)[0], backward, CPU), list(peers(name)))
            group = f"{name}, {'forward and backward' if backward else 'forward'}"
            entries += [pytest.param(case, c, group, id=f"{group}: {c.name}") for c in case.contestants]
    metafunc.parametrize(("case", "contestant", "group"), entries)


def test_contestant(case: Case, contestant: Contestant, group: str, benchmark: Any) -> None:
    try:
        call = contestant.prepare()
        verdict = case.judge(contestant, call)
    except (ImportError, NotImplementedError, RuntimeError) as error:
        if contestant.role == "ours":
            raise
        pytest.skip(f"{type(error).__name__}: {error}")
    if contestant.role == "peer" and not verdict.right:
        pytest.skip(f"wrong: {verdict.reason}")
    assert verdict.right, verdict.reason
    benchmark.group = group
    benchmark.extra_info.update(case.labels)
    benchmark(call)
