"""The edges that the method promises to hold at, one test each."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.views import Views, counted_products, make_views, tiles_of, worst
from torch import Tensor

from vppo_kernels import (
    divergence,
    linear_divergence,
    linear_logprob,
    linear_vppo_loss,
    reference,
    topk_mask,
    topk_mask_,
    trajectory_scale,
    trajectory_stats,
    vppo_advantages,
    vppo_loss,
)
from vppo_kernels.reference import LOGPROB_BOUND

KINDS = ("kl", "reverse_kl", "jsd")
NAN, INF = math.nan, math.inf


def batch(rows: int = 4, length: int = 6, seed: int = 0) -> dict[str, Tensor]:
    """Arguments of `vppo_loss`; the last two positions of every odd row are padding."""
    g = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(rows, length, generator=g)
    mask = torch.ones(rows, length, dtype=torch.bool)
    mask[1::2, -2:] = False
    return dict(
        logprobs=logprobs,
        old_logprobs=logprobs + 0.3 * torch.randn(rows, length, generator=g),
        advantages=torch.randn(rows, generator=g),
        mask=mask,
        dependency=torch.rand(rows, length, generator=g),
    )


def check_logits(z_p: Tensor, z_q: Tensor, backend: str, kinds: tuple[str, ...] = KINDS) -> None:
    """Within the bounds, whole and in tiles of every width, and finite gradients."""
    targets = torch.zeros(len(z_p), dtype=torch.long)
    whole = z_p.shape[1]
    # the interpreter takes its time over every tile
    for rows, width in ((2, 1), (2, 3), (2, whole)) if backend == "torch" else ((8, whole // 2), (8, whole)):
        with tiles_of(rows, width):
            for kind in kinds:
                leaves = [z.clone().requires_grad_() for z in (z_p, z_q)]
                got = divergence(*leaves, targets=targets, kind=kind, backend=backend)
                assert worst(got, reference.divergence(z_p.double(), z_q.double(), targets, kind)) < 1, (kind, width)
                assert (got.divergence >= 0).all()
                loss = sum(x.sum() for x in got if x is not None)
                assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, leaves))  # type: ignore[arg-type]


# --- trajectories


@pytest.mark.parametrize("empty", [[1], [0, 3], [0, 1, 2, 3]], ids=str)
def test_trajectory_without_response_tokens(empty: list[int]) -> None:
    given = batch()
    given["mask"][empty] = False
    full = [row for row in range(4) if row not in empty]
    assert not topk_mask(given["dependency"], given["mask"], 0.4)[empty].any()
    alpha = trajectory_scale(given["dependency"], given["mask"])
    assert (alpha[empty] == 1).all()
    assert torch.equal(alpha[full], trajectory_scale(given["dependency"][full], given["mask"][full]))
    given["logprobs"].requires_grad_()
    for agg in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "token-sum"):
        loss, metrics = vppo_loss(**given, loss_agg=agg)
        without, _ = vppo_loss(**{name: value[full] for name, value in given.items()}, loss_agg=agg)
        assert torch.allclose(loss, without) if full else loss == 0
        assert all(torch.isfinite(value) for value in metrics.values())
        (gradient,) = torch.autograd.grad(loss, given["logprobs"])
        assert not gradient[empty].any() and torch.isfinite(gradient).all()


def test_text_only_row_keeps_its_tokens_and_stays_out_of_the_statistics() -> None:
    """What its dependency holds does not matter: there was no second view to compare with."""
    given = batch()
    has_image = torch.tensor([True, False, True, True])
    given["dependency"][1] = NAN
    seen = [0, 2, 3]
    del given["logprobs"], given["old_logprobs"]
    shaped = vppo_advantages(**given, has_image=has_image)
    assert torch.equal(shaped[1], torch.where(given["mask"][1], given["advantages"][1], 0))
    alone = {name: value[seen] for name, value in given.items()}
    assert torch.equal(shaped[seen], vppo_advantages(**alone))
    loss, metrics = vppo_loss(**{**batch(), "dependency": given["dependency"]}, has_image=has_image)
    assert torch.isfinite(loss) and all(torch.isfinite(value) for value in metrics.values())
    assert torch.allclose(metrics["dependency_mean"], given["dependency"][seen][given["mask"][seen]].mean())


@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e30])
def test_padding_is_never_read(value: float) -> None:
    given, poisoned = batch(), batch()
    given["logprobs"].requires_grad_()
    for name in ("logprobs", "old_logprobs", "dependency"):
        poisoned[name] = torch.where(poisoned["mask"], poisoned[name], value)
    per_token = given["advantages"].unsqueeze(1).expand(4, 6)
    poisoned["advantages"] = torch.where(given["mask"], per_token, value)
    poisoned["logprobs"].requires_grad_()
    extra = torch.rand(4, 6)
    options: dict[str, Any] = dict(nll_coef=0.1, entropy_coef=0.2, kl_coef=0.3)
    dirty = torch.where(given["mask"], extra, value)
    loss, metrics = vppo_loss(**given, entropy=extra, ref_logprobs=-extra, is_weights=extra, **options)
    again, others = vppo_loss(**poisoned, entropy=dirty, ref_logprobs=-dirty, is_weights=dirty, **options)
    assert torch.equal(loss, again)
    assert all(torch.equal(metrics[name], others[name]) for name in metrics)
    (a,), (b,) = torch.autograd.grad(loss, given["logprobs"]), torch.autograd.grad(again, poisoned["logprobs"])
    assert torch.equal(a, b) and not b[~given["mask"]].any()
    a, b = given["dependency"], poisoned["dependency"]
    assert torch.equal(topk_mask(a, given["mask"], 0.4), topk_mask(b, given["mask"], 0.4))
    assert torch.equal(topk_mask_(b.clone(), given["mask"], 0.4) > 0, topk_mask(a, given["mask"], 0.4))
    assert trajectory_stats(a, given["mask"]) == trajectory_stats(b, given["mask"])


@pytest.mark.parametrize("coefficients", [{}, dict(nll_coef=0.1, entropy_coef=0.2)], ids=["surrogate", "every token"])
def test_padding_is_never_read_by_the_loss_from_hidden_states(backend: str, coefficients: dict) -> None:
    given = batch()
    del given["logprobs"]
    hidden, weight, targets = torch.randn(4, 6, 8), torch.randn(50, 8), torch.randint(50, (4, 6))
    results = []
    for fill, target in ((0.0, 0), (NAN, -100), (INF, 10**6)):
        filled = torch.where(given["mask"].unsqueeze(2), hidden, fill).requires_grad_()
        head = weight.clone().requires_grad_()
        arguments = {**given, "old_logprobs": torch.where(given["mask"], given["old_logprobs"], fill)}
        loss, metrics = linear_vppo_loss(
            filled, head, torch.where(given["mask"], targets, target), **arguments, backend=backend, **coefficients
        )
        results.append((loss, *metrics.values(), *torch.autograd.grad(loss, (filled, head))))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert not results[0][-2][~given["mask"]].any()


# --- values that are not finite


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["logprobs", "old_logprobs", "advantages", "dependency"])
def test_not_finite_among_valid_tokens_is_named(name: str, value: float) -> None:
    given = batch()
    if name == "advantages":
        given[name] = given[name].unsqueeze(1).repeat(1, 6)
    given[name][2, 3] = value
    kind = "NaN" if math.isnan(value) else "inf"
    with pytest.raises(ValueError, match=rf"{name}: got {kind} at row 2 .*takes finite"):
        vppo_loss(**given)
    with pytest.raises(ValueError, match=rf"{name}: got {kind} at row 2"):
        vppo_loss(**given, check=True)
    if name == "dependency":
        for call in (topk_mask, topk_mask_):
            with pytest.raises(ValueError, match=rf"scores: got {kind} at row 2"):
                call(given[name], given["mask"], 0.4)
        with pytest.raises(ValueError, match=rf"scores: got {kind} at row 2"):
            trajectory_scale(given[name], given["mask"])
        with pytest.raises(ValueError, match=rf"dependency: got {kind} at row 2"):
            vppo_advantages(given["advantages"], given[name], given["mask"])


@pytest.mark.parametrize("name", ["entropy", "ref_logprobs", "is_weights"])
def test_not_finite_among_optional_arguments_is_named(name: str) -> None:
    given = batch()
    bad = torch.zeros(4, 6)
    bad[3, 1] = NAN
    with pytest.raises(ValueError, match=rf"{name}: got NaN at row 3"):
        vppo_loss(**given, **{name: bad})


def test_unchecked_nan_shows() -> None:
    """Nothing is silently shaped by a NaN: the whole batch's advantages are NaN, or the token itself is kept."""
    given = batch()
    given["dependency"][2, 3] = NAN
    shaped = vppo_advantages(given["advantages"], given["dependency"], given["mask"], check=False)
    kept = topk_mask(given["dependency"], given["mask"], 0.4, check=False)
    assert kept[2, 3] and torch.isnan(shaped[kept]).all()
    assert not kept[~given["mask"]].any()
    loss, _ = vppo_loss(**given, check=False)
    assert torch.isnan(loss)
    assert torch.isnan(trajectory_scale(given["dependency"], given["mask"], check=False)).all()


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("name", ["hidden", "hidden_perturbed", "weight", "bias"])
def test_not_finite_operands_are_named_where_asked(backend: str, name: str, value: float) -> None:
    views = make_views(rows=6, vocab=40, hidden_size=8)
    tensors = dict(
        hidden=views.hidden,
        hidden_perturbed=views.perturbed,
        weight=views.weight,
        bias=views.bias,
        targets=views.targets,
    )
    tensors[name][4] = value
    message = rf"{name}: got {'NaN' if math.isnan(value) else 'inf'} at row 4"
    with pytest.raises(ValueError, match=message):
        linear_divergence(**tensors, backend=backend, check=True)
    unchecked = linear_divergence(**tensors, backend=backend)
    assert not torch.isfinite(unchecked.divergence[4])
    if name == "hidden_perturbed":
        return
    del tensors["hidden_perturbed"]
    with pytest.raises(ValueError, match=message):
        linear_logprob(**tensors, backend=backend, check=True)
    assert not torch.isfinite(linear_logprob(**tensors, backend=backend).logprobs[4])


