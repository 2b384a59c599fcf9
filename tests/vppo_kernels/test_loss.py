"""The loss: formulas by hand, folding, parity with the released code, and the same from hidden states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vppo_kernels as vk
from vppo_kernels import reference

NAN = float("nan")
B, T, D, V = 6, 9, 8, 60


@pytest.fixture
def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(B, T, generator=generator) < 0.8
    mask[4] = False
    old = -3 * torch.rand(B, T, generator=generator).double()
    return {
        "logprobs": (old + 0.4 * torch.randn(B, T, generator=generator)).requires_grad_(),
        "old_logprobs": old,
        "advantages": torch.randn(B, generator=generator).double(),
        "mask": mask,
        "dependency": torch.rand(B, T, generator=generator).double(),
    }


def surrogate(batch: dict[str, Tensor], dual: float | None = None) -> tuple[Tensor, Tensor]:
    """Per-token loss and shaped advantages by the plain definitions."""
    keep = reference.topk_mask(batch["dependency"], batch["mask"], 0.4)
    alpha = reference.trajectory_scale(batch["dependency"], batch["mask"])
    shaped = (batch["advantages"] * alpha).unsqueeze(1) * keep
    return reference.clipped_loss(batch["logprobs"], batch["old_logprobs"], shaped, clip_dual=dual), shaped


def means(values: Tensor, mask: Tensor) -> dict[str, Tensor]:
    total, length = (values * mask).sum(), mask.sum(1)
    rows = (values * mask).sum(1)
    return {
        "token-mean": total / mask.sum(),
        "token-sum": total,
        "seq-mean-token-sum": rows.sum() / (length > 0).sum(),
        "seq-mean-token-mean": (rows / length.clamp_min(1)).sum() / (length > 0).sum(),
        "seq-mean-token-sum-norm": total / T,
    }


@pytest.mark.parametrize("dual", [None, 1.1])
@pytest.mark.parametrize("loss_agg", list(means(torch.zeros(1, 1), torch.ones(1, 1))))
def test_every_aggregation(batch: dict[str, Tensor], loss_agg: str, dual: float | None) -> None:
    loss, _ = vk.vppo_loss(**batch, loss_agg=loss_agg, clip_dual=dual)
    expected = means(surrogate(batch, dual)[0], batch["mask"])[loss_agg]
    assert torch.allclose(loss, expected, rtol=1e-12)
    (gradient,) = torch.autograd.grad(loss, batch["logprobs"])
    assert torch.allclose(gradient, torch.autograd.grad(expected, batch["logprobs"])[0], atol=1e-14)
    assert torch.autograd.gradcheck(lambda x: vk.vppo_loss(x, **_rest(batch), loss_agg=loss_agg)[0], batch["logprobs"])


def _rest(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "logprobs"}


def test_other_terms_and_no_reduction(batch: dict[str, Tensor]) -> None:
    entropy, ref = torch.rand(B, T).double(), batch["old_logprobs"] - 0.2
    weights = 0.5 + torch.rand(B, T).double()
    options: dict[str, Any] = {"nll_coef": 0.06, "entropy": entropy, "entropy_coef": 0.02, "kl_coef": 0.1}
    loss, metrics = vk.vppo_loss(**batch, **options, ref_logprobs=ref, is_weights=weights, loss_agg="none")
    gap = ref - batch["logprobs"]
    expected = (
        surrogate(batch)[0] * weights
        - 0.06 * batch["logprobs"]
        - 0.02 * entropy
        + 0.1 * (gap.exp() - gap - 1)
    ) * batch["mask"]  # fmt: skip
    assert torch.allclose(loss, expected, rtol=1e-10)
    assert {"ref_kl", "entropy_mean"} <= metrics.keys()


def test_folding_is_exact(batch: dict[str, Tensor]) -> None:
    """Shaped advantages in a loss that knows nothing of VPPO, against mask and factor applied to the loss itself."""
    folded = vk.vppo_advantages(batch["advantages"], batch["dependency"], batch["mask"])
    plain = {name: value for name, value in batch.items() if name not in ("advantages", "dependency")}
    loss, _ = vk.vppo_loss(advantages=folded, **plain)
    keep = reference.topk_mask(batch["dependency"], batch["mask"], 0.4)
    alpha = reference.trajectory_scale(batch["dependency"], batch["mask"])
    unshaped = reference.clipped_loss(batch["logprobs"], batch["old_logprobs"], batch["advantages"].unsqueeze(1))
    expected = (unshaped * alpha.unsqueeze(1) * keep).sum() / batch["mask"].sum()
    assert torch.allclose(loss, expected, rtol=1e-12)
    gradients = [torch.autograd.grad(x, batch["logprobs"])[0] for x in (loss, expected)]
    assert torch.allclose(*gradients, atol=1e-15)


def test_micro_batches_add_up_to_the_batch(batch: dict[str, Tensor]) -> None:
    stats = vk.trajectory_stats(batch["dependency"], batch["mask"])
    whole, _ = vk.vppo_loss(**batch)
    parts = [
        vk.vppo_loss(**{n: v[i : i + 2] for n, v in batch.items()}, stats=stats, denominator=batch["mask"].sum())[0]
        for i in (0, 2, 4)
    ]
    assert torch.allclose(sum(parts), whole)  # type: ignore[arg-type]


def test_padding_may_hold_anything(batch: dict[str, Tensor]) -> None:
    poisoned = {
        name: torch.where(batch["mask"], value.detach(), NAN) if value.dim() == 2 and name != "mask" else value
        for name, value in batch.items()
    }
    poisoned["logprobs"].requires_grad_()
    loss, metrics = vk.vppo_loss(**poisoned)
    expected, expected_metrics = vk.vppo_loss(**batch)
    assert torch.equal(loss, expected)
    assert all(torch.equal(metrics[name], expected_metrics[name]) for name in metrics)
    loss.backward()
    assert poisoned["logprobs"].grad is not None and torch.isfinite(poisoned["logprobs"].grad).all()


def test_metrics_mean_what_they_say(batch: dict[str, Tensor]) -> None:
    _, metrics = vk.vppo_loss(**batch, clip_dual=1.1)
    _, shaped = surrogate(batch)
    active, mask = shaped != 0, batch["mask"]
    ratio = (batch["logprobs"] - batch["old_logprobs"]).exp().detach()
    expected = {
        "kept_fraction": (active.sum() / mask.sum()).item(),
        "active_fraction": (active.sum() / mask.sum()).item(),
        "ratio_mean": ratio[active].mean().item(),
        "clip_fraction_low": ((ratio < 0.8) & (shaped < 0))[active].double().mean().item(),
        "clip_fraction_high": ((ratio > 1.28) & (shaped > 0))[active].double().mean().item(),
        "clip_fraction_dual": ((ratio > 1.1) & (shaped < 0))[active].double().mean().item(),
        "approx_kl": (ratio - 1 - ratio.log())[active].mean().item(),
        "dependency_mean": batch["dependency"][mask].mean().item(),
    }
    assert {name: metrics[name].item() for name in expected} == pytest.approx(expected, rel=1e-6)
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("extra", [{}, {"nll_coef": 0.06, "entropy_coef": 0.02}, {"kl_coef": 0.1}], ids=str)
@pytest.mark.parametrize("with_dependency", [True, False])
def test_from_hidden_states(batch: dict[str, Tensor], extra: dict[str, float], with_dependency: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(B, T, D, generator=generator).double().requires_grad_()
    weight = torch.randn(V, D, generator=generator).double().requires_grad_()
    bias = torch.randn(V, generator=generator).double().requires_grad_()
    targets = torch.randint(V, (B, T), generator=generator)
    options: dict[str, Any] = {**extra, "clip_dual": 3.0}
    if "kl_coef" in extra:
        options["ref_logprobs"] = batch["old_logprobs"] - 1.0
    z = reference.logits(hidden, weight, bias, temperature=0.9)
    logprobs, entropy = reference.logprob(z, targets), reference.entropy(z)
    shared = {"old_logprobs": logprobs.detach() + 0.3, "advantages": batch["advantages"], "mask": batch["mask"]}
    if with_dependency:
        shared["dependency"] = batch["dependency"]
    given_entropy = {"entropy": entropy} if "entropy_coef" in extra else {}
    expected, expected_metrics = vk.vppo_loss(logprobs, **shared, **given_entropy, **options)
    truth = torch.autograd.grad(expected, (hidden, weight, bias))

    poisoned = torch.where(batch["mask"].unsqueeze(-1), hidden.detach(), NAN).requires_grad_()
    targets = torch.where(batch["mask"], targets, -100)
    loss, metrics = vk.linear_vppo_loss(poisoned, weight, targets, bias=bias, **shared, **options, temperature=0.9)
    assert torch.allclose(loss, expected, rtol=1e-10)
    for got, exact in zip(torch.autograd.grad(loss, (poisoned, weight, bias)), truth, strict=True):
        assert torch.allclose(got, exact, atol=1e-12)
    assert metrics.keys() == expected_metrics.keys()
    assert all(torch.allclose(metrics[name], expected_metrics[name], atol=1e-9) for name in metrics)


def test_nothing_active_is_a_zero_that_has_a_gradient(batch: dict[str, Tensor]) -> None:
    hidden, weight = torch.randn(B, T, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    targets = torch.zeros(B, T, dtype=torch.long)
    loss, _ = vk.linear_vppo_loss(
        hidden, weight, targets, batch["old_logprobs"].float(), torch.zeros(B), batch["mask"], batch["dependency"]
    )
    loss.backward()
    assert loss == 0
    assert hidden.grad is not None and weight.grad is not None
    assert (hidden.grad == 0).all() and (weight.grad == 0).all()


def released_loss(batch: dict[str, Tensor], logprobs_perturbed: Tensor, window: list[slice], rows: slice) -> Tensor:
    """The released recipe for one micro-batch, written out from the paper's description of its code.

    k3 between the sampled tokens' log-probabilities of both views, clamped; the ceil(0.4 n) highest per trajectory;
    factors from the minimum and maximum of the device's mini-batch and the mean of the micro-batch; clip 0.2 / 0.28
    with dual clip 3; everything over ALL response tokens; plus 0.06 times their mean negative log-probability.
    """
    d = (logprobs_perturbed - batch["old_logprobs"]).clamp(-20, 20)
    score = (d.exp() - d - 1).clamp(0, 10) * batch["mask"]
    count = batch["mask"].sum(1)
    trajectory = score.sum(1) / count.clamp_min(1)
    mini = torch.cat([trajectory[part][count[part] > 0] for part in window])
    u = (trajectory - mini.min()) / (mini.max() - mini.min())
    here = u[rows][count[rows] > 0]
    alpha = 0.9 + u[rows] * (0.1 / here.mean())

    logprobs, old, mask = (batch[name][rows] for name in ("logprobs", "old_logprobs", "mask"))
    keep = torch.zeros_like(mask)
    for i, row in enumerate(score[rows]):
        k = int((count[rows][i] * 4 + 9) // 10)
        ranked = sorted((t for t in range(T) if mask[i, t]), key=lambda t: -row[t].item())
        keep[i, ranked[:k]] = True
    advantage = (batch["advantages"][rows] * alpha).unsqueeze(1)
    ratio = (logprobs - old).exp()
    worst = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.28))
    capped = torch.where(advantage < 0, torch.minimum(-advantage * 3.0, worst), worst)
    return (capped * keep).sum() / mask.sum() - 0.06 * (logprobs * mask).sum() / mask.sum()


def test_parity_with_the_released_code(batch: dict[str, Tensor]) -> None:
    generator = torch.Generator().manual_seed(5)
    perturbed = batch["old_logprobs"] + 1.5 * torch.randn(B, T, generator=generator)
    window = [slice(0, 2), slice(2, 4), slice(4, 6)]
    dependency = vk.sampled_divergence(batch["old_logprobs"], perturbed, kind="k3")
    mini = vk.trajectory_stats(dependency, batch["mask"])
    total, expected = torch.zeros(()).double(), torch.zeros(()).double()
    for rows in window:
        micro = {name: value[rows] for name, value in batch.items()} | {"dependency": dependency[rows]}
        here = vk.trajectory_stats(micro["dependency"], micro["mask"])
        stats = vk.TrajectoryStats(mini.minimum, mini.maximum, here.mean, mini.trajectories)
        total = total + vk.vppo_loss(**micro, stats=stats, clip_dual=3.0, nll_coef=0.06)[0]
        expected = expected + released_loss(batch, perturbed, window, rows)
    assert torch.allclose(total, expected, rtol=1e-12)
    gradients = [torch.autograd.grad(x, batch["logprobs"])[0] for x in (total, expected)]
    assert torch.allclose(*gradients, atol=1e-14)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss_agg": "mean"}, ["loss_agg", "mean", "token-mean"]),
        ({"clip_dual": 0.9}, ["clip_dual", "0.9", "above 1"]),
        ({"clip_low": -0.1}, ["clip_low", "-0.1"]),
        ({"kl_coef": 0.1}, ["ref_logprobs", "None"]),
        ({"entropy_coef": 0.1}, ["entropy", "None"]),
        ({"denominator": 3.0, "loss_agg": "token-sum"}, ["denominator", "3.0", "None"]),
        ({"advantages": torch.zeros(3)}, ["advantages", "[3]", "[6]"]),
        ({"mask": torch.ones(B, T + 1)}, ["mask", f"[{B}, {T + 1}]", f"[{B}, {T}]"]),
        ({"old_logprobs": torch.full((B, T), NAN)}, ["old_logprobs", "NaN", "row 0"]),
        ({"keep_ratio": 0.0}, ["keep_ratio", "0.0"]),
    ],
)
def test_bad_arguments_are_named(batch: dict[str, Tensor], changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        vk.vppo_loss(**batch | changes)
    assert str(caught.value).startswith(words[0])
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("kind", ["k1", "abs_k1", "k2", "k3", "prob_drop"])
def test_estimators(kind: str) -> None:
    p, q = -3 * torch.rand(50).double(), -3 * torch.rand(50).double()
    d = q - p
    expected = {"k1": -d, "abs_k1": d.abs(), "k2": d * d / 2, "k3": d.exp() - d - 1, "prob_drop": p.exp() - q.exp()}
    assert torch.allclose(vk.sampled_divergence(p, q, kind=kind, clamp=None), expected[kind])
    assert vk.sampled_divergence(p, q + 1000, kind=kind).abs().max() <= 10
