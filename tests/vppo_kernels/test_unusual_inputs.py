"""Inputs that look like others and are not: views that torch reads in its own way, extreme numbers, tangents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vppo_kernels import (
    divergence,
    linear_divergence,
    linear_logprob,
    linear_vppo_loss,
    topk_mask,
    topk_mask_,
    trajectory_scale,
    vppo_advantages,
    vppo_loss,
)

DTYPES = (torch.float32, torch.bfloat16)
TARGETS, MASK = torch.arange(6), torch.ones(2, 3)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "cut", [(slice(None, None, 2), slice(8)), (slice(6), slice(None, None, 2))], ids=["rows", "columns"]
)
def test_rows_that_lie_apart(backend: str, cut: tuple[slice, slice], dtype: torch.dtype) -> None:
    """Hidden states cut out of others: every second row, and every second number of a row."""
    hidden, weight = draw(12, 16).to(dtype)[cut], draw(30, 8, seed=1).to(dtype)
    got = linear_logprob(hidden, weight, TARGETS, backend=backend)
    expected = linear_logprob(hidden.contiguous(), weight, TARGETS, backend=backend)
    torch.testing.assert_close(tuple(got), tuple(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_all_the_same_memory(backend: str, dtype: torch.dtype) -> None:
    """Expanded hidden states, and an expanded weight."""
    hidden, weight = draw(1, 8).to(dtype).expand(6, 8), draw(1, 8, seed=1).to(dtype).expand(30, 8)
    for h, w in ((hidden, draw(30, 8).to(dtype)), (draw(6, 8).to(dtype), weight)):
        got = linear_logprob(h, w, TARGETS, backend=backend)
        expected = linear_logprob(h.clone(), w.contiguous(), TARGETS, backend=backend)
        # not to the last bit: how a product of float32 is summed may follow from where its operands lie
        torch.testing.assert_close(tuple(got), tuple(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_that_are_negated_when_they_are_read(backend: str, dtype: torch.dtype) -> None:
    """As the imaginary part of a conjugate is: the memory behind it has the other sign."""
    hidden, weight = draw(6, 8).to(dtype), draw(30, 8, seed=1).to(dtype)

    def results(h: Tensor, w: Tensor) -> list[Tensor]:
        leaves = [h.requires_grad_(), w.requires_grad_()]
        pair = linear_divergence(h, 0.9 * h, w, backend=backend)
        single = linear_logprob(h, w, TARGETS, backend=backend)
        total = pair.divergence.sum() + single.logprobs.sum()
        return [pair.divergence, single.logprobs, *torch.autograd.grad(total, leaves)]

    got = results(torch._neg_view(hidden), torch._neg_view(weight))
    for a, b in zip(got, results(-hidden, -weight), strict=True):
        assert torch.equal(a, b)


def test_tokens_that_are_negated_when_they_are_read(backend_tokens: str) -> None:
    scores, options = draw(2, 3).abs(), dict[str, Any](backend=backend_tokens)
    lazy: Callable[[Tensor], Tensor] = lambda x: torch._neg_view(x.clone())  # noqa: E731
    keep = topk_mask(-scores, MASK, 0.4)
    assert torch.equal(topk_mask(lazy(scores), MASK, 0.4, **options), keep)
    written = lazy(scores)
    assert torch.equal(topk_mask_(written, MASK, 0.4, **options).resolve_neg(), keep.float())
    found = []
    for negate in (lazy, torch.neg):
        logprobs = negate(scores).requires_grad_()
        advantages, dependency = negate(scores[:, 0]), negate(scores)
        shaped = vppo_advantages(advantages, dependency, MASK, **options)
        loss, _ = vppo_loss(logprobs, negate(0.9 * scores), advantages, MASK, dependency, **options)
        found.append([shaped, loss, *torch.autograd.grad(loss, logprobs, negate(torch.ones(())))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_check_knows_how_large_the_terms_of_a_logit_are(backend: str, dtype: torch.dtype) -> None:
    """The largest float16 numbers: terms of 65,504 cancel, and leave more rounding than the logit's size tells."""
    signs = draw(6, 1536).sign()
    signs[:, 1::2] = -signs[:, ::2]
    hidden = (65504 * signs).half()
    weight = draw(1, 1536, seed=1).abs().expand(40, 1536) + 1e-3 * draw(40, 1536, seed=2)
    weight = weight.repeat_interleave(2, 1)[:, :1536].to(dtype)
    linear_logprob(hidden, weight, TARGETS, backend=backend, check=True)
    linear_divergence(hidden, hidden.flip(1), weight, backend=backend, check=True)


