"""Real results through the harness: wrong values and gradients are caught, memory is counted, truth is exact."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.contest import Case, Contestant, Record, Role
from benchmarks.harness import MIN_ROUNDS, run_case
from benchmarks.pair import Pair, Truth, differentiated, make_pair
from benchmarks.report import CaseResult, Result, case_view
from benchmarks.suites.divergence import Judge
from vppo_kernels import linear_divergence, reference

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pair() -> Pair:
    return make_pair("tiny", 24, CPU, torch.float32, backward=True)


def entrant(
    pair: Pair, name: str, role: Role, change: Callable[[torch.Tensor], torch.Tensor] = lambda kl: kl
) -> Contestant:
    """Our own result, changed."""
    forward = differentiated(pair, lambda: change(linear_divergence(*pair.leaves).divergence))
    return Contestant(name, role, lambda: forward)


def run(pair: Pair, *contestants: Contestant) -> dict[str, Record]:
    case = Case({"backward": pair.backward}, list(contestants), Judge(pair))
    return {record.name: record for record in run_case(case, CPU, 0.0)}


def test_a_wrong_result_is_marked_with_its_error_and_not_timed(pair: Pair) -> None:
    records = run(
        pair,
        entrant(pair, "right", "ours"),
        entrant(pair, "one digit less", "ours", lambda kl: kl * (1 + 1e-3)),
        entrant(pair, "not a number", "ours", lambda kl: kl / 0 * 0),
        entrant(pair, "peer, one digit less", "peer", lambda kl: kl * (1 + 1e-3)),
        entrant(pair, "peer, something else", "peer", lambda kl: kl * 2),
    )
    assert {name: record.status for name, record in records.items()} == {
        "right": "timed",
        "one digit less": "wrong",
        "not a number": "wrong",
        "peer, one digit less": "timed",
        "peer, something else": "wrong",
    }
    for record in records.values():
        assert len(record.seconds) == (MIN_ROUNDS if record.status == "timed" else 0)
        assert record.error is not None and (record.error > 1) == (record.name != "right")
        assert (record.reason != "") == (record.status == "wrong")
    assert records["not a number"].error == float("inf")


def test_a_wrong_gradient_is_marked_too(pair: Pair) -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, weight: torch.Tensor) -> torch.Tensor:
            return weight.view_as(weight)

        @staticmethod
        def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
            return 2 * grad

    def forward() -> torch.Tensor:
        return linear_divergence(pair.hidden, pair.perturbed, Doubled.apply(pair.weight)).divergence

    call = differentiated(pair, forward)
    record = run(pair, Contestant("doubled", "peer", lambda: call))["doubled"]
    assert record.status == "wrong" and record.reason == "gradient error 1 of its norm"
    assert record.error is not None and record.error < 1


def test_one_that_raises_is_skipped_with_its_reason(pair: Pair) -> None:
    def missing() -> Callable[[], object]:
        raise ImportError("no such package\nand a long story")

    good, times = differentiated(pair, lambda: linear_divergence(*pair.leaves).divergence), iter(range(3))

    def breaks_later() -> object:
        if next(times) == 2:  # judged, weighed, and then
            raise torch.OutOfMemoryError("out of memory")
        return good()

    records = run(
        pair,
        Contestant("missing", "peer", missing),
        Contestant("breaks later", "peer", lambda: breaks_later),
        entrant(pair, "right", "ours"),
    )
    assert records["missing"].status == records["breaks later"].status == "skipped"
    assert records["missing"].reason == "ImportError: no such package"
    assert records["breaks later"].reason == "OutOfMemoryError: out of memory"
    assert records["missing"].seconds == records["breaks later"].seconds == []
    assert records["right"].status == "timed"


def test_a_result_without_a_floor_is_shown_and_stored(tmp_path: Path) -> None:
    labels = {"preset": "tiny", "rows": 1, "vocab": 1, "width": 1, "dtype": "float32", "backward": True}
    case = CaseResult(labels, [Record("floor", "floor", "", "skipped", "why"), Record("a", "peer", "", seconds=[1.0])])
    assert case.over_floor(case.records[1]) is None
    assert case_view(case).renderables
    result = Result("s", "cpu", ["tiny"], "2026-01-01T00:00:00+00:00", "c", {"device": "d"}, {"commit": None}, [case])
    result.save(tmp_path / "a.json")
    assert Result.load(tmp_path / "a.json") == result


def test_truth_is_the_definition() -> None:
    pair = make_pair("tiny", 24, CPU, torch.float32, backward=True)
    exact = Pair(*(leaf.double() for leaf in pair.leaves), backward=True)
    truth = Truth(pair)
    kl = reference.kl(exact.hidden @ exact.weight.T, exact.perturbed @ exact.weight.T)
    assert torch.allclose(truth.kl, kl, rtol=1e-10)
    gradients = torch.autograd.grad(kl.mean(), exact.leaves)
    assert truth.gradient_error(gradients) < 1e-8
    assert truth.gradient_error((gradients[0], gradients[1], 1.5 * gradients[2])) == pytest.approx(0.5)
    # one view alone: its own part of the weight's gradient
    with torch.no_grad():
        clean = exact.hidden @ exact.weight.T
    one_sided = torch.autograd.grad(reference.kl(clean, exact.perturbed @ exact.weight.T).mean(), exact.leaves[1:])
    assert truth.gradient_error((None, *one_sided)) < 1e-8


def test_a_sample_of_the_rows_is_judged_by_itself() -> None:
    """A mean over the sample, as a peer that returns a scalar gives it."""
    pair = make_pair("tiny", 200, CPU, torch.float32, backward=False)
    judge = Judge(pair)
    assert len(judge.truth.rows) == 64 and judge.truth.rows[[0, -1]].tolist() == [0, 199]

    def mean() -> torch.Tensor:
        return (linear_divergence(*pair.leaves).divergence * pair.upstream).sum()

    call = differentiated(pair, mean)
    verdict = judge(Contestant("mean", "peer", lambda: call), call)
    assert verdict.right and verdict.error is not None and verdict.error < 1
    assert torch.equal(pair.upstream, torch.full((200,), 1 / 200))


def test_workspace_counts_what_is_prepared_and_not_what_is_returned(pair: Pair) -> None:
    mib = 1 << 20

    def prepare() -> Callable[[], object]:
        held = torch.empty(3 * mib, dtype=torch.uint8)

        def call() -> object:
            temporary = torch.empty(2 * mib, dtype=torch.uint8)
            del temporary
            return torch.empty(8 * mib, dtype=torch.uint8) if len(held) else None

        return call

    floor = Contestant("floor", "floor", prepare)
    assert run(pair, floor)["floor"].workspace == 3 * mib
    passing = replace(floor, prepare=lambda: lambda: torch.zeros(mib).numel())
    assert run(pair, passing)["floor"].workspace == 4 * mib