@pytest.mark.parametrize("name", ["logits", "logits_perturbed"])
def test_not_finite_logits_are_named_where_asked(backend: str, name: str) -> None:
    logits = dict(logits=torch.randn(3, 20), logits_perturbed=torch.randn(3, 20))
    logits[name][1, 19] = NAN
    with pytest.raises(ValueError, match=rf"{name}: got NaN at row 1"):
        divergence(**logits, backend=backend, check=True)
    assert torch.isnan(divergence(**logits, backend=backend).divergence[1])
    divergence(**logits, vocab_size=19, backend=backend, check=True)


@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
def test_not_finite_operands_of_the_loss_are_named(backend: str, name: str) -> None:
    given = batch()
    del given["logprobs"]
    tensors = dict(hidden=torch.randn(4, 6, 8), weight=torch.randn(50, 8), bias=torch.randn(50))
    tensors[name][2] = NAN
    with pytest.raises(ValueError, match=rf"{name}: got NaN at row 2"):
        linear_vppo_loss(**tensors, targets=torch.zeros(4, 6).long(), **given, backend=backend, check=True)


# --- the vocabulary


@pytest.mark.parametrize("kind", KINDS)
def test_padding_rows_of_the_weight_are_left_out(backend: str, kind: str) -> None:
    """Whatever they hold, and their gradient is exactly zero."""
    views = make_views(rows=12, vocab=200, hidden_size=16)
    padded = Views(
        views.hidden,
        views.perturbed,
        torch.cat([views.weight, torch.full((56, 16), NAN)]),
        torch.cat([views.bias, torch.full((56,), INF)]),
        views.targets,
    ).grad()
    options = dict(targets=views.targets, kind=kind, backend=backend)
    expected = linear_divergence(views.hidden, views.perturbed, views.weight, views.bias, **options)
    inputs = (padded.hidden, padded.perturbed, padded.weight, padded.bias)
    got = linear_divergence(*inputs, vocab_size=200, check=True, **options)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(got, expected, strict=True))
    gradients = torch.autograd.grad(sum(x.sum() for x in got if x is not None), inputs)  # type: ignore[arg-type]
    assert all(torch.isfinite(g).all() for g in gradients)
    assert not gradients[2][200:].any() and not gradients[3][200:].any()
    assert gradients[2].shape == (256, 16) and gradients[2][:200].any()
    one = linear_logprob(padded.hidden, padded.weight, views.targets, padded.bias, vocab_size=200, backend=backend)
    assert torch.allclose(one.logprobs, expected.logprobs, atol=LOGPROB_BOUND)


