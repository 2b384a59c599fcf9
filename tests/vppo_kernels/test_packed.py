"""Packed trajectories (`cu_seqlens`): everything equals the same trajectories padded, values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vppo_kernels import (
    linear_vppo_loss,
    topk_mask,
    topk_mask_,
    trajectory_scale,
    trajectory_stats,
    vppo_advantages,
    vppo_loss,
)
from vppo_kernels.loss import AGGREGATIONS

few = settings(max_examples=12)  # a launch under the interpreter takes its time
V, D = 11, 4


class Trajectories:
    """Random trajectories of these lengths, padded to the longest, and end to end."""

    def __init__(self, lengths: list[int], seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        rows, width = len(lengths), max([*lengths, 0])
        self.inside = torch.arange(width) < torch.tensor(lengths).long()[:, None]
        self.offsets = torch.tensor([0, *lengths]).cumsum(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g)

        self.mask = (torch.rand(rows, width, generator=g) < 0.8) & self.inside
        logprobs = -normal(rows, width).abs()
        self.tokens = dict(
            logprobs=logprobs,
            old_logprobs=logprobs + 0.4 * normal(rows, width),
            dependency=normal(rows, width).square(),
            entropy=normal(rows, width).abs(),
            ref_logprobs=-normal(rows, width).abs(),
            is_weights=normal(rows, width).abs(),
        )
        self.hidden, self.weight = normal(rows, width, D), normal(V, D)
        self.targets = torch.randint(V, (rows, width), generator=g)
        self.advantages, self.per_token = normal(rows), normal(rows, width)
        self.has_image = torch.rand(rows, generator=g) < 0.7

    def pack(self, padded: Tensor) -> Tensor:
        return padded[self.inside]


trajectories = st.builds(Trajectories, st.lists(st.integers(0, 9), max_size=6), st.integers(0, 10**6))
example = Trajectories([3, 0, 9, 1, 0, 4], 0)


def close(packed: Tensor, padded: Tensor) -> None:
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-6)


@few
@given(trajectories, st.booleans(), st.booleans())
def test_shaping(backend_tokens: str, t: Trajectories, per_token: bool, images: bool) -> None:
    dependency, options = t.tokens["dependency"], dict[str, Any](backend=backend_tokens)
    flat, mask = t.pack(dependency), t.pack(t.mask)
    packing: dict[str, Any] = dict(cu_seqlens=t.offsets, **options)
    close(trajectory_scale(flat, mask, **packing), trajectory_scale(dependency, t.mask, **options))
    for got, expected in zip(
        trajectory_stats(flat, mask, **packing), trajectory_stats(dependency, t.mask, **options), strict=True
    ):
        close(got, expected)
    advantages = (t.pack(t.per_token), t.per_token) if per_token else (t.advantages, t.advantages)
    more: dict[str, Any] = dict(
        keep_ratio=0.6, keep_threshold=0.4, scale_max=1.2, has_image=t.has_image if images else None
    )
    if per_token and len(flat) == len(t.advantages):
        return  # as many tokens as trajectories: read as advantages of these
    got = vppo_advantages(advantages[0], flat, mask, **packing, **more)
    close(got, t.pack(vppo_advantages(advantages[1], dependency, t.mask, **options, **more)))


@few
@given(trajectories, st.sampled_from(AGGREGATIONS), st.booleans(), st.booleans())
def test_loss(backend_tokens: str, t: Trajectories, agg: str, every_term: bool, images: bool) -> None:
    options: dict[str, Any] = dict(loss_agg=agg, has_image=t.has_image if images else None, backend=backend_tokens)
    if every_term:
        options |= dict(nll_coef=0.1, entropy_coef=0.2, kl_coef=0.3, clip_dual=2.0)
    found = []
    for packed in (True, False):
        tokens = {name: t.pack(x) if packed else x for name, x in t.tokens.items()}
        leaves = [tokens[name].clone().requires_grad_() for name in ("logprobs", "entropy")]
        tokens |= dict(logprobs=leaves[0], entropy=leaves[1], mask=t.pack(t.mask) if packed else t.mask)
        more = dict(cu_seqlens=t.offsets) if packed else {}
        loss, metrics = vppo_loss(**tokens, advantages=t.advantages, **options, **more)
        gradients = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
        dense = [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, leaves, strict=True)]
        if not packed:
            dense = [t.pack(x) for x in dense]
            loss = t.pack(loss) if agg == "none" else loss
        found.append([loss.detach(), *dense, *metrics.values()])
    for got, expected in zip(*found, strict=True):
        close(got, expected)


@pytest.mark.parametrize("agg", AGGREGATIONS)
@pytest.mark.parametrize("every_term", [False, True])
def test_loss_from_hidden_states(backend: str, agg: str, every_term: bool) -> None:
    t = example
    options: dict[str, Any] = dict(loss_agg=agg, has_image=t.has_image, backend=backend)
    options |= dict(nll_coef=0.1, entropy_coef=0.2) if every_term else {}
    found = []
    for packed in (True, False):
        leaves = [x.clone().requires_grad_() for x in (t.pack(t.hidden) if packed else t.hidden, t.weight)]
        tokens = [t.targets, t.tokens["old_logprobs"], t.advantages, t.mask, t.tokens["dependency"]]
        if packed:
            tokens = [x if x.dim() == 1 else t.pack(x) for x in tokens]
        loss, metrics = linear_vppo_loss(*leaves, *tokens, cu_seqlens=t.offsets if packed else None, **options)
        hidden, weight = torch.autograd.grad(loss.sum(), leaves)
        if not packed:
            hidden, loss = t.pack(hidden), t.pack(loss) if agg == "none" else loss
        found.append([loss.detach(), hidden, weight, *metrics.values()])
    for got, expected in zip(*found, strict=True):
        close(got, expected)


def test_the_norm_of_packed_rows_is_the_longest_row(backend_tokens: str) -> None:
    """By hand: four tokens of advantage 1 and ratio 1, one of the longest row's three tokens masked."""
    zeros, mask = torch.zeros(5), torch.tensor([1, 1, 1, 0, 1])
    loss, _ = vppo_loss(
        zeros, zeros, torch.ones(2), mask, cu_seqlens=torch.tensor([0, 2, 5]), loss_agg="seq-mean-token-sum-norm",
        backend=backend_tokens,
    )  # fmt: skip
    assert float(loss) == pytest.approx(-4 / 3)


