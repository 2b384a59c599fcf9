"""Which tokens are kept: the definition, and what must not change the choice."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vppo_kernels import reference, topk_mask, topk_mask_
from vppo_kernels.selection import keep_counts

RATIOS = (0.4, 0.07, 0.1, 1 / 3, 1e-6, 1.0)
ratios = st.sampled_from((*RATIOS, 5e-324, 0.999999))


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Scores with many ties, and a mask with holes; rows and columns down to none."""
    rows, length = draw(st.integers(0, 5)), draw(st.integers(0, 17))
    g = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    levels = draw(st.sampled_from([1, 2, 5, 10**6]))
    scores = torch.randint(levels, (rows, length), generator=g) / levels - draw(st.sampled_from([0.0, 0.5]))
    mask = torch.rand(rows, length, generator=g) < draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
    return scores, mask


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_number_kept_is_the_exact_ceiling(ratio: float) -> None:
    lengths = torch.arange(2001)
    exact = [math.ceil(Fraction(str(ratio)) * n) for n in range(2001)]
    assert keep_counts(lengths, ratio).tolist() == exact
    assert [reference.keep_count(n, ratio) for n in range(2001)] == exact


@given(batches(), ratios)
def test_agrees_with_the_definition(batch: tuple[Tensor, Tensor], ratio: float) -> None:
    scores, mask = batch
    keep = topk_mask(scores, mask, ratio)
    assert keep.dtype == torch.bool and torch.equal(keep, reference.topk_mask(scores, mask, ratio))
    assert keep.sum(1).tolist() == [reference.keep_count(n, ratio) for n in mask.sum(1).tolist()]
    assert not keep[~mask].any()
    if keep.any():
        dropped = torch.where(mask & ~keep, scores, -math.inf).amax(1)
        assert (torch.where(keep, scores, math.inf).amin(1) >= dropped).all()


@given(batches(), ratios)
def test_in_place_gives_the_same(batch: tuple[Tensor, Tensor], ratio: float) -> None:
    scores, mask = batch
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        written = scores.to(dtype)
        expected = topk_mask(written, mask, ratio)
        assert topk_mask_(written, mask, ratio) is written
        assert torch.equal(written, expected.to(dtype))


@given(batches(), ratios, st.randoms(use_true_random=False))
def test_order_of_rows_and_of_distinct_tokens_does_not_matter(
    batch: tuple[Tensor, Tensor], ratio: float, random: object
) -> None:
    scores, mask = batch
    keep = topk_mask(scores, mask, ratio)
    rows, columns = (torch.tensor(random.sample(range(n), n), dtype=torch.long) for n in scores.shape)  # type: ignore[attr-defined]
    assert torch.equal(topk_mask(scores[rows], mask[rows], ratio), keep[rows])
    distinct = scores + torch.arange(scores.shape[1]) * 1e-3 % 0.0137  # no ties any more
    keep = topk_mask(distinct, mask, ratio)
    assert torch.equal(topk_mask(distinct[:, columns], mask[:, columns], ratio), keep[:, columns])


@given(batches(), ratios, st.integers(0, 6), st.integers(0, 6), st.sampled_from([math.nan, math.inf, -math.inf, 9.0]))
def test_padding_on_either_side_does_not_matter(
    batch: tuple[Tensor, Tensor], ratio: float, left: int, right: int, value: float
) -> None:
    scores, mask = batch
    length = scores.shape[1]
    padded = torch.nn.functional.pad(torch.where(mask, scores, value), (left, right), value=value)
    wider = torch.nn.functional.pad(mask, (left, right))
    keep = topk_mask(padded, wider, ratio)
    assert torch.equal(keep[:, left : left + length], topk_mask(scores, mask, ratio))
    assert keep.sum() == keep[:, left : left + length].sum()


def test_the_earlier_of_equals_wins() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0, 1.0], [0.0] * 6, [3.0, 0.0, -0.0, 0.0, 3.0, 0.0]])
    expected = [[0, 1, 1, 0, 1, 0], [1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 1, 0]]
    assert topk_mask(scores, torch.ones(3, 6), 0.5).int().tolist() == expected
    long = torch.zeros(1, 5000)
    assert topk_mask(long, torch.ones(1, 5000), 0.4)[0].nonzero().flatten().tolist() == list(range(2000))


def test_extremes_of_the_ratio() -> None:
    scores, mask = torch.rand(4, 50), torch.rand(4, 50) < 0.7
    assert torch.equal(topk_mask(scores, mask, 1.0), mask)
    assert torch.equal(topk_mask(scores, mask, 1), mask)
    one = topk_mask(scores, mask, 1e-12)
    assert (one.sum(1) == 1).all()
    assert torch.equal(one.float().argmax(1), torch.where(mask, scores, -1).argmax(1))
    assert topk_mask(torch.rand(1, 1), torch.ones(1, 1), 0.001).all()


def test_not_differentiable_and_the_scores_stay() -> None:
    scores = torch.rand(2, 9, requires_grad=True)
    before = scores.detach().clone()
    assert not topk_mask(scores, torch.ones(2, 9), 0.4).requires_grad
    assert torch.equal(scores, before)
    strided = torch.rand(9, 4).T[::2]
    expected = topk_mask(strided, torch.ones(2, 9), 0.4)
    assert torch.equal(topk_mask_(strided, torch.ones(2, 9), 0.4), expected.float())
