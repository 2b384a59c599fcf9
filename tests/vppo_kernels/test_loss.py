"""The loss by its formulas, written out again here; advantages shaped beforehand; the same loss from hidden states."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.views import counted_products, make_views, tiles_of
from torch import Tensor

from vppo_kernels import (
    TrajectoryStats,
    linear_logprob,
    linear_vppo_loss,
    reference,
    topk_mask,
    trajectory_scale,
    trajectory_stats,
    vppo_advantages,
    vppo_loss,
    workspace_limit,
)
from vppo_kernels.backends import available
from vppo_kernels.loss import AGGREGATIONS
from vppo_kernels.tiling import MIB

B, T, V, D = 6, 9, 40, 7


def batch(seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Arguments of `vppo_loss`: ratios from far below to far above the clip range, one empty row, padding."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    mask = torch.rand(B, T, generator=g) < 0.8
    mask[3] = False
    mask[0] = True
    logprobs = -normal(B, T).abs() - 0.1
    return dict(
        logprobs=logprobs,
        old_logprobs=logprobs + 0.5 * normal(B, T),
        advantages=normal(B),
        mask=mask,
        dependency=normal(B, T).square(),
    )


def extras(seed: int = 1) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    names = ("entropy", "ref_logprobs", "is_weights")
    values = [torch.rand(B, T, generator=g, dtype=torch.float64) for _ in names]
    return dict(zip(names, (values[0], -values[1] * 3, values[2] * 2), strict=True))


def single(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.float64 else value


def per_token(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip: tuple[float, float, float | None] = (0.2, 0.28, None),
) -> Tensor:
    """The negated clipped surrogate, token by token and case by case."""
    loss = torch.zeros_like(logprobs)
    low, high, dual = clip
    for b in range(logprobs.shape[0]):
        for t in range(logprobs.shape[1]):
            a, ratio = advantages[b, t], (logprobs[b, t] - old_logprobs[b, t]).exp()
            bounded = ratio.clamp(1 - low, 1 + high)
            if a >= 0:
                loss[b, t] = -a * (ratio if ratio < bounded else bounded)
            else:
                loss[b, t] = -a * (ratio if ratio > bounded else bounded)
                if dual is not None and ratio > dual:
                    loss[b, t] = -a * dual
    return loss


def reduce(values: Tensor, mask: Tensor, agg: str) -> Tensor:
    rows = [values[b][mask[b]] for b in range(len(mask)) if mask[b].any()]
    total = sum(row.sum() for row in rows)
    return {
        "token-mean": lambda: total / sum(len(row) for row in rows),
        "seq-mean-token-mean": lambda: sum(row.sum() / len(row) for row in rows) / len(rows),
        "seq-mean-token-sum": lambda: total / len(rows),
        "seq-mean-token-sum-norm": lambda: total / mask.shape[1],
        "token-sum": lambda: total,
        "none": lambda: torch.where(mask, values, 0),
    }[agg]()


def value_and_gradient(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return loss.detach(), *torch.autograd.grad(loss.sum(), inputs)


def assert_all_close(a: tuple[Tensor, ...], b: tuple[Tensor, ...], tolerance: float = 1e-10) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


# --- by the formula


@pytest.mark.parametrize("agg", AGGREGATIONS)
@pytest.mark.parametrize("dual", [None, 1.5])
def test_every_aggregation_by_its_formula(agg: str, dual: float | None) -> None:
    """All terms at once: surrogate with its importance weights, likelihood, entropy and reference terms."""
    given, extra = batch(), extras()
    given["logprobs"].requires_grad_()
    extra["entropy"].requires_grad_()
    inputs = (given["logprobs"], extra["entropy"])
    loss, _ = vppo_loss(
        **given,
        **extra,
        loss_agg=agg,
        clip_low=0.1,
        clip_high=0.3,
        clip_dual=dual,
        nll_coef=0.06,
        entropy_coef=0.02,
        kl_coef=0.1,
    )
    alpha = reference.trajectory_scale(given["dependency"], given["mask"])
    keep = reference.topk_mask(given["dependency"], given["mask"], 0.4)
    shaped = given["advantages"].unsqueeze(1) * alpha.unsqueeze(1) * keep
    values = per_token(given["logprobs"], given["old_logprobs"], shaped, (0.1, 0.3, dual)) * extra["is_weights"]
    d = extra["ref_logprobs"] - given["logprobs"]
    values = values - 0.06 * given["logprobs"] - 0.02 * extra["entropy"] + 0.1 * (d.exp() - d - 1)
    expected = reduce(values, given["mask"], agg)
    assert loss.shape == ((B, T) if agg == "none" else ())
    assert_all_close(value_and_gradient(loss, *inputs), value_and_gradient(expected, *inputs))


@pytest.mark.parametrize("agg", AGGREGATIONS)
def test_without_dependency_it_is_the_plain_clipped_loss(agg: str) -> None:
    given = batch()
    del given["dependency"]
    given["logprobs"].requires_grad_()
    loss, metrics = vppo_loss(**given, loss_agg=agg)
    plain = per_token(given["logprobs"], given["old_logprobs"], given["advantages"].unsqueeze(1).expand(B, T))
    expected = reduce(plain, given["mask"], agg)
    assert_all_close(value_and_gradient(loss, given["logprobs"]), value_and_gradient(expected, given["logprobs"]))
    assert metrics["kept_fraction"] == 1 and "alpha_mean" not in metrics and "dependency_mean" not in metrics
    full = {**given, "advantages": given["advantages"].unsqueeze(1).repeat(1, T)}
    assert torch.equal(vppo_loss(**full, loss_agg=agg)[0], loss)


def test_clipping_case_by_case(backend_tokens: str) -> None:
    """Ratios 0.5, 1, 1.25, 1.5, 4 with advantage +1 and -1, clip 0.2 / 0.28, dual clip 3."""
    ratios = torch.tensor([0.5, 1.0, 1.25, 1.5, 4.0])
    logprobs = torch.stack([ratios, ratios]).log().requires_grad_()
    arguments = (torch.zeros(2, 5), torch.tensor([1.0, -1.0]), torch.ones(2, 5))
    options: dict[str, Any] = dict(loss_agg="none", backend=backend_tokens)
    loss, _ = vppo_loss(logprobs, *arguments, clip_dual=3.0, **options)
    expected = torch.tensor([[-0.5, -1.0, -1.25, -1.28, -1.28], [0.8, 1.0, 1.25, 1.5, 3.0]])
    assert torch.allclose(loss, expected)
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    assert torch.allclose(gradient, torch.tensor([[-0.5, -1.0, -1.25, 0, 0], [0, 1.0, 1.25, 1.5, 0]]), atol=1e-6)
    loss, _ = vppo_loss(logprobs, *arguments, **options)
    assert math.isclose(float(loss[1, 4].detach()), 4.0, rel_tol=1e-6)


def test_enormous_ratios_stay_finite(backend_tokens: str) -> None:
    logprobs = torch.tensor([[0.0, -500.0, -0.1]], requires_grad=True)
    old = torch.tensor([[-500.0, 0.0, -0.1]])
    for advantage in (1.0, -1.0):
        loss, metrics = vppo_loss(logprobs, old, torch.tensor([advantage]), torch.ones(1, 3), backend=backend_tokens)
        (gradient,) = torch.autograd.grad(loss, logprobs)
        assert torch.isfinite(loss) and torch.isfinite(gradient).all()
        assert all(torch.isfinite(value) for value in metrics.values())


@given(st.floats(0.01, 100), st.integers(0, 1000), st.sampled_from([None, 3.0]))
def test_homogeneous_in_the_advantage(factor: float, seed: int, dual: float | None) -> None:
    given = batch(seed)
    given["logprobs"].requires_grad_()
    loss, _ = vppo_loss(**given, clip_dual=dual)
    scaled, _ = vppo_loss(**{**given, "advantages": factor * given["advantages"]}, clip_dual=dual)
    assert_all_close(
        tuple(factor * x for x in value_and_gradient(loss, given["logprobs"])),
        value_and_gradient(scaled, given["logprobs"]),
        1e-9,
    )


@given(
    st.integers(0, 1000),
    st.sampled_from([None, 3.0]),
    st.sampled_from(AGGREGATIONS),
    st.sampled_from([(0.4, None), (1e-9, None), (1.0, None), (0.4, 0.3), (1.0, 1.0), (1.0, 1e9)]),
)
def test_advantages_shaped_beforehand(
    seed: int, dual: float | None, agg: str, gate: tuple[float, float | None]
) -> None:
    """Advantages shaped beforehand = mask and scale given to the loss = mask and scale applied to the plain loss."""
    given = batch(seed)
    logprobs = given["logprobs"].requires_grad_()
    dependency, mask = given.pop("dependency"), given["mask"]
    options: dict[str, Any] = dict(clip_dual=dual, loss_agg=agg)
    kept = dict(keep_ratio=gate[0], keep_threshold=gate[1])
    inside, metrics = vppo_loss(**given, dependency=dependency, **kept, **options)
    shaped = vppo_advantages(given["advantages"], dependency, mask, **kept)
    before, _ = vppo_loss(**{**given, "advantages": shaped}, **options)
    raw = reference.clipped_loss(logprobs, given["old_logprobs"], given["advantages"].unsqueeze(1), clip_dual=dual)
    keep = topk_mask(dependency, mask, **kept)
    factors = keep * trajectory_scale(dependency, mask).unsqueeze(1)
    assert metrics["responses_without_kept"] == (mask.any(1) & ~keep.any(1)).sum()
    after = reduce(raw * factors, mask, agg)
    first = value_and_gradient(inside, logprobs)
    assert_all_close(first, value_and_gradient(before, logprobs), 0)
    assert_all_close(first, value_and_gradient(after, logprobs))


@pytest.mark.parametrize("agg", [agg for agg in AGGREGATIONS if agg != "none"])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_micro_batches_sum_to_the_whole_batch(agg: str, as_tensor: bool) -> None:
    given = batch()
    given["logprobs"].requires_grad_()
    mask = given["mask"]
    whole, _ = vppo_loss(**given, loss_agg=agg, nll_coef=0.1)
    size = {"token-mean": mask.sum(), "seq-mean-token-sum-norm": T, "token-sum": None}.get(agg, mask.any(1).sum())
    size = size if as_tensor or size is None else float(size)
    stats = trajectory_stats(given["dependency"], mask)
    parts = [
        vppo_loss(
            **{name: value[rows] for name, value in given.items()},
            loss_agg=agg,
            nll_coef=0.1,
            denominator=size,
            stats=stats,
        )[0]
        for rows in (slice(0, 2), slice(2, 3), slice(3, 6))
    ]
    assert_all_close(
        value_and_gradient(sum(parts), given["logprobs"]),  # type: ignore[arg-type]
        value_and_gradient(whole, given["logprobs"]),
    )


def test_gradient_flows_through_logprobs_and_entropy_alone(backend_tokens: str) -> None:
    given, extra = ({name: single(value) for name, value in part.items()} for part in (batch(), extras()))
    inputs = {name: value.requires_grad_() for name, value in {**given, **extra}.items() if value.is_floating_point()}
    mask = given["mask"]
    loss, metrics = vppo_loss(mask=mask, **inputs, nll_coef=0.1, entropy_coef=0.1, kl_coef=0.1, backend=backend_tokens)
    assert not any(value.requires_grad for value in metrics.values())
    loss.backward()
    with_gradient = {name for name, value in inputs.items() if value.grad is not None and value.grad.any()}
    assert with_gradient == {"logprobs", "entropy"}


def test_metrics_by_hand(backend_tokens: str) -> None:
    ratios = torch.tensor([[0.5, 1.0, 2.0, 4.0], [0.5, 1.0, 2.0, 4.0], [1.0, 1.0, 1.0, 1.0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]])
    dependency = torch.tensor([[4.0, 3, 2, 1], [1, 2, 3, 4], [8, 9, 0, 0]])
    entropy = torch.arange(12.0).view(3, 4)
    _, metrics = vppo_loss(
        ratios.log(),
        torch.zeros(3, 4),
        torch.tensor([1.0, -1.0, 0.0]),
        mask,
        dependency,
        keep_ratio=0.75,
        scale_max=1.2,
        clip_dual=3.0,
        entropy=entropy,
        ref_logprobs=torch.zeros(3, 4),
        backend=backend_tokens,
    )
    # kept: row 0 ratios 0.5 1 2, row 1 ratios 1 2 4, row 2 both (of no advantage); alpha: means 2.5, 2.5, 8.5
    k3 = [x - math.log(x) - 1 for x in (0.5, 1, 2, 1, 2, 4)]
    reverse = [1 / x + math.log(x) - 1 for x in (0.5, 1, 2, 1, 2, 4)]
    expected = {
        "kept_fraction": 8 / 10,
        "active_fraction": 6 / 10,
        "ratio_mean": 10.5 / 6,
        "clip_fraction_low": 0,
        "clip_fraction_high": 1 / 6,
        "clip_fraction_dual": 1 / 6,
        "approx_kl": sum(k3) / 6,
        "ref_kl": sum(reverse) / 6,
        "dependency_mean": 37 / 10,
        "entropy_mean": (sum(range(8)) + 8 + 9) / 10,
        "alpha_min": 0.9,
        "alpha_mean": 1.0,
        "alpha_max": 1.2,
        "alpha_std": math.sqrt((2 * 0.1**2 + 0.2**2) / 3),
        "responses_without_kept": 0,
    }
    assert {name: round(float(value), 5) for name, value in metrics.items()} == pytest.approx(
        {name: round(value, 5) for name, value in expected.items()}, abs=1e-5
    )
    _, falling = vppo_loss(torch.full((1, 4), -1.0), torch.zeros(1, 4), -torch.ones(1), torch.ones(1, 4))
    assert falling["clip_fraction_low"] == 1 and falling["clip_fraction_high"] == 0


# --- from hidden states

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "keep": dict(keep_ratio=0.7, scale_min=0.5, scale_max=1.4),
    "threshold": dict(keep_ratio=0.7, keep_threshold=0.5),
    "threshold above all": dict(keep_threshold=1e9),
    "clip": dict(clip_low=0.1, clip_high=0.5, clip_dual=1.2),
    "nll": dict(nll_coef=0.06),
    "entropy": dict(entropy_coef=0.01),
    "reference": dict(kl_coef=0.1),
    "metrics of a reference": dict(ref_logprobs=extras()["ref_logprobs"]),
    "weights": dict(is_weights=extras()["is_weights"]),
    "text rows": dict(has_image=torch.tensor([1, 1, 0, 1, 0, 1])),
    "stats": dict(stats=TrajectoryStats(0.1, 2.0, 0.8)),
    "denominator": dict(denominator=11.0),
    "everything": dict(
        keep_ratio=0.5, clip_dual=3.0, nll_coef=0.1, entropy_coef=0.2, kl_coef=0.3, is_weights=extras()["is_weights"]
    ),
    **{agg: dict(loss_agg=agg) for agg in AGGREGATIONS},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("with_dependency", [True, False])
def test_the_kernels_give_the_same(options: dict[str, Any], with_dependency: bool) -> None:
    """Loss, gradients and metrics within single precision of the torch code in double; padding is not read."""
    if "triton" not in available():
        pytest.skip("Triton is not installed")
    given, extra = batch(), extras()
    if not with_dependency:
        del given["dependency"]
    options = {**{name: extra[name] for name in ("entropy", "ref_logprobs")}, **options}
    mask = given.pop("mask")
    found = []
    for backend in ("torch", "triton"):
        inputs = dict(given, **options)
        if backend == "triton":
            for name, value in inputs.items():
                inputs[name] = single(value)
                if isinstance(value, Tensor) and value.shape == mask.shape:
                    inputs[name] = torch.where(mask, single(value), math.nan)
        leaves = [inputs[name].detach().clone().requires_grad_() for name in ("logprobs", "entropy")]
        inputs.update(logprobs=leaves[0], entropy=leaves[1])
        loss, metrics = vppo_loss(mask=mask, backend=backend, **inputs)
        upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
        gradients = torch.autograd.grad(loss, leaves, upstream, allow_unused=True)
        found.append((loss.detach(), *(torch.zeros(()) if x is None else x for x in gradients), *metrics.values()))
        names = list(metrics)
    expected, got = found
    assert all(x.dtype == torch.float32 for x in got)
    for name, x, y in zip(["loss", "gradient", "gradient of entropies", *names], got, expected, strict=True):
        torch.testing.assert_close(x.double(), y.double().expand(x.shape), rtol=2e-5, atol=2e-6, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_long_rows_of_mixed_dtypes(backend_tokens: str, dtype: torch.dtype) -> None:
    """More columns than a program takes, tensors that are not contiguous, and a loss in single precision."""
    g = torch.Generator().manual_seed(2)
    logprobs = -torch.rand(2500, 3, generator=g).to(dtype).T.requires_grad_()
    old, mask = torch.rand(3, 2500, generator=g) - 1, torch.rand(3, 2500, generator=g) < 0.8
    advantages = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float16)
    loss, metrics = vppo_loss(logprobs, old, advantages, mask, loss_agg="seq-mean-token-mean", backend=backend_tokens)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    wide = logprobs.detach().double().requires_grad_()
    expected, others = vppo_loss(wide, old, advantages, mask, loss_agg="seq-mean-token-mean", backend="torch")
    (exact,) = torch.autograd.grad(expected, wide)
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(tuple(x.double() for x in metrics.values()), tuple(x.double() for x in others.values()),
                               rtol=1e-4, atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_are_computed_in_single_precision(backend_tokens: str, dtype: torch.dtype) -> None:
    """Every input in 16 bits, whose own arithmetic would be off by a thousandth."""
    g = torch.Generator().manual_seed(3)
    logprobs, old, ref, entropy = (-torch.rand(4, 3, 7, generator=g)).to(dtype).unbind(0)
    leaf = logprobs.clone().requires_grad_()
    options: dict[str, Any] = dict(nll_coef=0.1, entropy_coef=0.1, kl_coef=0.1, backend=backend_tokens)
    advantages, mask = torch.tensor([1.0, -1.0, 0.5], dtype=dtype), torch.ones(3, 7)
    loss, metrics = vppo_loss(leaf, old, advantages, mask, ref_logprobs=ref, entropy=-entropy, **options)
    (gradient,) = torch.autograd.grad(loss, leaf)
    wide = [x.double() for x in (logprobs, old, advantages, ref, -entropy)]
    exact = wide[0].requires_grad_()
    expected, others = vppo_loss(
        exact, wide[1], wide[2], mask, ref_logprobs=wide[3], entropy=wide[4], **{**options, "backend": "torch"}
    )
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(expected, exact)[0], rtol=1e-2, atol=1e-6)
    for name, value in metrics.items():
        torch.testing.assert_close(value.double(), others[name].double(), rtol=1e-5, atol=1e-7)


def test_a_nan_that_nobody_checked_reaches_the_loss(backend_tokens: str) -> None:
    for place, expected in ((1, True), (2, False)):
        logprobs = torch.zeros(2, 3)
        logprobs[0, place] = math.nan
        mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
        loss, _ = vppo_loss(logprobs, torch.zeros(2, 3), torch.ones(2), mask, backend=backend_tokens, check=False)
        assert bool(loss.isnan()) == expected


HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "head": dict(temperature=0.8, logit_scale=1.2, softcap=4.0, vocab_size=V - 3),
}


def from_hidden(
    options: dict[str, Any], head: dict[str, Any], backend: str, with_dependency: bool = True
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], dict[str, Tensor], dict[str, Tensor]]:
    """Loss and gradients of both ways, and the metrics of both."""
    given = batch()
    del given["logprobs"]
    if not with_dependency:
        del given["dependency"]
    options = dict(options)
    if options.get("kl_coef"):
        options["ref_logprobs"] = extras()["ref_logprobs"]
    g = torch.Generator().manual_seed(7)
    leaves = [torch.randn(*s, generator=g, dtype=torch.float64) for s in ((B, T, D), (V, D), (V,))]
    hidden, weight, bias = (leaf.requires_grad_() for leaf in leaves)
    targets = torch.randint(V - 3, (B, T), generator=g)
    logits = reference.logits(hidden, weight, bias, **head)
    logprobs = reference.logprob(logits, targets)
    given["old_logprobs"] = logprobs.detach() + 0.4 * torch.randn(B, T, generator=g, dtype=torch.float64)
    with tiles_of(5, 13):
        ours, metrics = linear_vppo_loss(
            hidden, weight, targets, **given, bias=bias, backend=backend, **options, **head
        )
        first = value_and_gradient(ours, hidden, weight, bias)
    entropy = reference.entropy(logits) if "entropy_coef" in options else None
    plain, expected = vppo_loss(logprobs, **given, entropy=entropy, **options)
    return first, value_and_gradient(plain, hidden, weight, bias), metrics, expected


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_from_hidden_states_it_is_the_same_loss(backend_float64: str, options: dict, head: dict) -> None:
    """Values, gradients of hidden states, weight and bias, and metrics."""
    ours, plain, metrics, expected = from_hidden(options, head, backend_float64)
    assert_all_close(ours, plain)
    assert metrics.keys() == expected.keys()
    assert_all_close(tuple(metrics.values()), tuple(expected[name] for name in metrics))


def test_from_hidden_states_without_dependency(backend_float64: str) -> None:
    ours, plain, metrics, expected = from_hidden({}, {}, backend_float64, with_dependency=False)
    assert_all_close(ours, plain)
    assert metrics.keys() == expected.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_from_hidden_states_in_the_dtypes_of_training(backend: str, dtype: torch.dtype) -> None:
    views = make_views(rows=24, vocab=500, dtype=dtype).grad()
    truth = reference.logprob(views.to(torch.float64).logits()[0], views.targets).view(4, 6)
    arguments = (torch.randn(4), torch.ones(4, 6), torch.rand(4, 6))
    old = truth.detach().float() + 0.1
    loss, _ = linear_vppo_loss(
        views.hidden.view(4, 6, -1), views.weight, views.targets.view(4, 6), old, *arguments, backend=backend
    )
    plain, _ = vppo_loss(truth.float(), old, *arguments)
    assert loss.dtype == torch.float32 and abs(loss - plain) < 1e-5
    ours, expected = (torch.autograd.grad(x, (views.hidden, views.weight)) for x in (loss, plain))
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == dtype
        assert torch.allclose(a.double(), b.double(), rtol=1e-4 if dtype == torch.float32 else 2e-2, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize("entropy_coef", [0.0, 1e-3])
def test_float16_under_a_gradient_scaler(backend: str, temperature: float, entropy_coef: float) -> None:
    """Gradients of 1e-8 survive with a factor of 65536 on the loss: float16 holds neither without the other."""
    views = make_views(rows=24, vocab=500, dtype=torch.float16).grad()
    targets, advantages = views.targets.view(4, 6), torch.tensor([1e-2, -1e-2, 2e-2, 5e-3])
    mask, options = torch.ones(4, 6), dict(denominator=1e6, entropy_coef=entropy_coef)
    old = reference.logprob(views.to(torch.float64).logits()[0] / temperature, views.targets).view(4, 6).float() + 0.1
    old = old.detach()

    def gradients(leaves: Any, scale: float, fused: bool) -> list[Tensor]:
        arguments = (leaves.hidden.view(4, 6, -1), leaves.weight, targets)
        if fused:
            loss, _ = linear_vppo_loss(
                *arguments, old, advantages, mask, temperature=temperature, backend=backend, **options
            )
        else:
            head = linear_logprob(*arguments, temperature=temperature, backend="torch")
            loss, _ = vppo_loss(head.logprobs, old, advantages, mask, entropy=head.entropy, **options)
        found = torch.autograd.grad(loss * scale, (leaves.hidden, leaves.weight))
        return [g.double() / scale for g in found]

    ours, plain = (gradients(views, 65536.0, fused) for fused in (True, False))
    truth = gradients(views.to(torch.float64).grad(), 1.0, fused=False)
    for got, expected, right in zip(ours, plain, truth, strict=True):
        assert 0 < right.abs().median() < 2.0**-25  # float16 rounds it to 0
        assert (got - right).norm() < 1.1 * (expected - right).norm() + 1e-3 * right.norm()


@pytest.mark.parametrize(
    "coefficients",
    [{}, dict(keep_threshold=0.5), dict(keep_threshold=1e9), dict(nll_coef=0.1)],
    ids=["kept rows", "rows above a threshold", "none above a threshold", "every response token"],
)
def test_only_rows_that_can_carry_gradient_meet_the_weight(backend_float64: str, coefficients: dict) -> None:
    given = batch()
    del given["logprobs"]
    given["advantages"][1] = 0
    keep = topk_mask(given["dependency"], given["mask"], 0.4, keep_threshold=coefficients.get("keep_threshold"))
    keep[1] = False
    rows = int((given["mask"] if "nll_coef" in coefficients else keep).sum())
    hidden = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    with counted_products() as forward:
        loss, _ = linear_vppo_loss(
            hidden, weight, torch.zeros(B, T).long(), **given, backend=backend_float64, **coefficients
        )
    # logits, and the gradients of hidden states and of the weight, all while the logits are there
    assert (0 < rows < B * T or not keep.any()) and sum(forward) == 3 * rows * V * D
    with counted_products() as backward:
        loss.backward()
    assert backward == []
    if "nll_coef" not in coefficients:
        assert hidden.grad is not None and not hidden.grad[~keep].any()


@pytest.mark.parametrize("kept", [True, False], ids=["logits kept", "logits made again"])
def test_the_gradient_made_in_the_forward(backend: str, kept: bool) -> None:
    """Any upstream factor, one product more where the logits do not fit, and handed out once."""
    rows, vocab, hidden_size = 24, 30_000, 4
    views = make_views(rows=rows, vocab=vocab, hidden_size=hidden_size, divergences=(0.1, 1))
    targets, advantages = views.targets.view(4, 6), torch.tensor([1.0, -1.0, 0.5, 2.0])
    old, mask = torch.full((4, 6), -3.0), torch.ones(4, 6)
    gradients = []
    for fused in (True, False):
        leaves = views.grad()
        hidden = leaves.hidden.view(4, 6, -1)
        with counted_products() as products, workspace_limit((64 if kept else 2) * MIB):
            if fused:
                loss, _ = linear_vppo_loss(hidden, leaves.weight, targets, old, advantages, mask, bias=leaves.bias,
                                           backend=backend)  # fmt: skip
            else:
                head = linear_logprob(hidden, leaves.weight, targets, leaves.bias, backend=backend)
                loss, _ = vppo_loss(head.logprobs, old, advantages, mask)
            inputs = (leaves.hidden, leaves.weight, leaves.bias)
            gradients.append(torch.autograd.grad(-2.5 * loss, inputs, retain_graph=True))
        if fused:
            assert sum(products) == (3 if kept else 4) * rows * vocab * hidden_size
            with pytest.raises(RuntimeError, match="handed out once"):
                torch.autograd.grad(loss, inputs)
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)
