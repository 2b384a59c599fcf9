"""Which tokens are kept: the definition, and what must not change the choice."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vppo_kernels import reference, topk_mask, topk_mask_
from vppo_kernels.backends import available
from vppo_kernels.backends.torch_tokens import keep_counts

few = settings(max_examples=15)  # a launch under the interpreter takes its time
RATIOS = (0.4, 0.07, 0.1, 1 / 3, 1e-6, 1.0)
ratios = st.sampled_from((*RATIOS, 5e-324, 0.999999))


@pytest.fixture(autouse=True, scope="module")
def several_blocks() -> Iterator[None]:
    """Rows of these tests reach over more than one block of a kernel."""
    with pytest.MonkeyPatch.context() as patch:
        if "triton" in available():
            patch.setattr("vppo_kernels.backends.triton_tokens.KEYS", 16)
        yield


@pytest.fixture
def one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many scores at once as the interpreter takes."""
    if "triton" in available():
        monkeypatch.setattr("vppo_kernels.backends.triton_tokens.KEYS", 16384)


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


@pytest.mark.parametrize("ratio", RATIOS)
def test_every_backend_counts_alike(backend_tokens: str, ratio: float, one_block: None) -> None:
    lengths = torch.tensor([1, 7, 99, 100, 1999, 2000])
    mask = torch.arange(2000) < lengths[:, None]
    kept = topk_mask(torch.rand(mask.shape), mask, ratio, backend=backend_tokens).sum(1)
    assert kept.tolist() == keep_counts(lengths, ratio).tolist()


@given(batches(), ratios)
def test_agrees_with_the_definition(backend_tokens: str, batch: tuple[Tensor, Tensor], ratio: float) -> None:
    scores, mask = batch
    keep = topk_mask(scores, mask, ratio, backend=backend_tokens)
    assert keep.dtype == torch.bool and torch.equal(keep, reference.topk_mask(scores, mask, ratio))
    assert keep.sum(1).tolist() == [reference.keep_count(n, ratio) for n in mask.sum(1).tolist()]
    assert not keep[~mask].any()
    if keep.any():
        dropped = torch.where(mask & ~keep, scores, -math.inf).amax(1)
        assert (torch.where(keep, scores, math.inf).amin(1) >= dropped).all()


@few
@given(batches(), ratios)
def test_in_place_gives_the_same(backend_tokens: str, batch: tuple[Tensor, Tensor], ratio: float) -> None:
    scores, mask = batch
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        if dtype == torch.float64 and backend_tokens != "torch":
            continue
        written = scores.to(dtype)
        expected = topk_mask(written, mask, ratio)
        assert topk_mask_(written, mask, ratio, backend=backend_tokens) is written
        assert torch.equal(written, expected.to(dtype))


@few
@given(batches(), ratios, st.sampled_from([torch.int32, torch.int64]))
def test_packed_rows_equal_padded_ones(
    backend_tokens: str, batch: tuple[Tensor, Tensor], ratio: float, dtype: torch.dtype
) -> None:
    """Rows of unequal length, empty ones among them, end to end."""
    scores, mask = batch
    rows, width = scores.shape
    lengths = torch.arange(rows) * 7 % (width + 1)
    inside = torch.arange(width) < lengths[:, None]
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(dtype)
    expected = topk_mask(scores, mask & inside, ratio)[inside]
    packed, packed_mask = scores[inside], mask[inside]
    options = dict(cu_seqlens=offsets, backend=backend_tokens)
    assert torch.equal(topk_mask(packed, packed_mask, ratio, **options), expected)
    assert torch.equal(topk_mask_(packed, packed_mask, ratio, **options), expected.float())


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


@few
@given(batches(), ratios, st.integers(0, 6), st.integers(0, 6), st.sampled_from([math.nan, math.inf, -math.inf, 9.0]))
def test_padding_on_either_side_does_not_matter(
    backend_tokens: str, batch: tuple[Tensor, Tensor], ratio: float, left: int, right: int, value: float
) -> None:
    scores, mask = batch
    length = scores.shape[1]
    padded = torch.nn.functional.pad(torch.where(mask, scores, value), (left, right), value=value)
    wider = torch.nn.functional.pad(mask, (left, right))
    keep = topk_mask(padded, wider, ratio, backend=backend_tokens)
    assert torch.equal(keep[:, left : left + length], topk_mask(scores, mask, ratio))
    assert keep.sum() == keep[:, left : left + length].sum()


