"""The statistics of a softmax as a monoid: how the vocabulary is cut into parts cannot matter."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vppo_kernels import reference
from vppo_kernels.backends import resolve
from vppo_kernels.reference import LOGPROB_BOUND, divergence_bound
from vppo_kernels.statistics import (
    PairStats,
    finish,
    finish_pair,
    merge,
    merge_pair,
    nothing,
    pack,
    unpack_pair_stats,
    unpack_stats,
)

ROWS = 5


def logits(seed: int, columns: int, dtype: torch.dtype = torch.float32, distance: float = 0.1) -> Tensor:
    """`[2, ROWS, columns]`, peaked; views `distance` apart, each row with an offset of its own between them."""
    g = torch.Generator().manual_seed(seed)
    z = 4 * torch.randn(ROWS, columns, generator=g, dtype=torch.float64)
    offset = torch.tensor([0.0, 1.0, -10.0, 0.0, 3.0]).unsqueeze(1)
    return torch.stack([z, z + distance * torch.randn(ROWS, columns, generator=g) + offset]).to(dtype)


def fold(backend: str, tile: Tensor, first: int = 0, targets: Tensor | None = None) -> PairStats:
    scratch = torch.full((3, *tile.shape[1:]), math.nan, dtype=tile.dtype)
    ops = resolve(backend, tile.device, tile.dtype).tiles
    empty = nothing(2, tile.shape[1], tile)
    return unpack_pair_stats(ops.fold_pair(tile.contiguous(), targets, first, empty, scratch))


def fold_parts(backend: str, tile: Tensor, cuts: list[int], targets: Tensor | None = None) -> list[PairStats]:
    edges = [0, *cuts, tile.shape[2]]
    return [fold(backend, tile[:, :, a:b], a, targets) for a, b in itertools.pairwise(edges)]


def leaves(stats: PairStats) -> list[Tensor]:
    return list(pack(stats))


def assert_close(a: PairStats, b: PairStats, tolerance: float) -> None:
    for x, y in zip(leaves(a), leaves(b), strict=True):
        assert torch.allclose(x, y, rtol=tolerance, atol=tolerance), (x, y)


cuts = st.lists(st.integers(1, 39), max_size=12, unique=True).map(sorted)


@given(st.integers(0, 10**6), cuts)
def test_merged_folds_are_the_fold_of_the_whole(seed: int, cuts: list[int]) -> None:
    tile, targets = logits(seed, 40, torch.float64), torch.arange(ROWS) * 9
    whole = fold("torch", tile, targets=targets)
    merged, *rest = fold_parts("torch", tile, cuts, targets)
    for part in rest:
        merged = merge_pair(merged, part)
    assert_close(merged, whole, 1e-10)


@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(21, 39))
def test_merge_is_associative_and_commutative(seed: int, first: int, second: int) -> None:
    a, b, c = fold_parts("torch", logits(seed, 40, torch.float64), [first, second], torch.arange(ROWS))
    assert_close(merge_pair(merge_pair(a, b), c), merge_pair(a, merge_pair(b, c)), 1e-10)
    assert_close(merge_pair(a, b), merge_pair(b, a), 1e-12)


def test_an_empty_part_is_the_identity(backend: str) -> None:
    part = fold(backend, logits(0, 20), targets=torch.arange(ROWS))
    empty = unpack_pair_stats(nothing(2, ROWS, torch.empty(0)))
    for merged in (merge_pair(part, empty), merge_pair(empty, part), merge_pair(merge_pair(empty, empty), part)):
        assert_close(merged, part, 1e-6)
    both = merge_pair(empty, empty)
    assert all(not torch.isnan(x).any() for x in leaves(both))
    assert (both.p.max == -math.inf).all() and not both.p.sum.any() and not both.excess.any()


@pytest.mark.parametrize("columns", [1, 3, 64, 1000])
@pytest.mark.parametrize("distance", [1e-3, 1e-2, 1.0])
def test_float32_stays_within_the_bounds_however_many_merges(backend: str, columns: int, distance: float) -> None:
    """One merge per vocabulary entry included, and views whose logits differ by a constant."""
    if backend != "torch" and columns < 64:
        pytest.skip("merges between tiles are torch's own; the interpreter would take minutes over as many tiles")
    tile, targets = logits(1, 1000, distance=distance), torch.arange(ROWS) * 200
    merged, *rest = fold_parts(backend, tile, list(range(columns, 1000, columns)), targets)
    for part in rest:
        merged = merge_pair(merged, part)
    pair = finish_pair(merged)
    truth = reference.divergence(*tile.double(), targets)
    assert ((pair.kl - truth.divergence).abs() <= divergence_bound(truth.divergence)).all()
    assert torch.allclose(pair.p.entropy.double(), truth.entropy, atol=LOGPROB_BOUND)
    assert torch.allclose(pair.q.entropy.double(), truth.entropy_perturbed, atol=LOGPROB_BOUND)
    assert truth.logprobs is not None and torch.allclose(pair.p.logprobs.double(), truth.logprobs, atol=LOGPROB_BOUND)
    z_p, z_q = (z - z.amax(-1, keepdim=True) for z in tile.double())
    mean_gap = (z_p.softmax(-1) * (z_p - z_q)).sum(-1)
    assert torch.allclose(pair.mean_diff.double(), mean_gap, atol=LOGPROB_BOUND)


@pytest.mark.parametrize("gap", [100.0, 1000.0, 20000.0])
def test_a_part_without_weight_takes_no_digits(backend: str, gap: float) -> None:
    """The views differ by `gap` in columns that neither gives any probability; the rest is a small divergence."""
    tile = logits(2, 64, distance=0.03)[:, :1]
    tile[0, :, :16] -= 200
    tile[1, :, :16] = tile[0, :, :16] - gap
    truth = reference.kl(*tile.double())
    for order in (fold_parts(backend, tile, [16]), fold_parts(backend, tile, [16])[::-1]):
        error = (finish_pair(merge_pair(*order)).kl - truth).abs()
        assert (error <= divergence_bound(truth)).all()


@pytest.mark.parametrize("depth", [150.0, 2e4])
@pytest.mark.parametrize("cut", [[], [63], [62, 63]])
def test_a_column_that_only_the_second_view_sees(backend: str, cut: list[int], depth: float) -> None:
    """`z_q` exceeds its place in p by far more than exp() can hold, yet the divergence is small."""
    tile = logits(3, 64, distance=0.0)[:, :1]
    tile[0, :, 63] = -depth
    tile[1, :, 63] = tile[1, :, :63].amax() - 9
    truth = reference.kl(*tile.double())
    assert 1e-6 < truth < 1e-3
    merged, *rest = fold_parts(backend, tile, cut)
    for part in rest:
        merged = merge_pair(merged, part)
    assert ((finish_pair(merged).kl - truth).abs() <= divergence_bound(truth)).all()


def test_one_view_merges_and_finishes_alone(backend: str) -> None:
    tile, targets = logits(4, 50)[0], torch.arange(ROWS) * 12
    ops, empty = resolve(backend, tile.device, tile.dtype).tiles, nothing(1, ROWS, tile)
    parts = [
        unpack_stats(ops.fold(tile[:, a:b].contiguous(), targets, a, empty.clone(), torch.empty(3, ROWS, b - a)))
        for a, b in ((0, 7), (7, 50))
    ]
    view = finish(merge(*parts))
    truth = reference.logprob_output(tile.double(), targets)
    assert torch.allclose(view.logprobs.double(), truth.logprobs, atol=LOGPROB_BOUND)
    assert torch.allclose(view.entropy.double(), truth.entropy, atol=LOGPROB_BOUND)
    assert torch.allclose(view.max + view.log_sum, tile.logsumexp(-1), atol=LOGPROB_BOUND)


def test_a_fold_leaves_its_tile_as_it_was(backend: str) -> None:
    tile = logits(5, 30)
    before = tile.clone()
    fold(backend, tile)
    assert torch.equal(tile, before)
