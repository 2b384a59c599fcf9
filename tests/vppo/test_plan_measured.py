"""Planned memory beside what training takes: one process, and two that share a model."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.peaks import CASES, SHARDED, measured, measured_by_two, planned

from vppo.plan.estimate import estimate

WITHIN = 0.1


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_one_process(case: str, tmp_path: Path) -> None:
    found = measured(tmp_path, 1, **CASES[case])
    peaks = estimate(planned(tmp_path, 1, **CASES[case])).peaks
    for phase in ("scoring", "training pass"):
        assert sum(peaks[phase].values()) == pytest.approx(found[phase], rel=WITHIN), phase


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, int]]]:
    return measured_by_two(tmp_path_factory.mktemp("peaks"))


@pytest.mark.slow
@pytest.mark.parametrize("case", SHARDED)
def test_two_processes(case: str, ranks: list[dict[str, dict[str, int]]], tmp_path: Path) -> None:
    peaks = estimate(planned(tmp_path, 2, **SHARDED[case])).peaks
    for found in (rank[case] for rank in ranks):
        for phase in ("scoring", "training pass"):
            assert sum(peaks[phase].values()) == pytest.approx(found[phase], rel=WITHIN), phase
