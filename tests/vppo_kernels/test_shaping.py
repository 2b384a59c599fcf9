"""Trajectory factors and shaped advantages: the definition, invariances, statistics from elsewhere and over ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vppo_kernels import (
    TrajectoryStats,
    reference,
    topk_mask,
    trajectory_scale,
    trajectory_stats,
    vppo_advantages,
)
from vppo_kernels.shaping import shape_advantages


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    rows, length = draw(st.integers(0, 6)), draw(st.integers(1, 12))
    g = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    scores = torch.rand(rows, length, generator=g) * draw(st.sampled_from([0.0, 1e-7, 0.1, 10.0]))
    mask = torch.rand(rows, length, generator=g) < draw(st.sampled_from([0.1, 0.6, 1.0]))
    return scores, mask


scales = st.sampled_from([(0.9, None), (0.5, None), (0.9, 1.1), (1.0, 2.0), (0.2, 0.3)])


@given(batches(), scales)
def test_alpha_agrees_with_the_definition(
    backend_tokens: str, batch: tuple[Tensor, Tensor], scale: tuple[float, float | None]
) -> None:
    scores, mask = batch
    alpha = trajectory_scale(scores, mask, scale_min=scale[0], scale_max=scale[1], backend=backend_tokens)
    expected = reference.trajectory_scale(scores.double(), mask, *scale)
    assert alpha.shape == (len(scores),) and alpha.dtype == torch.float32
    # means one rounding apart are spread over the whole range where the spread is tiny
    assert torch.allclose(alpha.double(), expected, atol=1e-4)
    double = trajectory_scale(scores.double(), mask, scale_min=scale[0], scale_max=scale[1])
    assert double.dtype == torch.float64 and torch.allclose(double, expected, atol=1e-9)


@given(batches(), st.floats(0.1, 1.0))
def test_dynamic_scale_has_mean_one_and_starts_at_scale_min(batch: tuple[Tensor, Tensor], low: float) -> None:
    scores, mask = batch
    alpha = trajectory_scale(scores.double(), mask, scale_min=low)
    rows = mask.any(1)
    assert (alpha[~rows] == 1).all()
    if rows.any():
        assert math.isclose(float(alpha[rows].mean()), 1, rel_tol=1e-9)
        shaped = (alpha[rows] != 1).any()
        assert not shaped or math.isclose(float(alpha[rows].min()), low, rel_tol=1e-9)


@given(batches(), scales, st.randoms(use_true_random=False), st.integers(0, 4), st.sampled_from([math.nan, 7.0]))
def test_order_and_padding_do_not_matter(
    batch: tuple[Tensor, Tensor], scale: tuple[float, float | None], random: Any, pad: int, value: float
) -> None:
    scores, mask = batch[0].double(), batch[1]
    advantages = torch.randn(len(scores), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    options = dict(scale_min=scale[0], scale_max=scale[1])
    shaped = vppo_advantages(advantages, scores, mask, **options)
    rows = torch.tensor(random.sample(range(len(scores)), len(scores)), dtype=torch.long)
    moved = vppo_advantages(advantages[rows], scores[rows], mask[rows], **options)
    assert torch.allclose(moved, shaped[rows], rtol=1e-9)
    padded = torch.nn.functional.pad(torch.where(mask, scores, value), (pad, 2), value=value)
    wider = vppo_advantages(advantages, padded, torch.nn.functional.pad(mask, (pad, 2)), **options)
    length = scores.shape[1]
    assert torch.allclose(wider[:, pad : pad + length], shaped, rtol=1e-9)
    assert not wider[:, :pad].any() and not wider[:, pad + length :].any()


@settings(max_examples=12)  # a launch under the interpreter takes its time
@given(
    batches(),
    scales,
    st.sampled_from([0.4, 1e-9, 1.0]),
    st.sampled_from([None, 0.3]),
    st.booleans(),
    st.sampled_from(["float32", "bfloat16"]),
)
def test_advantages_are_alpha_times_advantage_times_mask(
    backend_tokens: str,
    batch: tuple[Tensor, Tensor],
    scale: tuple[float, float | None],
    ratio: float,
    threshold: float | None,
    per_token: bool,
    dtype: str,
) -> None:
    scores, mask = batch
    g = torch.Generator().manual_seed(1)
    advantages = torch.randn(scores.shape if per_token else scores.shape[:1], generator=g).to(getattr(torch, dtype))
    options: dict[str, Any] = dict(scale_min=scale[0], scale_max=scale[1], backend=backend_tokens)
    gate: dict[str, Any] = dict(keep_ratio=ratio, keep_threshold=threshold)
    shaped = shape_advantages(advantages, scores, mask, **gate, **options)
    keep, alpha = topk_mask(scores, mask, **gate, backend="torch"), trajectory_scale(scores, mask, **options)
    expanded = advantages if per_token else advantages.unsqueeze(1).expand_as(scores)
    assert torch.equal(shaped.keep, keep) and torch.equal(shaped.alpha, alpha)
    assert torch.equal(shaped.advantages, torch.where(keep, expanded * alpha.unsqueeze(1).to(advantages.dtype), 0))
    assert torch.equal(vppo_advantages(advantages, scores, mask, **gate, **options), shaped.advantages)
    assert shaped.advantages.dtype == advantages.dtype


def test_single_trajectory_and_small_spread_are_not_shaped(backend_tokens: str) -> None:
    scores = torch.rand(1, 8)
    assert trajectory_scale(scores, torch.ones(1, 8), backend=backend_tokens).tolist() == [1.0]
    one_full = torch.zeros(3, 8)
    one_full[1] = 1
    assert trajectory_scale(torch.rand(3, 8), one_full, backend=backend_tokens).tolist() == [1.0] * 3
    narrow, wide = (torch.tensor([[0.0], [0.5], [1.0]]) * spread for spread in (0.9e-6, 1.1e-6))
    assert (trajectory_scale(narrow, torch.ones(3, 1), backend=backend_tokens) == 1).all()
    assert torch.allclose(
        trajectory_scale(wide, torch.ones(3, 1), backend=backend_tokens), torch.tensor([0.9, 1.0, 1.1])
    )
    base = torch.tensor([[0.25], [0.25], [0.25]], dtype=torch.float64)
    for spread, shaped in ((0.0, False), (0.9e-6, False), (1.1e-6, True)):
        alpha = trajectory_scale(base + spread * torch.tensor([[0.0], [0.5], [1.0]]), torch.ones(3, 1))
        assert ((alpha != 1).any() == shaped) and torch.allclose(alpha.mean(), torch.ones((), dtype=torch.float64))


def test_alpha_by_hand(backend_tokens: str) -> None:
    scores = torch.tensor([[0.0, 0.2], [0.5, 9.0], [0.4, 0.2]])
    mask = torch.tensor([[1, 1], [1, 0], [1, 1]])
    # means 0.1, 0.5, 0.3: u = 0, 1, 1/2
    options: dict[str, Any] = dict(backend=backend_tokens)
    assert torch.allclose(trajectory_scale(scores, mask, **options), torch.tensor([0.9, 1.1, 1.0]))
    assert torch.allclose(trajectory_scale(scores, mask, scale_max=1.3, **options), torch.tensor([0.9, 1.3, 1.1]))
    stats = trajectory_stats(scores, mask, **options)
    assert [round(float(x), 6) for x in stats] == [0.1, 0.5, 0.3, 3]
    given_stats = TrajectoryStats(0.0, 0.5, 0.25)
    alpha = trajectory_scale(scores, mask, stats=given_stats, scale_max=1.9, **options)
    assert torch.allclose(alpha, torch.tensor([1.1, 1.9, 1.5]))


def test_an_unchecked_nan_reaches_every_alpha(backend_tokens: str) -> None:
    scores, mask = torch.rand(4, 5), torch.ones(4, 5)
    scores[2, 1], mask[3] = math.nan, 0
    alpha = trajectory_scale(scores, mask, backend=backend_tokens, check=False)
    assert alpha.isnan().tolist() == [True, True, True, False] and alpha[3] == 1


def test_many_rows_and_long_ones(backend_tokens: str) -> None:
    """More of both than a program takes at a time."""
    for shape in ((1500, 3), (3, 2500)):
        scores = torch.rand(shape)
        mask = torch.rand(shape) < 0.5
        scores[~mask] = math.nan
        alpha = trajectory_scale(scores, mask, backend=backend_tokens)
        expected = trajectory_scale(scores.double(), mask)
        assert torch.allclose(alpha.double(), expected, atol=2e-5)
        backend = backend_tokens if len(scores) < 10 else "torch"  # a program per row is slow when interpreted
        shaped = vppo_advantages(-torch.ones(shape), scores, mask, keep_ratio=1.0, backend=backend)
        assert torch.allclose(shaped, torch.where(mask, -expected.unsqueeze(1), 0.0).float(), atol=2e-5)


@given(batches(), scales)
def test_statistics_passed_in_are_those_used(batch: tuple[Tensor, Tensor], scale: tuple[float, float | None]) -> None:
    scores, mask = batch[0].double(), batch[1]
    options = dict(scale_min=scale[0], scale_max=scale[1])
    own = trajectory_stats(scores, mask)
    whole = trajectory_scale(scores, mask, **options)
    assert torch.equal(trajectory_scale(scores, mask, stats=own, **options), whole)
    assume(len(scores) > 1)
    parts = [trajectory_scale(scores[i : i + 1], mask[i : i + 1], stats=own, **options) for i in range(len(scores))]
    assert torch.allclose(torch.cat(parts), whole, rtol=1e-12)
    numbers = TrajectoryStats(*(float(x) for x in own))
    assert torch.allclose(trajectory_scale(scores, mask, stats=numbers, **options), whole, rtol=1e-12)


def test_text_only_rows_are_left_out(backend_tokens: str) -> None:
    scores, mask, advantages = torch.rand(4, 6), torch.ones(4, 6), torch.randn(4)
    has_image = torch.tensor([1, 0, 1, 1])
    shaped = shape_advantages(advantages, scores, mask, has_image=has_image, backend=backend_tokens)
    seen = [0, 2, 3]
    alone = shape_advantages(advantages[seen], scores[seen], mask[seen], backend=backend_tokens)
    torch.testing.assert_close(shaped.alpha[seen], alone.alpha)  # their sums may be made in another order
    assert shaped.alpha[1] == 1
    assert torch.equal(shaped.keep[seen], alone.keep) and shaped.keep[1].all()
    gated = shape_advantages(advantages, scores, mask, has_image=has_image, keep_threshold=1.0, backend=backend_tokens)
    assert gated.keep.sum(1).tolist() == [0, 6, 0, 0]  # what was never measured exceeds nothing and is not filtered
    none = shape_advantages(advantages, scores, mask, has_image=torch.zeros(4), backend=backend_tokens)
    assert torch.equal(none.advantages, advantages.unsqueeze(1).expand(4, 6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_scores_are_averaged_in_float32(backend_tokens: str, dtype: torch.dtype) -> None:
    scores = torch.rand(3, 3000).to(dtype) * 60
    alpha = trajectory_scale(scores, torch.ones(3, 3000), backend=backend_tokens)
    assert alpha.dtype == torch.float32
    assert torch.allclose(alpha.double(), reference.trajectory_scale(scores.double(), torch.ones(3, 3000)), atol=1e-4)
    assert vppo_advantages(torch.ones(3, dtype=dtype), scores, torch.ones(3, 3000)).dtype == dtype


# --- two processes

SCORES = torch.rand(6, 5, generator=torch.Generator().manual_seed(4))
MASK = torch.rand(6, 5, generator=torch.Generator().manual_seed(5)) < 0.6
MASK[4:] = False
SPLITS = ((slice(0, 2), slice(2, 6)), (slice(0, 4), slice(4, 6)), (slice(0, 0), slice(0, 6)))


def _rank(rank: int, store: str) -> None:
    """What each process computes: its slice of the batch, shaped by the statistics of both."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        group, advantages = dist.group.WORLD, torch.arange(1.0, 7.0)
        whole = shape_advantages(advantages, SCORES, MASK)
        for split in SPLITS:
            part = split[rank]
            stats = trajectory_stats(SCORES[part], MASK[part], stats_group=group)
            torch.testing.assert_close(tuple(stats), tuple(trajectory_stats(SCORES, MASK)))
            alpha = trajectory_scale(SCORES[part], MASK[part], stats_group=group)
            torch.testing.assert_close(alpha, whole.alpha[part])
            with pytest.raises(ValueError, match="stats: given together with stats_group"):
                vppo_advantages(advantages[part], SCORES[part], MASK[part], stats=stats, stats_group=group)
            part_shaped = vppo_advantages(advantages[part], SCORES[part], MASK[part], stats_group=group)
            torch.testing.assert_close(part_shaped, whole.advantages[part])
    finally:
        dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Ranks with unequal shares, with a share of empty rows, and with none at all."""
    torch.multiprocessing.spawn(_rank, (str(tmp_path / "store"),), nprocs=2)
