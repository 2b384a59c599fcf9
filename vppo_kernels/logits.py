"""Where logits come from: hidden states and a head, or logits that the caller already holds.

A source hands out tiles of transformed logits, `[views, rows, columns]`, and takes back the gradient of such a tile. It
is all that a sweep over the vocabulary knows about its inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import InitVar, dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from vppo_kernels import arguments
from vppo_kernels.precision import exact_float32
from vppo_kernels.tile_shape import Footprint
from vppo_kernels.vocab_parallel import Shard
from vppo_kernels.walk import Banded

MOST_SCALE = 1e30  # the largest factor on logits that leaves them, and their gradient, within float32


@dataclass(frozen=True)
class LogitTransform:
    """`softcap * tanh(logit_scale * z / softcap) / temperature`, or `logit_scale * z / temperature` without a cap."""

    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None
    of: InitVar[str] = field(default="", kw_only=True)  # what follows the names in messages: "_other" of a second head

    def __post_init__(self, of: str) -> None:
        arguments.positive(f"temperature{of}", self.temperature)
        arguments.finite(f"logit_scale{of}", self.logit_scale)
        if self.softcap is not None:
            arguments.positive(f"softcap{of}", self.softcap)
        ratios = [("temperature", "logit_scale / temperature", abs(self.logit_scale) / self.temperature)]
        if self.softcap is not None:
            ratios = [
                ("softcap", "logit_scale / softcap", abs(self.logit_scale) / self.softcap),
                ("temperature", "softcap / temperature", self.softcap / self.temperature),
                ("softcap", "temperature / softcap", self.temperature / self.softcap),
                *ratios,
            ]
        for name, ratio, value in ratios:
            if value > MOST_SCALE:
                got = getattr(self, name)
                raise ValueError(f"{name}{of}: got {got!r}, takes a number for which {ratio} is at most {MOST_SCALE:g}")

    def arguments(self, of: str = "") -> dict[str, float | None]:
        """Its fields by the names that callers give them."""
        named = dict(temperature=self.temperature, logit_scale=self.logit_scale, softcap=self.softcap)
        return {f"{name}{of}": value for name, value in named.items()}

    def fields(self) -> list[float]:
        """What rebuilds it: `LogitTransform(*fields)`."""
        return [self.temperature, self.logit_scale, *(() if self.softcap is None else (self.softcap,))]

    def apply_(self, tile: Tensor) -> Tensor:
        if self.softcap is not None:
            return tile.mul_(self.logit_scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)
        scale = self.logit_scale / self.temperature
        return tile if scale == 1.0 else tile.mul_(scale)

    def slope(self, tile: Tensor) -> Tensor | float:
        """Derivative of transformed logits by raw ones, from the transformed ones."""
        scale = self.logit_scale / self.temperature
        if self.softcap is None:
            return scale
        return (tile * (self.temperature / self.softcap)).square_().neg_().add_(1.0).mul_(scale)


class Source(Protocol):
    """Tiles of logits for one or two views over the same rows and vocabulary.

    Attributes:
        views: 1 or 2.
        products: How many matrix products a tile takes, each of as many views: 2 where each view has a head of its own.
        rows: Rows that take part: all, or in a backward the active ones.
        columns: Vocabulary columns that this process holds, the first of which is `first` of the whole vocabulary.
        max_columns: The most columns that any rank holds.
        dtype: Of the logits: float32, or float64 for float64 inputs.
        transforms: What follows the projection, of each view.
        footprint: What it holds beside a tile.
        banded: The same where gradients of a band of row tiles lie side by side; None where they do not.
        shares_columns: Whether a gradient is summed over all rows of a column tile.
    """

    views: int
    products: int
    rows: int
    columns: int
    first: int
    max_columns: int
    group: str
    device: torch.device
    dtype: torch.dtype
    transforms: tuple[LogitTransform, ...]
    shares_columns: bool

    @property
    def footprint(self) -> Footprint: ...

    @property
    def banded(self) -> Banded | None: ...

    def logits(self, rows: slice, columns: slice, out: Tensor) -> Tensor:
        """Fill `out`, `[views, rows, columns]`, with transformed logits."""
        ...

    def begin(self, rows: slice, stacked: bool = False) -> None:
        """The row tiles that follow are of this band, of which both views' rows may be copied below each other."""
        ...

    def place(self, rows: slice, columns: slice, tile: Tensor) -> Tensor:
        """Where the gradient of a tile's raw logits goes, `[views, rows, columns]`: over the tile, or narrower."""
        ...

    def open(self, rows: slice) -> None:
        """Begin to sum gradients of these rows over the vocabulary."""
        ...

    def accumulate(self, rows: slice, columns: slice, grad: Tensor, of_columns: bool = True) -> None:
        """Take, and overwrite, the gradient of raw logits.

        Args:
            rows, columns: Of the tile. What is open of the rows is summed.
            grad: `[views, rows, columns]`, the tile or what `place` has returned.
            of_columns: Whether to collect gradients of these columns too: once in every tile, the row tiles of a column
                tile one after another.
        """
        ...

    def close(self) -> None:
        """Round the sums of the open rows to the gradients' dtype."""
        ...


def logit_dtype(*tensors: Tensor) -> torch.dtype:
    """Logits and statistics are float32; float64 inputs (gradcheck) keep their precision."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """float32 products are computed in float32 (no TF32, bfloat16 or autocast), and kernels start on this device."""
    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with exact_float32.held(), torch.autocast(device.type, enabled=False), on_device:
        yield


class GivenLogits:
    """Logits that the caller holds: one `[rows, V]` tensor per view, any floating dtype; the rest as `LinearHead`."""

    products, footprint, banded, shares_columns = 1, Footprint(0, 0, 0, 0), None, False

    def __init__(
        self,
        raw: list[Tensor],
        transform: LogitTransform,
        shard: Shard,
        active: Tensor | None = None,
        wants: tuple[bool, ...] | None = None,
    ) -> None:
        self.raw, self.transform, self.active = raw, transform, active
        self.first, self.columns, self.max_columns, _, self.group, _ = shard
        self.views, self.rows = len(raw), len(raw[0] if active is None else active)
        self.transforms = (transform,) * self.views
        self.device, self.dtype = raw[0].device, logit_dtype(*raw)
        if wants is not None:
            self.grad_raw = [torch.zeros_like(z) if w else None for z, w in zip(raw, wants, strict=True)]

    def logits(self, rows: slice, columns: slice, out: Tensor) -> Tensor:
        for view, raw in enumerate(self.raw):
            out[view].copy_(raw[rows, columns] if self.active is None else raw[self.active[rows], columns])
        self.transform.apply_(out)
        return out

    def begin(self, rows: slice, stacked: bool = False) -> None:
        pass

    def place(self, rows: slice, columns: slice, tile: Tensor) -> Tensor:
        return tile

    def open(self, rows: slice) -> None:
        pass

    def close(self) -> None:
        pass

    def accumulate(self, rows: slice, columns: slice, grad: Tensor, of_columns: bool = True) -> None:
        for view, into in enumerate(self.grad_raw):
            if into is None:
                continue
            if self.active is None:
                into[rows, columns] = grad[view].to(into.dtype)
            else:
                into[:, columns].index_copy_(0, self.active[rows], grad[view].to(into.dtype))

    def gradients(self) -> tuple[tuple[Tensor | None, ...]]:
        """What `accumulate` has collected, one gradient per view."""
        return (tuple(self.grad_raw),)
