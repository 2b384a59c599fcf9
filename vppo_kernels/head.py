"""Where logits come from: hidden states and a head, or logits that the caller already holds.

A source hands out tiles of finished logits, `[views, rows, columns]`, and takes back the gradient of such a tile. It is
all that a sweep over the vocabulary knows about its inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vppo_kernels import checks


@dataclass(frozen=True)
class LogitTransform:
    """`softcap * tanh(logit_scale * z / softcap) / temperature`, or `logit_scale * z / temperature` without a cap."""

    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        checks.positive("temperature", self.temperature)
        checks.finite("logit_scale", self.logit_scale)
        if self.softcap is not None:
            checks.positive("softcap", self.softcap)

    def apply_(self, tile: Tensor) -> Tensor:
        if self.softcap is not None:
            return tile.mul_(self.logit_scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)
        scale = self.logit_scale / self.temperature
        return tile if scale == 1.0 else tile.mul_(scale)

    def slope(self, tile: Tensor) -> Tensor | float:
        """Derivative of finished logits by raw ones, from the finished ones."""
        scale = self.logit_scale / self.temperature
        if self.softcap is None:
            return scale
        return (tile * (self.temperature / self.softcap)).square_().neg_().add_(1.0).mul_(scale)


class Source(Protocol):
    """Tiles of logits for one or two views over the same rows and vocabulary."""

    views: int
    rows: int
    columns: int
    depth: int  # inner dimension of the matrix products, 0 if there are none
    device: torch.device
    dtype: torch.dtype  # of the logits: float32, or float64 for float64 inputs
    transform: LogitTransform

    def logits(self, rows: slice | Tensor, columns: slice, out: Tensor) -> Tensor:
        """Fill `out`, `[views, rows, columns]`, with finished logits."""
        ...

    def accumulate(self, rows: Tensor, columns: slice, grad: Tensor) -> None:
        """Take the gradient of raw logits, `[views, rows, columns]`; every tile comes once, column by column."""
        ...


def logit_dtype(*tensors: Tensor) -> torch.dtype:
    """Logits and statistics are float32; float64 inputs (gradcheck) keep their precision."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """`a @ b` accumulated and returned in `dtype`."""
    return torch.mm(a, b) if a.dtype == dtype else torch.mm(a, b, out_dtype=dtype)


def _difference_(hidden: Tensor, perturbed: Tensor) -> Tensor:
    """Overwrite `perturbed` with its difference from `hidden` in the rows where both are alike; `[rows, 1]`, 1 there.

    The second view's logits are then the first's plus a small product, so that the rounding of the large product,
    several times that of one addition, is the same in both views and drops out of the divergence.
    """
    difference = perturbed - hidden
    alike = _norm(difference) < 0.5 * _norm(perturbed)
    torch.where(alike, difference, perturbed, out=perturbed)
    return alike.to(hidden.dtype)


def _norm(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1, keepdim=True)


class LinearHead:
    """Logits of one or two sets of hidden states under one head.

    Args:
        hidden: One `[rows, D]` tensor per view.
        weight: `[V, D]`.
        bias: `[V]` or None.
        transform: What follows the projection.
        vocab_size: How many rows of the weight are vocabulary; the others are never read. A slice would not do:
            autograd would build a second weight gradient to undo it.
        wants: Which gradients `accumulate` collects: (one flag per view, weight, bias).
    """

    def __init__(
        self,
        hidden: tuple[Tensor, ...],
        weight: Tensor,
        bias: Tensor | None,
        transform: LogitTransform,
        vocab_size: int,
        wants: tuple[tuple[bool, ...], bool, bool] | None = None,
    ) -> None:
        self.hidden, self.weight, self.bias, self.transform = hidden, weight, bias, transform
        self.views, self.rows, self.columns, self.depth = len(hidden), len(hidden[0]), vocab_size, weight.shape[1]
        self.device, self.dtype = weight.device, logit_dtype(*hidden, weight)
        # only CUDA multiplies 16-bit operands, equal ones, with a sum in float32; all else goes to the logits' dtype
        narrow = weight.is_cuda and all(h.dtype == weight.dtype for h in hidden)
        self.product_dtype = weight.dtype if narrow else self.dtype
        if wants is not None:
            want_hidden, want_weight, want_bias = wants
            self.grad_hidden = [
                torch.zeros_like(h, dtype=self.dtype) if want else None
                for h, want in zip(hidden, want_hidden, strict=True)
            ]
            self.grad_weight = torch.zeros_like(weight) if want_weight else None
            self.grad_bias = torch.zeros_like(weight[:, 0], dtype=self.dtype) if want_bias else None
            self._columns: slice | None = None
            self._grad_columns: Tensor | None = None

    def _stacked(self, rows: slice | Tensor) -> Tensor:
        """Both views' rows under each other, so that one product reads the weight once."""
        return torch.cat([h[rows].to(self.product_dtype) for h in self.hidden])

    def logits(self, rows: slice | Tensor, columns: slice, out: Tensor) -> Tensor:
        hidden, weight = self._stacked(rows), self.weight[columns].to(self.product_dtype).T
        flat = out.view(-1, out.shape[-1])
        if hidden.dtype != out.dtype:
            flat.copy_(_product(hidden, weight, out.dtype))
        elif self.views == 1:
            torch.mm(hidden, weight, out=flat)
        else:
            alike = _difference_(*hidden.chunk(2))
            torch.mm(hidden, weight, out=flat)
            out[1].addcmul_(out[0], alike)
        if self.bias is not None:
            flat.add_(self.bias[columns])
        self.transform.apply_(flat)
        return out

    def accumulate(self, rows: Tensor, columns: slice, grad: Tensor) -> None:
        weight = self.weight[columns].to(self.product_dtype)
        for view, into in enumerate(self.grad_hidden):
            if into is not None:
                into.index_add_(0, rows, _product(grad[view].to(weight.dtype), weight, self.dtype))
        flat = grad.view(-1, grad.shape[-1])
        if self.grad_bias is not None:
            self.grad_bias[columns] += flat.sum(0)
        if self.grad_weight is not None:
            self._accumulate_weight(columns, _product(flat.T.to(weight.dtype), self._stacked(rows), self.dtype))

    def _accumulate_weight(self, columns: slice, grad: Tensor) -> None:
        """Rows of one column tile follow each other, so its gradient is summed in fp32 and rounded once."""
        assert self.grad_weight is not None
        if self._columns == columns and self._grad_columns is not None:
            self._grad_columns += grad
        else:
            self._columns, self._grad_columns = columns, grad
        self.grad_weight[columns] = self._grad_columns.to(self.grad_weight.dtype)


class GivenLogits:
    """Logits that the caller holds, one `[rows, V]` tensor per view, any floating dtype; `vocab_size` as above."""

    depth = 0

    def __init__(
        self,
        raw: tuple[Tensor, ...],
        transform: LogitTransform,
        vocab_size: int,
        wants: tuple[bool, ...] | None = None,
    ) -> None:
        self.raw, self.transform = raw, transform
        self.views, self.rows, self.columns = len(raw), len(raw[0]), vocab_size
        self.device, self.dtype = raw[0].device, logit_dtype(*raw)
        if wants is not None:
            self.grad_raw = [torch.zeros_like(z) if w else None for z, w in zip(raw, wants, strict=True)]

    def logits(self, rows: slice | Tensor, columns: slice, out: Tensor) -> Tensor:
        for view, raw in enumerate(self.raw):
            out[view].copy_(raw[rows, columns])
        self.transform.apply_(out)
        return out

    def accumulate(self, rows: Tensor, columns: slice, grad: Tensor) -> None:
        for view, into in enumerate(self.grad_raw):
            if into is not None:
                into[:, columns].index_copy_(0, rows, grad[view].to(into.dtype))
