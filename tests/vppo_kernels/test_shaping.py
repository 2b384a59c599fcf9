"""Selection and shaping: by property, against the plain definitions, and over two processes."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vppo_kernels as vk
from vppo_kernels import reference
from vppo_kernels.selection import keep_counts

NAN = float("nan")
RATIOS = [0.4, 0.07, 0.1, 1 / 3, 1e-6, 1.0]


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Scores with ties, `[B, T]`, and a mask with holes and empty rows; padding holds NaN."""
    rows, length = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    values = draw(st.lists(st.sampled_from([0.0, 0.1, 0.5, 2.0, 7.0]), min_size=rows * length, max_size=rows * length))
    flags = draw(st.lists(st.booleans(), min_size=rows * length, max_size=rows * length))
    scores, mask = torch.tensor(values, dtype=torch.float64).view(rows, length), torch.tensor(flags).view(rows, length)
    return torch.where(mask, scores, NAN), mask


@settings(max_examples=150, deadline=None)
@given(batches(), st.sampled_from(RATIOS))
def test_the_mask_is_the_definition(batch: tuple[Tensor, Tensor], ratio: float) -> None:
    scores, mask = batch
    keep = vk.topk_mask(scores, mask, ratio)
    assert torch.equal(keep, reference.topk_mask(scores, mask, ratio))
    assert not (keep & ~mask).any()
    written = scores.clone()
    assert vk.topk_mask_(written, mask, ratio) is written
    assert torch.equal(written, keep.double())


@settings(max_examples=60, deadline=None)
@given(batches(), st.randoms())
def test_rows_and_padding_do_not_see_each_other(batch: tuple[Tensor, Tensor], random: object) -> None:
    scores, mask = batch
    order = torch.randperm(len(scores))
    assert torch.equal(vk.topk_mask(scores[order], mask[order], 0.4), vk.topk_mask(scores, mask, 0.4)[order])
    alpha = vk.trajectory_scale(scores, mask)
    assert torch.allclose(vk.trajectory_scale(scores[order], mask[order]), alpha[order])
    wide = torch.cat([torch.full_like(scores, NAN), scores], dim=1)
    wide_mask = torch.cat([torch.zeros_like(mask), mask], dim=1)
    assert torch.equal(vk.topk_mask(wide, wide_mask, 0.4)[:, scores.shape[1] :], vk.topk_mask(scores, mask, 0.4))
    assert torch.allclose(vk.trajectory_scale(wide, wide_mask), alpha)


@settings(max_examples=100, deadline=None)
@given(batches(), st.sampled_from([None, 1.3]))
def test_the_factor_is_the_definition(batch: tuple[Tensor, Tensor], scale_max: float | None) -> None:
    scores, mask = batch
    alpha = vk.trajectory_scale(scores, mask, scale_max=scale_max)
    assert torch.allclose(alpha, reference.trajectory_scale(scores, mask, scale_max=scale_max), atol=1e-12)
    present = mask.any(1)
    assert (alpha[~present] == 1).all()
    if scale_max is None and present.any():
        assert alpha[present].mean().item() == pytest.approx(1.0)


@pytest.mark.parametrize("ratio", RATIOS)
def test_counts_are_exact_ceilings(ratio: float) -> None:
    lengths = torch.arange(2001)
    expected = [math.ceil(Fraction(str(ratio)) * n) for n in range(2001)]
    assert keep_counts(lengths, ratio).tolist() == expected


def test_the_earlier_token_wins_a_tie() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0, 1.0]])
    assert vk.topk_mask(scores, torch.ones(1, 5), 0.4).tolist() == [[False, True, True, False, False]]


def test_one_trajectory_and_a_small_spread_are_left_alone() -> None:
    scores = torch.rand(3, 8)
    assert (vk.trajectory_scale(scores[:1], torch.ones(1, 8)) == 1).all()
    flat = torch.ones(3, 8) + torch.tensor([0.0, 1e-7, 9e-7]).unsqueeze(1)
    assert (vk.trajectory_scale(flat, torch.ones(3, 8)) == 1).all()


