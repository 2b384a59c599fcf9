"""Token-level gradient filtering: which tokens of a trajectory depend most on the image (VPPO, Eq. 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from vppo_kernels import arguments, backends
from vppo_kernels.layout import Layout, layout_of


def _checked(
    scores: Tensor,
    mask: Tensor,
    keep_ratio: float,
    keep_threshold: float | None,
    cu_seqlens: Tensor | None,
    check: bool | None,
) -> tuple[Tensor, Layout]:
    layout = layout_of("scores", scores, cu_seqlens, check)
    arguments.fraction("keep_ratio", keep_ratio)
    arguments.threshold("keep_threshold", keep_threshold)
    valid = layout.within(arguments.token_mask(mask, scores))
    if arguments.wanted(check, scores):
        arguments.all_finite("scores", scores, valid)
    return valid, layout


@torch.no_grad()
def topk_mask(
    scores: Tensor,
    mask: Tensor,
    keep_ratio: float,
    *,
    keep_threshold: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    check: bool | None = None,
) -> Tensor:
    """Keep, in each row, the `ceil(keep_ratio * n)` highest of its `n` valid scores; the earlier wins among equals.

    With a threshold, only those of them that lie above it: a row that nowhere exceeds it keeps none. `keep_ratio=1.0`
    beside it is the threshold alone.

    Args:
        scores: `[B, T]` floating dependency of each token, or `[total]` with `cu_seqlens`; not read where `mask` is 0.
        mask: Bool or 0/1 like `scores`, the response tokens.
        keep_ratio: Fraction kept, above 0 and at most 1 (0.4 in the paper).
        keep_threshold: What a kept score has to exceed, in the units of the scores, finite and at least 0; None for no
            such bound. It is read in the precision of the scores, in float32 beside 16 bits.
        cu_seqlens: `[B + 1]` int32 or int64 for packed rows: row i is `scores[cu_seqlens[i]:cu_seqlens[i + 1]]`, the
            first begins at 0 and the last ends at `total`.
        backend: As in `linear_divergence`; both of Triton's have the same kernels. "auto" takes plain torch for
            float64, and code that `torch.compile` traces is plain torch, whatever the name. All agree exactly.
        check: Raise on NaN or inf among valid scores and on offsets out of order. None checks on the CPU only, where it
            costs no synchronisation. Unchecked, a NaN ranks above every number and every threshold. Code that
            `torch.compile` traces has no values to check: there only types and shapes are checked.

    Returns:
        Bool like `scores`, never True where `mask` is 0. A row without valid tokens keeps none. Not differentiable.

    Raises:
        TypeError, ValueError: An argument is of the wrong type, shape, device or range, or not finite when checked.
    """
    valid, layout = _checked(scores, mask, keep_ratio, keep_threshold, cu_seqlens, check)
    return backends.token_ops(backend, scores).topk(scores, valid, keep_ratio, keep_threshold, layout)


@torch.no_grad()
def topk_mask_(
    scores: Tensor,
    mask: Tensor,
    keep_ratio: float,
    *,
    keep_threshold: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    check: bool | None = None,
) -> Tensor:
    """`topk_mask` written over `scores`: 1 where kept, 0 elsewhere.

    Args:
        scores, mask, keep_ratio, keep_threshold, cu_seqlens, backend, check: As in `topk_mask`.

    Returns:
        `scores`.
    """
    valid, layout = _checked(scores, mask, keep_ratio, keep_threshold, cu_seqlens, check)
    scores[:0].zero_()  # lets autograd know that kernels write, and raises where writing is not allowed
    return backends.token_ops(backend, scores).topk_(scores, valid, keep_ratio, keep_threshold, layout)
