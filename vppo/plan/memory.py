"""torch's memory trackers, which keep the peak of each place of a pass and count its products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from vppo_kernels.tiling import current_workspace

aten = torch.ops.aten
CATEGORIES = {  # the trackers' names, and ours
    "Sharded Param": "weights",
    "Parameter": "weights",
    "Unsharded Param": "gathered weights",
    "All Gather": "gathered weights",
    "Sharded Grad": "gradients",
    "Unsharded Grad": "gradients",
    "Gradient": "gradients",
    "Reduce Scatter": "gradients",
    "OptState": "optimizer",
    "Optstate": "optimizer",
    "Inputs": "rollouts",
    "Other": "rollouts",
    "Buffer": "activations",
    "Activation": "activations",
    "Temp": "activations",
}
ORDER = ("weights", "gathered weights", "gradients", "optimizer", "rollouts", "activations")
Peak = dict[str, float]  # bytes of each category, at the moment when they were most together


class _Places:
    """What both trackers do here.

    Attributes:
        place: What is at work; whoever runs the pass sets it.
        peaks: Of each place.
        products: Of each first part of a place, floating-point operations.
    """

    _curr_mem_snap: dict[Any, Any]
    _update_and_maybe_create_winfos: Callable[..., Any]
    _ref_class: Any

    def _begin(self) -> None:
        self.place: tuple[Any, ...] = ("",)
        self.peaks: dict[tuple[Any, ...], Peak] = {}
        self.products: dict[Any, float] = {}

    def mark(self, tensor: Any, name: str) -> None:
        """Counts a tensor, of the caller's own, in a category of the tracker's."""
        self._update_and_maybe_create_winfos(tensor, self._ref_class(name))

    def look(self) -> None:
        """Compares what is held with the place's peak."""
        for held in self._curr_mem_snap.values():
            if held["Total"] > sum(self.peaks.get(self.place, {"": -1}).values()):
                peak: Peak = {}
                for kind, size in held.items():
                    if kind != "Total":
                        name = CATEGORIES[kind.value]
                        peak[name] = peak.get(name, 0) + size
                self.peaks[self.place] = peak

    def _update_peak_stats(self, _: Any) -> None:
        self.look()

    def _counted(self, run: Callable[..., Any], func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        work = None
        if name.startswith("vppo_kernels::sweep"):  # what is inside is hidden from a tracker
            work = run(aten.empty.memory_format, (), ([_workspace(name, args)],), {"dtype": torch.uint8})
        found = run(func, types, args, kwargs)
        del work
        if found is NotImplemented:  # a DTensor's, whose own operations follow
            return found
        count = _products(func, name, args, kwargs, found)
        self.products[self.place[0]] = self.products.get(self.place[0], 0) + count
        return found


class ShardedMemory(_Places, FSDPMemTracker):
    """Of a model that FSDP2 shards."""

    def __init__(self, model: Any, optimizer: Any) -> None:
        FSDPMemTracker.__init__(self, model, optimizer)
        self._begin()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._counted(super().__torch_dispatch__, func, types, args, kwargs)


class WholeMemory(_Places, MemTracker):
    """Of a model that one process holds."""

    def __init__(self, model: Any, optimizer: Any) -> None:
        MemTracker.__init__(self)
        self._begin()
        self.track_external(optimizer, model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: self.mark(p.grad, "Gradient"))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._counted(super().__torch_dispatch__, func, types, args, kwargs)

    # of single modules nothing is wanted here
    def _pre_fw_hook(self, module: Any, inputs: Any) -> None: ...

    def _post_fw_hook(self, module: Any, inputs: Any, outputs: Any) -> None: ...

    def _pre_bw_hook(self, module: Any, args: Any) -> None: ...

    def _post_bw_hook(self, module: Any, args: Any) -> None: ...


def _head(name: str, args: Any) -> tuple[list[Any], Any]:
    """Hidden states and weight of a sweep over the vocabulary, or of its backward."""
    first = 2 if name.endswith("backward") else 0
    return args[first], args[first + 1]


def _workspace(name: str, args: Any) -> int:
    """Bytes of a sweep beside inputs and outputs: its bound, or what all of its logits take where that is less."""
    views, weight = _head(name, args)
    rows, (vocabulary, width) = len(views[0]), weight.shape
    logits = len(views) * rows * vocabulary * 4
    sums = len(views) * rows * width * 4 if name.endswith("backward") else 0
    return min(current_workspace(), logits + sums)


def _products(func: Any, name: str, args: Any, kwargs: Any, found: Any) -> float:
    if name.startswith("vppo_kernels::sweep"):
        views, weight = _head(name, args)
        passes = 3 if name.endswith("backward") else 1  # logits again, and both gradients
        return 2.0 * passes * len(views) * len(views[0]) * weight.numel()
    if name == "aten::_scaled_dot_product_flash_attention_for_cpu":
        return float(sdpa_flop_count(*(x.shape for x in args[:3])))
    if name == "aten::_scaled_dot_product_flash_attention_for_cpu_backward":
        return float(sdpa_backward_flop_count(args[0].shape, *(x.shape for x in args[1:4])))
    formula = flop_registry.get(func._overloadpacket)
    return 0.0 if formula is None else float(formula(*args, **kwargs, out_val=found))
