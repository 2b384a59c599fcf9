"""Token-level gradient filtering: which tokens of a trajectory depend most on the image (VPPO, Eq. 4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vppo_kernels import arguments, backends
from vppo_kernels.layout import Layout, Packed, layout_of


def keep_counts(lengths: Tensor, keep_ratio: float) -> Tensor:
    """`ceil(keep_ratio * n)` of each length, as int64 on its device."""
    # 0.07 * 100 is 7.000000000000001 in binary: step below the rounding before the ceiling
    return torch.ceil(lengths.double() * keep_ratio * (1 - 2**-40)).long()


def _checked(
    scores: Tensor, mask: Tensor, keep_ratio: float, cu_seqlens: Tensor | None, check: bool | None
) -> tuple[Tensor, Layout]:  # fmt: skip
    layout = layout_of("scores", scores, cu_seqlens, check)
    arguments.fraction("keep_ratio", keep_ratio)
    valid = layout.within(arguments.token_mask(mask, scores))
    if arguments.wanted(check, scores):
        arguments.all_finite("scores", scores, valid)
    return valid, layout


def _padding_last(scores: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, scores.clamp_min(torch.finfo(scores.dtype).min), -math.inf)


def _select(scores: Tensor, valid: Tensor, keep_ratio: float) -> Tensor:
    order = _padding_last(scores, valid).sort(dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order)
    rank.scatter_(1, order, torch.arange(scores.shape[1], device=scores.device).expand_as(order))
    return (rank < keep_counts(valid.sum(1), keep_ratio).unsqueeze(1)) & valid


def _select_packed(scores: Tensor, valid: Tensor, keep_ratio: float, layout: Packed) -> Tensor:
    order = _padding_last(scores, valid).sort(descending=True, stable=True).indices
    order = order[layout.row[order].sort(stable=True).indices]  # by row, then by score, then by place
    first = layout.spread(layout.offsets[:-1] - layout.offsets[0])  # in this order; what is in no row comes last
    rank = torch.empty_like(order)
    rank[order] = torch.arange(scores.shape[0], device=scores.device) - first[order]
    return (rank < layout.spread(keep_counts(layout.sum(valid, torch.int64), keep_ratio))) & valid


def _write(
    scores: Tensor, valid: Tensor, keep_ratio: float, layout: Layout, backend: str, in_place: bool
) -> Tensor:  # fmt: skip
    if in_place:
        scores[:0].zero_()  # tells autograd what kernels do behind its back, or raises where nothing may be written
    kernels = backends.token_kernels(backend, scores)
    if kernels is None:
        if isinstance(layout, Packed):
            keep = _select_packed(scores, valid, keep_ratio, layout)
        else:
            keep = _select(scores, valid, keep_ratio)
    else:
        given = scores.detach().resolve_neg().contiguous()
        direct = in_place and scores.is_contiguous() and not (layout.packed or scores.is_neg())
        blank = torch.zeros_like if layout.packed else torch.empty_like  # unchecked offsets may leave gaps
        keep = given if direct else blank(given, dtype=torch.bool)
        kernels.topk(given, valid, keep_ratio, layout.offsets if isinstance(layout, Packed) else None, keep)
        if direct:
            return scores
    return scores.copy_(keep) if in_place else keep


@torch.no_grad()
def topk_mask(
    scores: Tensor,
    mask: Tensor,
    keep_ratio: float,
    *,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    check: bool | None = None,
) -> Tensor:
    """Keep, in each row, the `ceil(keep_ratio * n)` highest of its `n` valid scores; the earlier wins among equals.

    Args:
        scores: `[B, T]` floating dependency of each token, or `[total]` with `cu_seqlens`; not read where `mask` is 0.
        mask: Bool or 0/1 like `scores`, the response tokens.
        keep_ratio: Fraction kept, above 0 and at most 1 (0.4 in the paper).
        cu_seqlens: `[B + 1]` int32 or int64 for packed rows: row i is `scores[cu_seqlens[i]:cu_seqlens[i + 1]]`, the
            first begins at 0 and the last ends at `total`.
        backend: "auto", "torch" or one of Triton's, as in `linear_divergence`. "auto" takes the kernels on a GPU, plain
            torch for float64. They agree exactly. Code that `torch.compile` traces is plain torch, whatever the name.
        check: Raise on NaN or inf among valid scores and on offsets out of order. None looks on the CPU, where looking
            costs no synchronisation. Unchecked, a NaN ranks above every number. Code that `torch.compile` traces has
            no values to look at: there nothing is checked but types and shapes.

    Returns:
        Bool like `scores`, never True where `mask` is 0. A row without valid tokens keeps none. Not differentiable.

    Raises:
        TypeError, ValueError: An argument is of the wrong type, shape, device or range, or not finite when checked.
    """
    valid, layout = _checked(scores, mask, keep_ratio, cu_seqlens, check)
    return _write(scores, valid, keep_ratio, layout, backend, in_place=False)


@torch.no_grad()
def topk_mask_(
    scores: Tensor,
    mask: Tensor,
    keep_ratio: float,
    *,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    check: bool | None = None,
) -> Tensor:
    """`topk_mask` written over `scores`: 1 where kept, 0 elsewhere.

    Args:
        scores, mask, keep_ratio, cu_seqlens, backend, check: As in `topk_mask`.

    Returns:
        `scores`.
    """
    valid, layout = _checked(scores, mask, keep_ratio, cu_seqlens, check)
    return _write(scores, valid, keep_ratio, layout, backend, in_place=True)
