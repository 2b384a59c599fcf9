"""Batches of rollouts: the share of active rows, and that gates on them catch what they are there for."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gate import judge_logprob
from benchmarks.gradient_truth import GradientJudge
from benchmarks.rollout import GROUP, Rollouts, make_plan, make_rollouts
from vppo.errors import InputError
from vppo_kernels import reference, vppo_advantages

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rollouts() -> Rollouts:
    return make_rollouts("tiny", 128, CPU, torch.float32, backward=True)


@pytest.mark.parametrize("active", [0.2, 0.4])
@pytest.mark.parametrize("shape", [(8, 16), (8, 128), (32, 256), (32, 512)], ids=str)
def test_the_wanted_share_of_rows_is_active(shape: tuple[int, int], active: float) -> None:
    plan = make_plan(*shape, active)
    length = shape[1]
    lengths = plan.mask.sum(1)
    assert lengths.max() == length and lengths.min() >= length // 2 and len(lengths.unique()) > 3
    groups = plan.advantages.view(-1, GROUP)
    assert int((groups == 0).all(1).sum()) == len(groups) // 4
    assert torch.allclose(groups.sum(1), torch.zeros(len(groups)), atol=1e-5)
    # the package agrees with the definition about which rows these are
    found = vppo_advantages(*(plan.advantages, plan.dependency, plan.mask), **plan.options)
    assert torch.equal(found != 0, plan.shaped != 0)
    assert float((plan.shaped != 0).double().mean()) == pytest.approx(active, abs=0.5 / length)


@pytest.mark.parametrize("active", [1.0, 0.4, 0.06, 0.02])
def test_any_share_of_rows_without_padding(active: float) -> None:
    plan = make_plan(8, 128, active, padded=False)
    assert plan.mask.all() and int((plan.shaped != 0).sum()) == pytest.approx(active * 8 * 128, abs=8)


def test_a_share_beyond_the_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="takes at most"):
        make_plan(32, 64, 0.9)
    with pytest.raises(InputError, match="multiple of 8"):
        make_rollouts("tiny", 100, CPU, torch.float32, backward=False)


def test_targets_come_from_the_distribution_and_their_logprobs_are_exact(rollouts: Rollouts) -> None:
    logits = rollouts.hidden.detach().double() @ rollouts.weight.detach().double().T
    assert torch.allclose(reference.logprob(logits, rollouts.targets), rollouts.exact, atol=1e-12)
    assert torch.allclose(logits.abs().amax(-1), rollouts.size)
    surprise = reference.entropy(logits).mean()
    assert float(-rollouts.exact.mean()) == pytest.approx(float(surprise), rel=0.3)
    assert torch.equal(rollouts.upstream.flatten().nonzero().squeeze(-1), rollouts.active)


def test_gradients_are_those_of_autograd_and_the_gate_sees_a_wrong_one(rollouts: Rollouts) -> None:
    upstream = rollouts.upstream.flatten()
    judge = GradientJudge(rollouts, lambda logprobs, rows: (logprobs * upstream[rows]).sum())
    hidden, weight = (leaf.detach().double().requires_grad_() for leaf in rollouts.leaves)
    value = (reference.logprob(hidden @ weight.T, rollouts.targets) * rollouts.upstream).sum()
    gradients = torch.autograd.grad(value, [hidden, weight])
    assert float(judge.truth.value) == pytest.approx(value.item())
    assert judge.truth.gradient_error(gradients[0].flatten(0, 1)[rollouts.active], gradients[1]) < 1e-12
    assert judge("ours", gradients) == (pytest.approx(0, abs=1e-6), "")
    assert 1e-8 < judge.plain_error < 1e-5

    scaled = (gradients[0], 1.0001 * gradients[1])
    assert judge("ours", scaled)[1] and not judge("peer", scaled)[1]
    assert judge("peer", (gradients[0], 2 * gradients[1]))[1]
    assert judge("ours", (gradients[0] * float("nan"), gradients[1]))[1]
    silent = gradients[0].clone()
    silent.flatten(0, 1)[upstream == 0] = 1e-9
    assert judge("ours", (silent, gradients[1]))[1] == "a gradient in rows that have none"


def test_the_gate_of_logprobs(rollouts: Rollouts) -> None:
    exact, size = rollouts.exact, rollouts.size
    assert judge_logprob("ours", exact.float(), exact, size)[1] == ""
    assert judge_logprob("ours", exact.float() - 1e-4, exact, size)[1]
    assert judge_logprob("peer", exact.float() - 1e-2, exact, size)[1] == ""
    assert judge_logprob("peer", exact.float() - 2.0, exact, size)[1]