def test_scores_whose_mean_overflows_are_refused(backend_tokens: str) -> None:
    scores = torch.tensor([[3e38, 3e38, 1.0], [1.0, 2.0, 3.0]])
    with pytest.raises(ValueError, match=r"scores: got 3\.0\d*e\+38 at row 0 .* takes values up to"):
        trajectory_scale(scores, MASK, backend=backend_tokens)
    for function in (
        lambda: vppo_advantages(torch.ones(2), scores, MASK, backend=backend_tokens),
        lambda: vppo_loss(-scores / 1e38, -scores / 1e38, torch.ones(2), MASK, scores, backend=backend_tokens),
    ):
        with pytest.raises(ValueError, match=r"dependency: got 3\.0"):
            function()
    masked = torch.tensor([[0, 0, 1], [1, 1, 1]])
    assert torch.isfinite(vppo_advantages(torch.ones(2), scores, masked, backend=backend_tokens)).all()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (dict(temperature=1e-41), "temperature"),
        (dict(temperature=1e-31), "temperature"),
        (dict(logit_scale=1e31), "temperature"),
        (dict(softcap=1e-41), "softcap"),
        (dict(softcap=1e5, temperature=1e-30), "temperature"),
    ],
    ids=str,
)
def test_factors_beyond_single_precision_are_refused(options: dict[str, float], name: str) -> None:
    z = draw(2, 5)
    with pytest.raises(ValueError, match=f"{name}: got .* takes a number for which .* is at most 1e\\+30"):
        divergence(z, z + 1, **options)


def test_a_very_small_temperature_is_right(backend: str) -> None:
    """It leaves one token."""
    z = draw(2, 5)
    both = divergence(z, z, targets=z.argmax(1), temperature=1e-28, backend=backend)
    assert torch.equal(both.divergence, torch.zeros(2)) and torch.equal(both.entropy, torch.zeros(2))
    assert both.logprobs is not None and torch.equal(both.logprobs, torch.zeros(2))


def test_forward_mode_is_refused(backend: str) -> None:
    """A tangent would be lost: the derivative would be 0 without a word."""
    hidden, weight, old = draw(2, 3, 8), draw(30, 8), -torch.ones(2, 3)
    targets = TARGETS.view(2, 3)
    operations: list[Callable[[Tensor], Tensor]] = [
        lambda h: linear_logprob(h, weight, targets, backend=backend).logprobs,
        lambda h: linear_divergence(hidden, h, weight, backend=backend).divergence,
        lambda h: linear_divergence(hidden, hidden, h.flatten(0, 1), backend=backend).divergence,
        lambda h: divergence(hidden, h, backend=backend).divergence,
        lambda h: linear_vppo_loss(h, weight, targets, old, torch.ones(2), MASK, backend=backend)[0],
    ]
    for operation in operations:
        with pytest.raises(NotImplementedError, match="forward-mode differentiation"):
            torch.func.jvp(operation, (hidden,), (torch.ones_like(hidden),))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(hidden, torch.ones_like(hidden))
            with pytest.raises(NotImplementedError, match="forward-mode differentiation"):
                operation(dual)


def test_forward_mode_of_the_loss_from_log_probabilities(backend_tokens: str) -> None:
    """Plain torch has it; kernels refuse."""
    logprobs = -draw(2, 3).abs()

    def loss(x: Tensor) -> Tensor:
        return vppo_loss(x, logprobs - 0.1, torch.ones(2), MASK, backend=backend_tokens, check=False)[0]

    if backend_tokens != "triton":
        _, tangent = torch.func.jvp(loss, (logprobs,), (torch.ones_like(logprobs),))
        leaf = logprobs.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf), leaf)
        torch.testing.assert_close(tangent, gradient.sum())
    else:
        with pytest.raises(NotImplementedError, match="forward-mode differentiation"):
            torch.func.jvp(loss, (logprobs,), (torch.ones_like(logprobs),))


def test_which_rows_the_native_product_takes_as_they_are() -> None:
    """Entries beside each other, rows one after the other; on any machine, also one that cannot multiply them."""
    from vppo_kernels.backends.native import _rows_apart

    x = draw(6, 8)
    assert _rows_apart(x) and _rows_apart(x[::2]) and _rows_apart(x[:, 2:5]) and _rows_apart(x[:1].expand(1, 8))
    assert not (_rows_apart(x[:1].expand(6, 8)) or _rows_apart(x.T) or _rows_apart(x.as_strided((4, 8), (4, 1))))