def test_padding_columns_of_logits_are_left_out(backend: str) -> None:
    z_p, z_q = make_views(rows=12, vocab=200).logits()
    expected = divergence(z_p, z_q, backend=backend)
    padded = [torch.cat([z, torch.full((12, 9), NAN)], 1).requires_grad_() for z in (z_p, z_q)]
    got = divergence(*padded, vocab_size=200, backend=backend)
    assert torch.equal(got.divergence, expected.divergence)
    gradients = torch.autograd.grad(got.divergence.sum(), padded)
    assert all(torch.isfinite(g).all() and not g[:, 200:].any() and g.any() for g in gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_vocabulary_of_one_and_no_rows(backend: str, kind: str) -> None:
    one = linear_divergence(
        torch.randn(3, 4),
        torch.randn(3, 4),
        torch.randn(1, 4),
        targets=torch.zeros(3).long(),
        kind=kind,
        backend=backend,
    )
    assert all(not output.any() for output in one)
    hidden, weight = torch.zeros(0, 5, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    targets = torch.zeros(0, 5).long()
    empty = linear_divergence(hidden, hidden, weight, targets=targets, kind=kind, backend=backend, check=True)
    single = linear_logprob(hidden, weight, targets, backend=backend, check=True)
    assert all(output.shape == (0, 5) and output.dtype == torch.float32 for output in (*empty, *single))
    loss = sum(output.sum() for output in (*empty, *single) if output is not None)
    gradients = torch.autograd.grad(loss, (hidden, weight))  # type: ignore[arg-type]
    assert gradients[0].shape == (0, 5, 4) and gradients[1].shape == (7, 4) and not gradients[1].any()


# --- extreme logits. All values are float32, so that their rounding is not what is measured.


@pytest.mark.parametrize("offset", [-1e4, 1e4, 3e4, -1e6])
def test_rows_far_below_zero_and_above_ten_thousand(backend: str, offset: float) -> None:
    z_p, z_q = ((z.round(decimals=2) * 64).round() / 64 for z in make_views(rows=8, vocab=60).logits())
    check_logits(z_p + offset, z_q + offset, backend)
    check_logits(z_p + offset, z_q + offset / 2, backend, ("kl", "reverse_kl"))


def test_head_with_logits_above_ten_thousand(backend: str) -> None:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randint(-8, 9, (6, 8), generator=g) / 8
    weight = torch.randint(-4, 5, (40, 8), generator=g) / 2
    perturbed = hidden.clone()
    perturbed[:, 0] += torch.tensor([1.0, 0.5, 0.25, 1 / 64, 0.0, 2.0])
    bias = torch.full((40,), 20_000.0)
    bias[20:] = -20_000
    views = Views(hidden, perturbed, weight, bias, torch.zeros(6).long())
    for kind in KINDS:
        got = linear_divergence(hidden, perturbed, weight, bias, targets=views.targets, kind=kind, backend=backend)
        truth = views.truth(kind, bias=True)
        assert truth.divergence.max() > 1e-2
        assert worst(got, truth) < 1


def test_equal_views(backend: str) -> None:
    views = make_views(rows=16, vocab=300)
    for kind in KINDS:
        leaf = views.hidden.clone().requires_grad_()
        got = linear_divergence(leaf, leaf, views.weight, kind=kind, backend=backend)
        assert not got.divergence.any()
        (gradient,) = torch.autograd.grad(got.divergence.sum(), leaf)
        assert gradient.abs().max() < 1e-6
        z = views.logits()[0]
        assert divergence(z, z + 2, kind=kind, backend=backend).divergence.max() < 1e-8


def test_one_hot_views(backend: str) -> None:
    z = torch.full((3, 10), -300.0)
    z[torch.arange(3), torch.tensor([0, 4, 9])] = 300.0
    other = z.roll(1, 1)
    check_logits(z, z.clone(), backend)
    check_logits(z, other, backend)
    assert torch.allclose(divergence(z, other, kind="jsd", backend=backend).divergence, torch.tensor(math.log(2)))
    assert (divergence(z, other, backend=backend).divergence == 600).all()


@pytest.mark.parametrize("distance", [80.0, 88.0, 95.0, 200.0, 5000.0])
def test_far_views_where_the_excess_overflows(backend: str, distance: float) -> None:
    z_p = make_views(rows=6, vocab=30).logits()[0].round()
    z_q = z_p.clone()
    z_q[:, 0] += distance
    z_p[:, 1] = z_p[:, 2:].amax(1) + 1
    check_logits(z_p, z_q, backend)


@pytest.mark.parametrize("depth", [60.0, 100.0, 130.0, 500.0])
def test_a_negligible_column_that_only_the_second_view_sees(backend: str, depth: float) -> None:
    """`exp(z_p - z_q)` overflows there, and yet the divergence is small."""
    z_p = make_views(rows=6, vocab=30).logits()[0]
    z_q = z_p + 0.01 * torch.randn(6, 30, generator=torch.Generator().manual_seed(1))
    z_q[:, 7] = z_q.amax(1) - torch.tensor([5.0, 7, 8, 9, 11, 13])
    z_p[:, 7] = z_p.amax(1) - depth
    assert reference.kl(z_p.double(), z_q.double()).max() < 0.1
    check_logits(z_p, z_q, backend)


# --- nothing to do


def test_all_rows_inactive_in_the_loss_from_hidden_states(backend: str) -> None:
    """Zero advantages, and no product over nothing: gradients are zeros of the right shape."""
    given = batch()
    del given["logprobs"]
    given["advantages"] = torch.zeros(4)
    leaves = [torch.randn(*shape, requires_grad=True) for shape in ((4, 6, 8), (50, 8), (50,))]
    with counted_products() as products:
        loss, metrics = linear_vppo_loss(
            *leaves[:2], torch.zeros(4, 6).long(), bias=leaves[2], **given, backend=backend
        )
        gradients = torch.autograd.grad(loss, leaves)
    assert sum(products) == 0
    assert loss == 0 and all(torch.isfinite(value) for value in metrics.values())
    assert [g.shape for g in gradients] == [x.shape for x in leaves] and not any(g.any() for g in gradients)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)], ids=str)
@pytest.mark.parametrize(
    "agg", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "token-sum", "none"]
)
def test_batches_of_nothing(backend: str, shape: tuple[int, int], agg: str) -> None:
    zeros, mask = torch.zeros(shape), torch.ones(shape, dtype=torch.bool)
    logprobs = zeros.clone().requires_grad_()
    loss, metrics = vppo_loss(logprobs, zeros, torch.zeros(shape[0]), mask, zeros, loss_agg=agg)
    assert loss.sum() == 0 and all(torch.isfinite(value) for value in metrics.values())
    loss.sum().backward()
    hidden, weight = torch.zeros(*shape, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    loss, _ = linear_vppo_loss(
        hidden,
        weight,
        zeros.long(),
        zeros,
        torch.zeros(shape[0]),
        mask,
        zeros,
        loss_agg=agg,
        nll_coef=1.0,
        backend=backend,
    )
    loss.sum().backward()
    assert hidden.grad is not None and weight.grad is not None and not weight.grad.any()
    assert topk_mask(zeros, mask, 0.4).shape == shape
    assert (trajectory_scale(zeros, mask) == 1).all()
