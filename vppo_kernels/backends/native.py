"""The tile operations of the native library `csrc/`: one call each, statistics merged in place, no working space.

Tiles are float32. The library for a CPU loops over rows
on torch's threads, and every row's result is its own: it is bitwise the same for any number of them.
"""

from __future__ import annotations

from torch import Tensor

from vppo_kernels.logits import LogitTransform
from vppo_kernels.native_library import library, missing

SCRATCH = 0  # nothing but the tile itself
PEAK = 2  # tiles of one view alive at a time: those of logits


def fold(tile: Tensor, targets: Tensor | None, first: int, stats: Tensor, scratch: Tensor) -> Tensor:
    """See `TileOps`; `stats` is updated in place."""
    library(tile.device.type).fold(tile, targets, first, stats)
    return stats


def fold_pair(tile: Tensor, targets: Tensor | None, first: int, stats: Tensor, scratch: Tensor) -> Tensor:
    """See `TileOps`; `stats` is updated in place."""
    library(tile.device.type).fold_pair(tile, targets, first, stats)
    return stats


def fold_jsd(tile: Tensor, pair: Tensor, jsd_terms: Tensor, beta: float) -> Tensor:
    """See `TileOps`; `jsd_terms` is updated in place."""
    library(tile.device.type).fold_jsd(tile, pair, jsd_terms, beta)
    return jsd_terms


def gradient_(
    tile: Tensor,
    softmax: Tensor,
    targets: Tensor,
    first: int,
    grads: Tensor,
    transform: LogitTransform,
    out: Tensor,
) -> None:
    """See `TileOps`."""
    library(tile.device.type).gradient(tile, softmax, targets, first, grads, *_slope(transform))
    if out.dtype != tile.dtype:
        out.copy_(tile)


def gradient_pair_(
    tile: Tensor,
    pair: Tensor,
    jsd_terms: Tensor | None,
    beta: float,
    targets: Tensor | None,
    first: int,
    grads: Tensor,
    transforms: tuple[LogitTransform, ...],
    out: Tensor,
) -> None:
    """See `TileOps`."""
    slopes = (number for transform in transforms for number in _slope(transform))
    library(tile.device.type).gradient_pair(tile, pair, jsd_terms, beta, targets, first, grads, *slopes)
    if out.dtype != tile.dtype:
        out.copy_(tile)


def _slope(transform: LogitTransform) -> tuple[float, float]:
    """What turns transformed logits z into the slope of the transform, `scale * (1 - (to_cap z)^2)`."""
    cap = transform.softcap
    return transform.logit_scale / transform.temperature, 0.0 if cap is None else transform.temperature / cap


def has_product() -> bool:
    """Whether this CPU multiplies bfloat16. If not, nothing beats torch's float32 product of a converted tile."""
    return not missing("cpu") and library("cpu").has_product()


def _rows_apart(x: Tensor) -> bool:
    """Whether entries of a row lie beside each other, and rows one after the other (expanded ones do not)."""
    return x.stride(1) == 1 and (len(x) < 2 or x.stride(0) >= x.shape[1])


def product(first: Tensor, second: Tensor, shares_rounding: Tensor, weight: Tensor, out: Tensor) -> None:
    """A `NarrowProduct` (see `linear_head.py`), bitwise the same for any number of threads and a row in any company."""
    first, second, weight = (x if _rows_apart(x) else x.contiguous() for x in (first, second, weight))
    scratch = out.new_empty(library("cpu").product_scratch(len(out), weight.shape[1]))
    library("cpu").product(first, second, shares_rounding, weight, scratch, out)
