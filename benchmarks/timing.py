"""Seconds of a call, by the clock that the device deserves."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import psutil
import torch


class Stopwatch:
    """Times single calls. On CUDA by events, each after a write that pushes all inputs out of the L2 cache."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(size, dtype=torch.uint8, device=device)

    def seconds(self, call: Callable[[], Any]) -> float:
        """How long one call takes, with all the work that it left on the device."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        self._flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize(self.device)
        return begin.elapsed_time(end) / 1e3


def cpu_seconds() -> float:
    """CPU time that this process and those it started have had, on all cores; other programs do not count."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))