thresholds = st.sampled_from([None, 0.0, 0.2, 0.5, 1e-45, 3.4e38])


@given(batches(), ratios, thresholds)
def test_of_the_highest_only_those_above_the_threshold(
    backend_tokens: str, batch: tuple[Tensor, Tensor], ratio: float, threshold: float | None
) -> None:
    """Strictly above it, also where it is one of the scores; never more than without it."""
    scores, mask = batch
    options: dict[str, Any] = dict(keep_threshold=threshold, backend=backend_tokens)
    keep = topk_mask(scores, mask, ratio, **options)
    assert torch.equal(keep, reference.topk_mask(scores, mask, ratio, threshold))
    assert torch.equal(
        topk_mask(scores, mask, 1.0, **options), mask & (scores > (-math.inf if threshold is None else threshold))
    )
    plain = topk_mask(scores, mask, ratio, backend=backend_tokens)
    assert torch.equal(keep, plain if threshold is None else plain & (scores > threshold))


@few
@given(batches(), ratios, thresholds)
def test_a_threshold_in_place_and_packed(
    backend_tokens: str, batch: tuple[Tensor, Tensor], ratio: float, threshold: float | None
) -> None:
    scores, mask = batch
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        if dtype == torch.float64 and backend_tokens != "torch":
            continue
        written = torch.where(mask, scores, math.nan).to(dtype)
        as_read = written.float() if written.dtype.itemsize < 4 else written
        expected = reference.topk_mask(as_read, mask, ratio, threshold)
        offsets = torch.arange(len(scores) + 1) * scores.shape[1]
        packed = topk_mask(
            written.flatten(),
            mask.flatten(),
            ratio,
            keep_threshold=threshold,
            cu_seqlens=offsets,
            backend=backend_tokens,
        )
        assert torch.equal(packed.view(mask.shape), expected)
        assert topk_mask_(written, mask, ratio, keep_threshold=threshold, backend=backend_tokens) is written
        assert torch.equal(written, expected.to(dtype))


def test_a_threshold_of_16_bits_is_read_in_float32(backend_tokens: str) -> None:
    """0.3 is 0.30078125 in bfloat16, which exceeds it."""
    scores = torch.tensor([[0.3, 0.2], [0.25, 0.25]], dtype=torch.bfloat16)
    keep = topk_mask(scores, torch.ones(2, 2), 1.0, keep_threshold=0.3, backend=backend_tokens)
    assert keep.tolist() == [[True, False], [False, False]]
    exact = topk_mask(scores, torch.ones(2, 2), 1.0, keep_threshold=0.25, backend=backend_tokens)
    assert exact.tolist() == [[True, False], [False, False]]


def test_unchecked_values_beside_a_threshold(backend_tokens: str) -> None:
    """A NaN exceeds every threshold, as it ranks above every number; so does inf; -inf and zeros of either sign do not
    exceed 0.
    """
    nan, inf = math.nan, math.inf
    scores = torch.tensor([[-inf, nan, inf, 0.0], [-nan, -0.0, 1e-45, -1.0]])
    for threshold, kept in ((0.0, [[1, 2], [0, 2]]), (3e38, [[1, 2], [0]])):
        options: dict[str, Any] = dict(keep_threshold=threshold, backend=backend_tokens, check=False)
        keep = topk_mask(scores, torch.ones(2, 4), 1.0, **options)
        assert [row.nonzero().flatten().tolist() for row in keep] == kept
    with pytest.raises(ValueError, match="scores: "):
        topk_mask(scores, torch.ones(2, 4), 1.0, keep_threshold=0.1, backend=backend_tokens, check=True)


def test_the_earlier_of_equals_wins(backend_tokens: str) -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0, 1.0], [0.0] * 6, [3.0, 0.0, -0.0, 0.0, 3.0, 0.0]])
    expected = [[0, 1, 1, 0, 1, 0], [1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 1, 0]]
    assert topk_mask(scores, torch.ones(3, 6), 0.5, backend=backend_tokens).int().tolist() == expected
    keep = topk_mask(torch.zeros(1, 500), torch.ones(1, 500), 0.4, backend=backend_tokens)
    assert keep[0].nonzero().flatten().tolist() == list(range(200))