def test_tokens_that_unchecked_offsets_leave_out_are_padding(backend_tokens: str) -> None:
    """Before the first row and behind the last one, whatever stands there; nothing of it is read or kept."""
    t = Trajectories([3, 5], 1)
    around = (2, 4)

    def widen(x: Tensor, value: float) -> Tensor:
        return torch.nn.functional.pad(t.pack(x), around, value=value)

    nan, mask = float("nan"), torch.nn.functional.pad(t.pack(t.mask), around, value=True)
    packing: dict[str, Any] = dict(cu_seqlens=t.offsets + around[0], backend=backend_tokens, check=False)
    dependency = t.tokens["dependency"]
    keep = topk_mask(dependency, t.mask, 0.5)
    wide = torch.nn.functional.pad(t.pack(keep), around)
    assert torch.equal(topk_mask(widen(dependency, nan), mask, 0.5, **packing), wide)
    assert torch.equal(topk_mask_(widen(dependency, 7.0), mask, 0.5, **packing), wide.float())
    close(trajectory_scale(widen(dependency, nan), mask, **packing), trajectory_scale(dependency, t.mask))
    logprobs = widen(t.tokens["logprobs"], nan).requires_grad_()
    old = widen(t.tokens["old_logprobs"], nan)
    loss, metrics = vppo_loss(logprobs, old, t.advantages, mask, widen(dependency, nan), **packing)
    leaf = t.tokens["logprobs"].clone().requires_grad_()
    plain, expected = vppo_loss(leaf, t.tokens["old_logprobs"], t.advantages, t.mask, dependency)
    close(loss, plain)
    for name, value in metrics.items():
        close(value, expected[name])
    gradient, padded = torch.autograd.grad(loss, logprobs)[0], torch.autograd.grad(plain, leaf)[0]
    close(gradient, torch.nn.functional.pad(t.pack(padded), around))


@pytest.mark.parametrize("offsets", [[5, 3, 9], [-4, 2, 100], [7, 7, 7], [2**62, -(2**62), 3]], ids=str)
def test_unchecked_offsets_out_of_order_stay_within_the_tokens(backend_tokens: str, offsets: list[int]) -> None:
    values, mask = torch.rand(9), torch.ones(9)
    packing: dict[str, Any] = dict(cu_seqlens=torch.tensor(offsets), backend=backend_tokens, check=False)
    assert torch.isfinite(trajectory_scale(values, mask, **packing)).all()
    loss, _ = vppo_loss(-values, -values, torch.ones(2), mask, values, **packing)
    assert torch.isfinite(loss)
