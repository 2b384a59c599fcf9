"""Suites on rollouts and scores at the tiny preset: everyone passes the gate, is weighed and timed."""

from __future__ import annotations

import pytest
import torch

from benchmarks.contest import Case, Setting
from benchmarks.harness import run_case
from benchmarks.peers import peers
from benchmarks.report import CaseResult, case_view
from benchmarks.scores import Scores
from benchmarks.suites import load_suite
from benchmarks.suites.selection import judge
from vppo.errors import InputError

CPU = torch.device("cpu")
COMPILED = {"compiled", "liger"}  # compiling takes half a minute: measured runs do that


def tiny(name: str, backward: bool) -> Case:
    suite = load_suite(name)
    setting = Setting("tiny", suite.rows("tiny", CPU)[0], backward, CPU)
    return suite.case(setting, [peer for peer in peers(name) if peer not in COMPILED])


@pytest.mark.parametrize(
    ("name", "backward", "timed", "skipped"),
    [
        ("logprob", False, {"plain", "trl", "ours: torch"}, {"cce"}),
        ("logprob", True, {"plain", "trl", "ours: torch"}, {"cce"}),
        ("loss", True, {"plain", "trl", "ours: torch"}, set()),
        ("distill", False, {"plain", "trl", "ours: torch"}, set()),
        ("distill", True, {"plain", "trl", "ours: torch"}, set()),
        ("selection", False, {"mask: plain", "mask: sort", "our mask: torch", "our advantages: torch"}, set()),
    ],
)
def test_everyone_passes_the_gate(name: str, backward: bool, timed: set[str], skipped: set[str]) -> None:
    case = tiny(name, backward)
    records = {record.name: record for record in run_case(case, CPU, 0.0)}
    assert {"floor", *timed, *skipped} <= records.keys()
    for record in records.values():
        if record.name in skipped:
            assert record.status == "skipped" and "GPU" in record.reason
            continue
        assert record.status == "timed" and len(record.seconds) == 3, record.reason
        if record.role == "ours":
            assert record.error is not None and record.error <= getattr(case.judge, "allowed", 1)
            assert (record.gradient_error is not None) == backward
    if "active_rows" in case.labels:
        assert case.labels["active_rows"] == pytest.approx(0.4 * case.labels["rows"], abs=4)
    case_view(CaseResult(case.labels, list(records.values())))


def test_liger_computes_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    chunked_loss = pytest.importorskip("liger_kernel.chunked_loss")
    suite = load_suite("loss")
    case = suite.case(Setting("tiny", 128, True, CPU), ["liger"])
    monkeypatch.setattr(torch, "compile", lambda function: function)
    (liger,) = (contestant for contestant in case.contestants if contestant.name == "liger")
    verdict = case.judge(liger, liger.prepare())
    assert chunked_loss and verdict.right and verdict.error is not None and verdict.error < 10, verdict.reason


def test_the_loss_has_no_forward_alone() -> None:
    with pytest.raises(InputError, match="--no-backward"):
        load_suite("loss").case(Setting("tiny", 128, False, CPU), [])


def test_one_other_token_is_wrong() -> None:
    scores, case = Scores(16, 64, CPU), tiny("selection", False)
    mask, shaped = (
        next(c for c in case.contestants if c.name == name) for name in ("our mask: torch", "our advantages: torch")
    )
    keep = scores.keep.float()
    assert judge(scores, mask, lambda: keep).right and judge(scores, shaped, lambda: scores.shaped.float()).right
    swapped = keep.clone()
    swapped[2, keep[2].bool().nonzero()[0]] = 0
    assert "1 tokens differ" in judge(scores, mask, lambda: swapped).reason
    assert not judge(scores, mask, lambda: 2 * keep).right
    assert not judge(scores, shaped, lambda: 1.001 * scores.shaped).right