def test_unchecked_values_are_ranked(backend_tokens: str) -> None:
    """NaN of either sign above inf, -inf below every number, and neither confused with padding."""
    nan, inf = math.nan, math.inf
    scores = torch.tensor([[-inf, 5.0, nan, inf, -nan, -inf], [nan, -inf, nan, -3.4e38, -inf, 1e-45]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 1]])
    for ratio, kept in ((0.3, [[2, 4], [3, 5]]), (0.5, [[2, 3, 4], [3, 5]]), (0.7, [[1, 2, 3, 4, 0], [1, 3, 5]])):
        keep = topk_mask(scores, mask, ratio, backend=backend_tokens, check=False)
        assert [row.nonzero().flatten().tolist() for row in keep] == [sorted(row) for row in kept]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_rows(backend_tokens: str, dtype: torch.dtype, one_block: None) -> None:
    """131,072 tokens; in bfloat16 with thousands of ties at the threshold."""
    g = torch.Generator().manual_seed(0)
    length = 131_072
    scores = torch.rand(1, length, generator=g).to(dtype)
    mask = torch.rand(1, length, generator=g) < 0.9
    keep = topk_mask(scores, mask, 0.4, backend=backend_tokens)
    places = mask[0].nonzero().flatten()
    best = scores[0, places].float().numpy()
    order = (-best).argsort(kind="stable")[: math.ceil(0.4 * len(places))]
    assert torch.equal(keep[0].nonzero().flatten(), places[torch.from_numpy(order)].sort().values)


def test_extremes_of_the_ratio(backend_tokens: str) -> None:
    scores, mask = torch.rand(2, 50), torch.rand(2, 50) < 0.7
    assert torch.equal(topk_mask(scores, mask, 1.0, backend=backend_tokens), mask)
    assert torch.equal(topk_mask(scores, mask, 1, backend=backend_tokens), mask)
    one = topk_mask(scores, mask, 1e-12, backend=backend_tokens)
    assert (one.sum(1) == 1).all()
    assert torch.equal(one.float().argmax(1), torch.where(mask, scores, -1).argmax(1))
    assert topk_mask(torch.rand(1, 1), torch.ones(1, 1), 0.001, backend=backend_tokens).all()


def test_not_differentiable_and_the_scores_stay(backend_tokens: str) -> None:
    scores = torch.rand(2, 9, requires_grad=True)
    before = scores.detach().clone()
    assert not topk_mask(scores, torch.ones(2, 9), 0.4, backend=backend_tokens).requires_grad
    assert torch.equal(scores, before)
    strided = torch.rand(9, 4).T[::2]
    expected = topk_mask(strided, torch.ones(2, 9), 0.4)
    assert torch.equal(topk_mask_(strided, torch.ones(2, 9), 0.4, backend=backend_tokens), expected.float())


def test_autograd_knows_that_scores_were_overwritten(backend_tokens: str) -> None:
    """As by any operation in place: a backward that needs them raises, and nothing forbids leaves."""
    leaf = torch.rand(2, 9, requires_grad=True)
    scores = leaf * 1.0
    squares, version = scores.square(), scores._version
    topk_mask_(scores, torch.ones(2, 9), 0.4, backend=backend_tokens)
    assert scores._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.sum().backward()
    assert topk_mask_(leaf, torch.ones(2, 9), 0.4, backend=backend_tokens) is leaf and leaf.requires_grad


def test_tensors_of_inference_mode_are_overwritten_in_it_only(backend_tokens: str) -> None:
    mask = torch.ones(2, 9)
    with torch.inference_mode():
        scores = torch.rand(2, 9)
        before = scores.clone()
        topk_mask_(scores.clone(), mask, 0.4, backend=backend_tokens)
    with pytest.raises(RuntimeError, match="inference tensor"):
        topk_mask_(scores, mask, 0.4, backend=backend_tokens)
    assert torch.equal(scores, before)