def test_statistics_from_elsewhere() -> None:
    scores, mask = torch.rand(6, 8), torch.ones(6, 8)
    whole = vk.trajectory_stats(scores, mask)
    parts = [vk.trajectory_scale(scores[i : i + 2], mask[i : i + 2], stats=whole) for i in (0, 2, 4)]
    assert torch.allclose(torch.cat(parts), vk.trajectory_scale(scores, mask))
    with pytest.raises(ValueError, match="stats: given together with process_group"):
        vk.trajectory_scale(scores, mask, stats=whole, process_group=object())
    alone = vk.TrajectoryStats(0.5, 1.0, 0.5, 4)  # a micro-batch whose only row is the minimum
    assert vk.trajectory_scale(torch.full((1, 3), 0.5), torch.ones(1, 3), stats=alone).tolist() == pytest.approx([0.9])


def test_text_only_rows_keep_everything_and_enter_nothing() -> None:
    dependency, mask = torch.rand(4, 10), torch.ones(4, 10, dtype=torch.bool)
    mask[:, 8:] = False
    dependency[2] = NAN  # whatever a row without an image holds
    has_image = torch.tensor([True, True, False, True])
    got = vk.vppo_advantages(torch.tensor([1.0, -2.0, 3.0, 0.5]), dependency, mask, has_image=has_image)
    assert (got[2, :8] == 3.0).all() and (got[:, 8:] == 0).all()
    rest = [0, 1, 3]
    expected = vk.vppo_advantages(torch.tensor([1.0, -2.0, 0.5]), dependency[rest], mask[rest])
    assert torch.equal(got[rest], expected)
    assert ((expected != 0).sum(1) == 4).all()  # ceil(0.4 * 8)


def test_an_empty_trajectory_contributes_nothing() -> None:
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1] = False
    dependency = torch.where(mask, torch.rand(3, 5), NAN)
    got = vk.vppo_advantages(torch.ones(3), dependency, mask)
    assert (got[1] == 0).all() and torch.isfinite(got).all()


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_a_bad_score_is_an_error_or_poisons_what_it_touches(bad: float) -> None:
    dependency, mask = torch.rand(3, 5), torch.ones(3, 5)
    dependency[1, 2] = bad
    for call in (
        lambda: vk.topk_mask(dependency, mask, 0.4),
        lambda: vk.trajectory_scale(dependency, mask),
    ):
        with pytest.raises(ValueError, match=r"scores: got (NaN|inf) at row 1"):
            call()
    with pytest.raises(ValueError, match=r"dependency: got (NaN|inf) at row 1"):
        vk.vppo_advantages(torch.ones(3), dependency, mask)
    assert torch.isnan(vk.vppo_advantages(torch.ones(3), dependency, mask, check=False)).any()


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.1, NAN])
def test_a_ratio_outside_its_range_is_named(ratio: float) -> None:
    with pytest.raises(ValueError, match="keep_ratio: got"):
        vk.topk_mask(torch.rand(2, 3), torch.ones(2, 3), ratio)


def _rank(rank: int, store: str, scores: Tensor, mask: Tensor, expected: Tensor) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    half = slice(0, 2) if rank == 0 else slice(2, 5)
    alpha = vk.trajectory_scale(scores[half], mask[half], process_group=dist.group.WORLD)
    assert torch.allclose(alpha, expected[half])
    dist.destroy_process_group()


def test_two_processes_have_the_statistics_of_one(tmp_path: Path) -> None:
    scores, mask = torch.rand(5, 7), torch.rand(5, 7) < 0.7
    expected = vk.trajectory_scale(scores, mask)
    torch.multiprocessing.spawn(_rank, (str(tmp_path / "store"), scores, mask, expected), nprocs=2)
