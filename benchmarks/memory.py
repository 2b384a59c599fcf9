"""Working memory of a contestant: the peak of what torch allocates for it, less what its call returns."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.profiler import profile
from torch.utils._pytree import tree_leaves

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler prints when it starts and stops


class Scale:
    """Weighs one contestant. Nothing else may allocate between `prepare` and `workspace` and stay."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._held = 0
        self._before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0

    def prepare(self, prepare: Callable[[], Callable[[], Any]]) -> Callable[[], Any]:
        """Prepare the contestant, and count what it keeps from then on."""
        if self.device.type == "cuda":
            return prepare()
        call, self._held, _ = _allocations(prepare)
        return call

    def workspace(self, call: Callable[[], Any]) -> int:
        """Bytes that the contestant holds at most, while it is called, beyond its inputs and its result."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            result = call()
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device) - self._before
        else:
            result, _, peak = _allocations(call)
            peak += self._held
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in tree_leaves(result)
            if isinstance(tensor, torch.Tensor)
        }
        return max(0, peak - sum(storages.values()))


def _allocations(call: Callable[[], Any]) -> tuple[Any, int, int]:
    """What a call returns, the bytes of CPU memory that it left allocated, and the most that it had at a time."""
    # the allocator's own reports, which compiled code passes through as well
    with profile(profile_memory=True) as profiler:
        result = call()
    assert profiler.kineto_results is not None
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return result, live, peak
