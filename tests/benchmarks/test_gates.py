"""The gates where tensor cores multiply: ours are timed, each precision by its own bound."""

from __future__ import annotations

import pytest
import torch
from support.tensor_core import COMPILER, on_tensor_cores

from benchmarks.inputs import PRESETS, Shape
from benchmarks.pair import make_pair
from benchmarks.rollout import make_rollouts
from benchmarks.suites import divergence, logprob
from vppo_kernels import backends

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
CPU, WIDE = torch.device("cpu"), Shape(2048, 3584)


@pytest.mark.parametrize("suite", ["divergence", "logprob"])
def test_ours_pass_at_the_width_of_a_real_model(suite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "wide", WIDE)
    monkeypatch.setattr(backends, "available", lambda *_: ["triton"])  # what "auto" takes on a GPU
    with on_tensor_cores():
        if suite == "divergence":
            pair = make_pair("wide", 16, CPU, torch.bfloat16, backward=False)
            entrants, judge = divergence.contestants(pair, []), divergence.Judge(pair)
        else:
            rollouts = make_rollouts("wide", 16, CPU, torch.bfloat16, backward=False)
            entrants, judge = logprob.contestants(rollouts, []), logprob.Judge(rollouts)
        verdicts = {entrant.name: judge(entrant, entrant.prepare()) for entrant in entrants if entrant.role == "ours"}
    assert list(verdicts) == ["ours: triton", "ours: triton, exact"]
    assert all(verdict.right for verdict in verdicts.values()), verdicts
    default, exact = (verdict.error for verdict in verdicts.values())
    assert default is not None and exact is not None and 0 < default < 1 and 0 < exact < 1
