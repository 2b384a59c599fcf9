"""Inputs that look like a language model's, how far results are from the truth, and ways to disturb the machinery."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vppo_kernels import reference, sweep, tiling
from vppo_kernels.reference import LOGPROB_BOUND, LOGPROB_BOUND_CUT, divergence_bound
from vppo_kernels.statistics import DivergenceOutput


@dataclass
class Views:
    """Hidden states `[N, D]` of two views, a head `[V, D]` with bias `[V]`, and targets `[N]`."""

    hidden: Tensor
    perturbed: Tensor
    weight: Tensor
    bias: Tensor
    targets: Tensor

    def to(self, dtype: torch.dtype | str) -> Views:
        """Everything but the targets, converted."""
        floats = (self.hidden.to(dtype), self.perturbed.to(dtype), self.weight.to(dtype), self.bias.to(dtype))
        return Views(*floats, self.targets.to(dtype) if isinstance(dtype, str) else self.targets)

    def grad(self) -> Views:
        """Copies that are leaves and want gradients."""
        leaves = (x.detach().clone().requires_grad_() for x in (self.hidden, self.perturbed, self.weight, self.bias))
        return Views(*leaves, self.targets)

    def logits(self, **head: Any) -> tuple[Tensor, Tensor]:
        """Plain logits of both views in the dtype at hand; `bias=True` adds the bias."""
        bias = self.bias if head.pop("bias", False) else None
        return tuple(reference.logits(h, self.weight, bias, **head) for h in (self.hidden, self.perturbed))  # type: ignore[return-value]

    def truth(self, kind: str = "kl", beta: float = 0.5, k: int | None = None, **head: Any) -> DivergenceOutput:
        """Every output in float64, on these very inputs."""
        return reference.divergence(*self.to(torch.float64).logits(**head), self.targets, kind, beta, k)


def make_views(
    rows: int = 96,
    vocab: int = 2000,
    hidden_size: int = 64,
    *,
    spread: tuple[float, float] = (3.0, 6.0),
    divergences: tuple[float, float] = (1e-6, 5.0),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Views:
    """Two views whose `KL` runs from one end of `divergences` to the other, row by row.

    `spread` is the standard deviation of the logits: 3 to 6 gives the peaked distributions of a language model (up to
    2 nats and below, maxima around 25), below 1 gives nearly flat ones.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    weight, direction = normal(vocab, hidden_size) / math.sqrt(hidden_size), normal(rows, hidden_size)
    scale = torch.linspace(*spread, rows, dtype=torch.float64)[torch.randperm(rows, generator=g)]
    hidden = normal(rows, hidden_size) * scale.unsqueeze(1)
    wanted = torch.logspace(*(math.log10(d) for d in divergences), rows, dtype=torch.float64)
    size = torch.full((rows, 1), 1e-3, dtype=torch.float64)
    for _ in range(25):
        got = reference.kl(hidden @ weight.T, (hidden + size * direction) @ weight.T)
        size *= (wanted / got).sqrt().clamp(0.3, 3).unsqueeze(1)
    targets = torch.randint(vocab, (rows,), generator=g)
    return Views(hidden, hidden + size * direction, weight, 0.5 * normal(vocab), targets).to(dtype)


def worst(got: DivergenceOutput, truth: DivergenceOutput, cut: bool = False) -> float:
    """Largest error of any output, as a multiple of its bound; NaN counts as infinite. `cut` as `divergence_bound`."""
    errors = []
    for name, value, exact in zip(got._fields, got, truth, strict=True):
        if value is not None and exact is not None and value.numel():
            absolute = LOGPROB_BOUND_CUT if cut else LOGPROB_BOUND
            bound = divergence_bound(exact, cut) if name == "divergence" else absolute
            errors.append(float(((value.detach().double() - exact.detach()).abs() / bound).max()))
    return max(math.inf if math.isnan(error) else error for error in errors)


def relative_error(got: Tensor, truth: Tensor) -> float:
    """Norm of the difference by the norm of the truth."""
    return float((got.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-300))


@contextlib.contextmanager
def tiles_of(rows: int, columns: int) -> Iterator[None]:
    """Cut everything into tiles of this shape, whatever the tiling would choose."""

    def chosen(source: Any, *_: Any, **__: Any) -> tiling.Tiling:
        return tiling.Tiling(min(rows, max(source.rows, 1)), min(columns, max(source.columns, 1)))

    with mock.patch.object(tiling, "choose_tiling", chosen):
        yield


@contextlib.contextmanager
def walks_of(rows: int, columns: int, band: int, together: int, stacked: bool) -> Iterator[None]:
    """Walk backwards through bands as on a GPU; numbers as those of a `Walk`."""
    tiles = tiling.Tiling(rows, columns, band)

    def chosen(source: Any, *_: Any) -> tiling.Walk:
        return tiling.Walk(min(together, source.rows) if source.shares_columns else 0, tiles, tiles, stacked)

    with mock.patch.object(tiling, "_walk", chosen):
        yield


@contextlib.contextmanager
def poisoned_buffers() -> Iterator[None]:
    """Memory that is handed out uninitialised holds NaN, or garbage for integers."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(math.nan if tensor.is_floating_point() else 77)

        return made

    with (
        mock.patch.object(torch, "empty", poison(torch.empty)),
        mock.patch.object(torch, "empty_like", poison(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", poison(Tensor.new_empty)),
    ):
        yield


@contextlib.contextmanager
def counted_products() -> Iterator[list[int]]:
    """Multiply-adds of every matrix product inside the block."""
    counts: list[int] = []

    def counting(product: Callable[..., Tensor], first: int) -> Callable[..., Tensor]:
        def counted(*args: Any, **kwargs: Any) -> Tensor:
            a, b = args[first : first + 2]
            counts.append(a.shape[0] * a.shape[1] * b.shape[1])
            return product(*args, **kwargs)

        return counted

    with (
        mock.patch.object(torch, "mm", counting(torch.mm, 0)),
        mock.patch.object(Tensor, "addmm_", counting(Tensor.addmm_, 1)),
    ):
        yield counts


OPENED = {
    torch.ops.vppo_kernels.sweep.default: sweep.run_sweep,
    torch.ops.vppo_kernels.sweep_backward.default: sweep.run_sweep_backward,
}


class PeakMemory(TorchDispatchMode):
    """Bytes of all tensors made inside the block that live at the same time, and the largest single one."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.largest = self._total = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._given: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._see(tensor, given=True)
        if func in OPENED:  # what an operator does inside is seen by entering again
            with self:
                out = OPENED[func](*args, **(kwargs or {}))
        else:
            out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor, given=False)
        return out

    def _see(self, tensor: Tensor, given: bool) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        for known in (self._live.get(key), self._given.get(key)):
            reference = known[0] if isinstance(known, tuple) else known
            if reference is not None and not reference.expired():
                return
        if given:
            self._given[key] = StorageWeakRef(storage)
            return
        old = self._live.pop(key, None)
        self._total += size - (old[1] if old else 0)
        self._live[key] = (StorageWeakRef(storage), size)
        self.largest = max(self.largest, size)
        if self._total > self.peak:  # the dead are counted out only where it matters
            self._live = {k: entry for k, entry in self._live.items() if not entry[0].expired()}
            self._total = sum(entry[1] for entry in self._live.values())
            self.peak = max(self.peak, self._total)
