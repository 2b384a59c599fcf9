"""Logits that a head makes of hidden states, tile by tile, and the gradients of both."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vppo_kernels import tensor_cores
from vppo_kernels.band import Band
from vppo_kernels.logits import LogitTransform, logit_dtype
from vppo_kernels.tile_shape import Footprint
from vppo_kernels.vocab_parallel import Shard, sum_ranks
from vppo_kernels.walk import Banded, Work

RANGE_ROWS = 1024  # looked at together
WIDE_COLUMNS = 256  # multiplied in float64 together
PART_BYTES, GPU_PART_BYTES = 1 << 18, 1 << 24  # of sums that are rounded together

NarrowProduct = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
"""`product(first, second, shares_rounding, weight, out)` of bfloat16 `[r, D]`, `[r or r - 1, D]` and `[V, D]` fills
`out`, `[rows, V]` float32. Where `shares_rounding`, `[r]` bool, row i of both views gets the same rounding error."""


class LinearHead:
    """Logits of one or two sets of hidden states under one head.

    Args:
        hidden: One `[rows, D]` tensor per view.
        weight: `[V, D]`, this process's part of it.
        bias: `[V]` or None.
        transform: What follows the projection.
        shard: How many rows of the weight are vocabulary; the others are never read. (A slice would not do: autograd
            would build a second weight gradient to undo it.)
        active: Indices of the rows that take part, ascending; None for all.
        wants: Which gradients `accumulate` collects: (one flag per view, weight, bias).
        product: A backend's product of bfloat16 operands on a CPU, if it has one; gradients are multiplied in float32.
        exact: Sum in slabs where tensor cores make the logits.
        alone: Another head makes the other view's logits, so that no rounding cancels; `exact` then multiplies in
            float64 what would be multiplied in float32.
        dtype: Of the logits, where that of these inputs is not enough for another view's; None for theirs.
    """

    products = 1

    def __init__(
        self,
        hidden: list[Tensor],
        weight: Tensor,
        bias: Tensor | None,
        transform: LogitTransform,
        shard: Shard,
        active: Tensor | None = None,
        wants: tuple[tuple[bool, ...], bool, bool] | None = None,
        product: NarrowProduct | None = None,
        exact: bool = False,
        alone: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        tensor_cores.warn_of_slow_product(hidden[0], weight)
        # kernels read memory as it is: of a tensor that torch negates lazily they would see the wrong sign
        self.hidden, self.weight = [h.resolve_neg() for h in hidden], shard.part(weight.resolve_neg())
        self.bias, self.transform, self.active = None if bias is None else shard.part(bias), transform, active
        self.first, self.columns, self.max_columns, _, self.group, self._whole = shard
        self.views, self.rows, self.hidden_size = (
            len(hidden),
            len(hidden[0] if active is None else active),
            weight.shape[1],
        )
        self.transforms = (transform,) * self.views
        self.device, self.dtype = weight.device, dtype or logit_dtype(*hidden, weight)
        narrow = self.dtype == torch.float32 and tensor_cores.multiply(*hidden, weight)
        self.product_dtype, self.exact = weight.dtype if narrow else self.dtype, exact and narrow
        self._wide = exact and alone and self.dtype == torch.float32 and not narrow
        fits = (
            weight.device.type == "cpu" and not self._wide and all(x.dtype == torch.bfloat16 for x in (*hidden, weight))
        )
        self._narrow_product = product if fits else None
        self._stack: tuple[slice, Tensor, Tensor | None] | None = None
        self._band = Band(self.hidden, active) if narrow else None
        want_hidden, want_weight, want_bias = wants or ((False,) * self.views, False, False)
        self.shares_columns = want_weight
        self._grad_hidden = [
            torch.zeros_like(h) if want else None for h, want in zip(self.hidden, want_hidden, strict=True)
        ]
        # of a weight that is whole while others hold columns of it too, this rank fills its own rows
        self._all_grad_weight = torch.zeros_like(weight) if want_weight else None
        self.grad_weight = None if self._all_grad_weight is None else shard.part(self._all_grad_weight)
        self._all_grad_bias = torch.zeros_like(weight[:, 0], dtype=self.dtype) if want_bias else None
        self._grad_bias = None if self._all_grad_bias is None else shard.part(self._all_grad_bias)
        self.collects = want_weight or want_bias or any(want_hidden)  # whether any gradient is asked for
        self._open = slice(0, 0)
        self._sums: list[Tensor | None] = [None] * self.views
        self._tile_sum: Tensor | None = None

    @property
    def footprint(self) -> Footprint:
        """Every buffer below, counted."""
        product, own, summed = self.product_dtype.itemsize, self.hidden[0].dtype.itemsize, self.dtype.itemsize
        narrow, picks = product < summed, self.active is not None
        beside = summed if narrow and not tensor_cores.adds_in_place(self.weight) else 0  # a product, to be added
        row = self.views * product
        if picks and (own != product or self._narrow_product is not None):
            row += self.views * own
        if self.views == 2 and not narrow:
            row += summed  # their difference
        double = torch.float64.itemsize if self._wide else 0
        row += double  # the rows again
        wanted = [grad for grad in self._grad_hidden if grad is not None]
        sums = [grad for grad in wanted if picks or grad.dtype != self.dtype]  # the others are summed in place
        row_sum = len(sums) * summed + beside if sums else 0
        column = double + (0 if self.weight.dtype == self.product_dtype else summed)
        rounded = self.grad_weight is not None and self.grad_weight.dtype != self.dtype
        column_sum = summed + beside if rounded else 0
        if rounded and not narrow:
            column, column_sum = column + column_sum, 0
        width = self.hidden_size
        entry = self.views * product if narrow and self.collects else 0
        free = min((self._rows_within(grad) for grad in wanted), default=self.rows)
        row_bytes, column_bytes = row * width + double * WIDE_COLUMNS, column * width
        return Footprint(row_bytes, row_sum * width, column_bytes, column_sum * width, entry, free)

    @property
    def banded(self) -> Banded | None:
        """The same where tensor cores multiply; nothing beside a sum but a part of a product, where that is needed."""
        if self._band is None:
            return None
        own, summed, width = self.hidden[0].dtype.itemsize, self.dtype.itemsize, self.hidden_size
        wanted = sum(grad is not None for grad in self._grad_hidden)
        row = self.views * own * width
        row_sum, column_sum = wanted * summed * width, summed * width if self.shares_columns else 0
        beside = 0 if tensor_cores.adds_in_place(self.weight) else summed * width * tensor_cores.PART
        *_, entry, free = self.footprint
        work = Work(self.views, width, wanted, self.shares_columns)
        return Banded(Footprint(row, row_sum, 0, column_sum, entry, free), beside, (work,), self._band.picks)

    def _rows_within(self, grad: Tensor) -> int:
        """How many rows' sums fit into the memory of their gradient."""
        if grad.dtype.itemsize >= self.dtype.itemsize or not grad.is_contiguous():
            return 0
        return len(grad) * grad.dtype.itemsize // self.dtype.itemsize

    def _picked(self, rows: slice) -> list[Tensor]:
        return [h[rows] if self.active is None else h[self.active[rows]] for h in self.hidden]

    def hidden_range(self) -> tuple[Tensor, Tensor]:
        """Least and largest number in the rows that take part, of which there is at least one."""
        starts = range(0, self.rows, RANGE_ROWS)
        found = [torch.aminmax(h) for start in starts for h in self._picked(slice(start, start + RANGE_ROWS))]
        least, largest = (torch.stack(each) for each in zip(*found, strict=True))
        return least.amin(), largest.amax()

    def stacked(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """The rows of both views below each other, so that one product reads the weight once; see `_difference_`."""
        if self._stack is None or self._stack[0] != rows:
            self._stack = None  # its memory is what the next one takes
            stacked = self._gather(rows)
            exact = self.views == 2 and self.product_dtype == self.dtype
            self._stack = rows, stacked, _difference_(*stacked.chunk(2)) if exact else None
        return self._stack[1:]

    def _gather(self, rows: slice) -> Tensor:
        hidden = self.hidden[0]
        plain = (
            hidden.dtype == self.product_dtype and hidden.is_contiguous()
        )  # kernels take rows that follow each other
        if self.views == 1 and self.active is None and plain:
            return hidden[rows]
        count = rows.stop - rows.start
        stacked = self.weight.new_empty(self.views * count, self.hidden_size, dtype=self.product_dtype)
        for hidden, place in zip(self.hidden, stacked.split(count), strict=True):
            if self.active is None:
                place.copy_(hidden[rows])
            elif hidden.dtype == place.dtype:
                torch.index_select(hidden, 0, self.active[rows], out=place)
            else:
                place.copy_(hidden[self.active[rows]])
        return stacked

    def logits(self, rows: slice, columns: slice, out: Tensor) -> Tensor:
        flat, weight = out.view(-1, out.shape[-1]), self.weight[columns]
        if self._band is not None and self._band.holds(rows):
            hidden = self._band.hidden(rows)
            for place, each in zip(flat.chunk(len(hidden)), hidden, strict=True):
                tensor_cores.product_(place, each, weight.T, self.exact)
        elif self._narrow_product is not None:
            self._multiply_narrow(rows, weight, flat)
        else:
            self._multiply(rows, weight, flat)
        if self.bias is not None:
            flat.add_(self.bias[columns])
        self.transform.apply_(flat)
        return out

    def _multiply(self, rows: slice, weight: Tensor, out: Tensor) -> None:
        stacked, shares_rounding = self.stacked(rows)
        weight = weight.to(self.product_dtype).T
        if self._wide:
            hidden = stacked.double()
            for block, part in zip(out.split(WIDE_COLUMNS, 1), weight.split(WIDE_COLUMNS, 1), strict=True):
                block.copy_(hidden @ part.double())
        elif stacked.dtype == out.dtype:
            torch.mm(stacked, weight, out=out)
        else:
            tensor_cores.product_(out, stacked, weight, self.exact)
        if shares_rounding is not None:
            first, second = out.chunk(2)
            second.addcmul_(first, shares_rounding)

    def _multiply_narrow(self, rows: slice, weight: Tensor, out: Tensor) -> None:
        assert self._narrow_product is not None
        _, shares_rounding = self.stacked(rows)
        picked = self._picked(rows)
        first, second = picked if self.views == 2 else picked[0].tensor_split(2)
        if shares_rounding is None:
            shares_rounding = first.new_zeros(len(first))
        self._narrow_product(first, second, shares_rounding.flatten().bool(), weight, out)

    def begin(self, rows: slice, stacked: bool = False) -> None:
        if self._band is not None:
            self._band.begin(rows, stacked)

    def place(self, rows: slice, columns: slice, tile: Tensor) -> Tensor:
        if self._band is None or self._grad_bias is not None:  # which is a sum of gradients that are not rounded
            return tile
        return self._band.place(rows, columns.stop - columns.start)

    def open(self, rows: slice) -> None:
        self._stack = None  # what a forward has left would lie beside the sums
        self._open = rows
        for view, grad in enumerate(self._grad_hidden):
            if grad is not None and grad.dtype == self.dtype and self.active is None:
                self._sums[view] = grad[rows]
            elif grad is not None and self._sums_within(rows):
                count = rows.stop * self.hidden_size * self.dtype.itemsize // grad.dtype.itemsize
                self._sums[view] = grad.view(-1)[:count].view(self.dtype).view(rows.stop, self.hidden_size)
            elif grad is not None:
                self._sums[view] = grad.new_zeros(rows.stop - rows.start, self.hidden_size, dtype=self.dtype)

    def _sums_within(self, rows: slice) -> bool:
        """Whether the sums of these rows lie in the memory of their gradients, of which none is made yet."""
        return rows.start == 0 and 0 < rows.stop <= self.footprint.free

    def close(self) -> None:
        if self._band is not None:
            self._band.end()
        for view, (grad, total) in enumerate(zip(self._grad_hidden, self._sums, strict=True)):
            if grad is None or total is None or not len(total):
                continue
            sum_ranks(total, self.group)
            places = None if self.active is None else self.active[self._open]
            if grad.dtype != total.dtype and self._sums_within(self._open):
                _round_within(total, grad, places)
            elif places is not None:
                for rows in _parts(total):
                    grad.index_copy_(0, places[rows], total[rows].to(grad.dtype))
            elif grad.dtype != total.dtype:
                grad[self._open] = total
            self._sums[view] = None
        self._open = slice(0, 0)

    def accumulate(self, rows: slice, columns: slice, grad: Tensor, of_columns: bool = True) -> None:
        if self._grad_bias is not None and of_columns:
            self._grad_bias[columns] += grad.sum((0, 1))
        if self._band is not None:
            self._accumulate_band(self._band, rows, columns, grad, of_columns)
            return
        weight = self.weight[columns].to(self.product_dtype)
        for view, total in enumerate(self._sums):
            if total is not None and rows.stop <= self._open.stop:
                first = self._open.start
                total[rows.start - first : rows.stop - first].addmm_(grad[view], weight)
        if self.grad_weight is not None and of_columns:
            stacked, shares_rounding = self.stacked(rows)
            if shares_rounding is not None:  # there the second view's rows are the first's plus those of the stack
                grad[0].addcmul_(grad[1], shares_rounding)
            self._add_to_weight(rows, columns, [(grad.flatten(0, 1), stacked)])

    def _accumulate_band(self, band: Band, rows: slice, columns: slice, grad: Tensor, of_columns: bool) -> None:
        """Lay the gradient beside those of the band's other tiles; multiply when it is the last."""
        if grad.dtype != self.product_dtype:
            band.place(rows, grad.shape[2]).copy_(grad)
        if rows.stop < band.rows.stop:
            return
        assert band.gradient is not None
        first, last = band.rows.start, min(band.rows.stop, self._open.stop)
        for gradient, total in zip(band.gradient, self._sums, strict=True):
            if total is not None and first < last:
                into = total[first - self._open.start : last - self._open.start]
                tensor_cores.add_product_(into, gradient[: last - first], self.weight[columns])
        if self.grad_weight is not None and of_columns:
            self._add_to_weight(band.rows, columns, list(band.factors()))

    def _add_to_weight(self, rows: slice, columns: slice, factors: list[tuple[Tensor, Tensor]]) -> None:
        """Add `a.T @ b` of each. Rows of one column tile follow each other, so the sum is made in float32, and rounded
        once when they are the last.
        """
        assert self.grad_weight is not None
        into, last = self.grad_weight[columns], rows.stop == self.rows
        whole = rows.start == 0 and last and len(factors) == 1
        for index, (grad, stacked) in enumerate(factors):
            if into.dtype == self.dtype:
                _add_product_(into, grad.T, stacked)
            elif whole and into.dtype == grad.dtype and into.is_contiguous():
                torch.mm(grad.T, stacked, out=into)
                return
            elif rows.start == 0 and index == 0:
                self._tile_sum = _product(grad.T, stacked, self.dtype)
            else:
                assert self._tile_sum is not None
                _add_product_(self._tile_sum, grad.T, stacked)
        if last and self._tile_sum is not None:
            into.copy_(self._tile_sum)
            self._tile_sum = None

    def gradients(self) -> tuple[tuple[Tensor | None, ...], Tensor | None, Tensor | None]:
        """What `accumulate` has collected: the gradients of each view's hidden states, of the weight and of the bias.

        Those of weight and bias are of what this rank was given, those of hidden states of the whole vocabulary.
        """
        if self._whole:
            for grad in (self._all_grad_weight, self._all_grad_bias):
                if grad is not None:
                    sum_ranks(grad, self.group)
        bias = None if self._all_grad_bias is None or self.bias is None else self._all_grad_bias.to(self.bias.dtype)
        return tuple(self._grad_hidden), self._all_grad_weight, bias


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """`a @ b` accumulated and returned in `dtype`."""
    return torch.mm(a, b) if a.dtype == dtype else tensor_cores.product(a, b)


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b`, accumulated in the dtype of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        tensor_cores.add_product_(total, a, b)


def _difference_(hidden: Tensor, perturbed: Tensor) -> Tensor:
    """Overwrite `perturbed` with its difference from `hidden` in the rows where the two are close.

    There the second view's logits are computed as the first's plus a small product. Both views then have the same
    rounding error of the large product, which is several times that of one addition, and it cancels in the divergence.

    Returns:
        `[rows, 1]`: 1 where `perturbed` now holds a difference, 0 elsewhere.
    """
    difference = perturbed - hidden
    shares_rounding = _norm(difference) < 0.5 * _norm(perturbed)
    torch.where(shares_rounding, difference, perturbed, out=perturbed)
    return shares_rounding.to(hidden.dtype)


def _norm(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1, keepdim=True)


def _parts(total: Tensor) -> list[slice]:
    """Rows of a matrix that are rounded together: a copy of them is small."""
    size = PART_BYTES if total.device.type == "cpu" else GPU_PART_BYTES
    step = max(size // (total.shape[1] * total.element_size()), 1)
    return [slice(start, min(start + step, len(total))) for start in range(0, len(total), step)]


def _round_within(total: Tensor, grad: Tensor, places: Tensor | None) -> None:
    """Fill `grad`, in whose memory `total` lies: its rows at ascending places, None for the first, and 0 elsewhere."""
    parts = _parts(total)
    for rows in parts:  # what is read later lies further on
        grad[rows] = total[rows].to(grad.dtype)
    if places is None:
        grad[len(total) :].zero_()
        return
    for rows in reversed(parts):  # none moves to a lower place
        grad.index_copy_(0, places[rows], grad[rows].clone())
    idle = torch.ones(len(grad), dtype=torch.bool, device=grad.device).index_fill_(0, places, False)
    grad.masked_fill_(idle.unsqueeze(1), 0.0)
