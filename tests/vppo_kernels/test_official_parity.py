"""The released recipe, written out in plain torch as its code does it, against `vppo_loss` with the same recipe."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vppo_kernels import TrajectoryStats, linear_vppo_loss, sampled_divergence, trajectory_stats, vppo_loss

KEEP, LOW, HIGH, DUAL, PENALTY, SCALE_MIN = 0.4, 0.2, 0.28, 3.0, 0.06, 0.9


def official_dependency(logprobs: Tensor, perturbed: Tensor) -> Tensor:
    d = torch.clamp(perturbed - logprobs, min=-20.0, max=20.0)
    return torch.clamp(torch.exp(d) - d - 1, min=0.0, max=10.0)


def official_filter(dependency: Tensor, mask: Tensor) -> Tensor:
    keep = torch.zeros_like(dependency)
    for row in range(dependency.shape[0]):
        valid = mask[row].nonzero().flatten()
        if len(valid):
            count = max(1, math.ceil(KEEP * len(valid)))
            # its order among equals is arbitrary; the clamp makes equals, so let the earlier win here
            order = torch.sort(dependency[row, valid], descending=True, stable=True).indices
            keep[row, valid[order[:count]]] = 1
    return keep


def official_scale(dependency: Tensor, mask: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Minimum and maximum are those of the device's mini-batch, the mean that of this micro-batch."""
    if high - low <= 1e-6:
        return torch.ones(len(mask), dtype=dependency.dtype)
    scores = (dependency * mask).sum(1) / mask.sum(1)
    unit = (scores - low) / (high - low)
    top = SCALE_MIN + (1 - SCALE_MIN) / unit.mean()
    return SCALE_MIN + unit * (top - SCALE_MIN)


def official_loss(
    logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, keep: Tensor, alpha: Tensor
) -> Tensor:
    advantages = advantages.unsqueeze(1) * alpha.unsqueeze(1)
    log_ratio = torch.clamp(logprobs - old, -20.0, 20.0)
    ratio = torch.exp(log_ratio)
    clipped = torch.exp(torch.clamp(log_ratio, math.log(1 - LOW), math.log(1 + HIGH)))
    higher = torch.max(-advantages * ratio, -advantages * clipped)
    lower = torch.min(higher, -advantages * DUAL)
    surrogate = torch.where(advantages < 0, lower, higher)
    tokens = mask.sum()  # all response tokens, not only those kept
    return (surrogate * keep).sum() / tokens + PENALTY * (-logprobs * mask).sum() / tokens


def mini_batch(seed: int) -> dict[str, Tensor]:
    """Eight trajectories of up to 15 tokens with ratios on both sides of every clip."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([15, 1, 7, 10, 3, 15, 12, 5])
    mask = (torch.arange(15) < lengths.unsqueeze(1)).double()
    logprobs = -torch.rand(8, 15, generator=g, dtype=torch.float64) * 4
    noise = torch.randn(2, 8, 15, generator=g, dtype=torch.float64)
    return dict(
        logprobs=logprobs,
        old=logprobs + 0.6 * noise[0],
        perturbed=(logprobs - 3 * noise[1]).clamp_max(0),
        advantages=torch.randn(8, generator=g, dtype=torch.float64),
        mask=mask,
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [2, 4, 8])
def test_released_recipe(size: int, seed: int) -> None:
    given = mini_batch(seed)
    dependency = sampled_divergence(given["logprobs"], given["perturbed"], kind="k3")
    assert torch.allclose(dependency, official_dependency(given["logprobs"], given["perturbed"]), atol=1e-12)
    whole = trajectory_stats(dependency, given["mask"])
    means = (dependency * given["mask"]).sum(1) / given["mask"].sum(1)
    for start in range(0, 8, size):
        part = {name: value[start : start + size] for name, value in given.items()}
        scores = dependency[start : start + size]
        logprobs = part["logprobs"].clone().requires_grad_()
        keep = official_filter(scores, part["mask"])
        alpha = official_scale(scores, part["mask"], means.min(), means.max())
        expected = official_loss(logprobs, part["old"], part["advantages"], part["mask"], keep, alpha)

        mean = trajectory_stats(scores, part["mask"]).mean
        stats = TrajectoryStats(whole.minimum, whole.maximum, mean)
        ours, metrics = vppo_loss(
            logprobs,
            part["old"],
            part["advantages"],
            part["mask"],
            scores,
            keep_ratio=KEEP,
            clip_low=LOW,
            clip_high=HIGH,
            clip_dual=DUAL,
            nll_coef=PENALTY,
            stats=stats,
        )
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
        gradients = [torch.autograd.grad(loss, logprobs)[0] for loss in (ours, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
        assert math.isclose(metrics["kept_fraction"], float(keep.sum() / part["mask"].sum()), rel_tol=1e-6)
        assert torch.isclose(metrics["alpha_max"].double(), alpha.max())


def test_the_inputs_meet_every_clip() -> None:
    met = set()
    for seed in range(3):
        given = mini_batch(seed)
        dependency = official_dependency(given["logprobs"], given["perturbed"])
        _, metrics = vppo_loss(
            given["logprobs"], given["old"], given["advantages"], given["mask"], dependency, clip_dual=DUAL
        )
        assert metrics["alpha_min"] < 1 < metrics["alpha_max"]
        met |= {side for side in ("low", "high", "dual") if metrics[f"clip_fraction_{side}"] > 0}
        met |= {"k3"} if (dependency == 10).any() else set()
    assert met == {"low", "high", "dual", "k3"}


def test_released_recipe_where_the_spread_vanishes() -> None:
    given = mini_batch(0)
    scores = torch.full((8, 15), 0.25, dtype=torch.float64)
    keep = (
        torch.arange(15) < torch.ceil(KEEP * given["mask"].sum(1, keepdim=True))
    ).double()  # among equals, the earlier
    expected = official_loss(
        given["logprobs"], given["old"], given["advantages"], given["mask"], keep, torch.ones(8, dtype=torch.float64)
    )
    ours, _ = vppo_loss(
        given["logprobs"], given["old"], given["advantages"], given["mask"], scores, clip_dual=DUAL, nll_coef=PENALTY
    )
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_released_recipe_from_hidden_states(backend_float64: str) -> None:
    given = mini_batch(1)
    g = torch.Generator().manual_seed(2)
    hidden = torch.randn(8, 15, 6, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(30, 6, generator=g, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(30, (8, 15), generator=g)
    logprobs = (hidden @ weight.T).log_softmax(-1).gather(2, targets.unsqueeze(2)).squeeze(2)
    old, perturbed = logprobs.detach() + 0.4 * given["old"].sin(), logprobs.detach() - given["perturbed"].abs()
    dependency = official_dependency(logprobs.detach(), perturbed)
    means = (dependency * given["mask"]).sum(1) / given["mask"].sum(1)
    alpha = official_scale(dependency, given["mask"], means.min(), means.max())
    keep = official_filter(dependency, given["mask"])
    expected = official_loss(logprobs, old, given["advantages"], given["mask"], keep, alpha)
    ours, _ = linear_vppo_loss(
        hidden,
        weight,
        targets,
        old,
        given["advantages"],
        given["mask"],
        dependency,
        clip_dual=DUAL,
        nll_coef=PENALTY,
        backend=backend_float64,
    )
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)
    for a, b in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in (ours, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
