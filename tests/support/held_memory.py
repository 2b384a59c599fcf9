"""Memory that a trainer holds at most while it scores and while it trains, on a CPU."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.profiler import record_function
from torch.distributed import ProcessGroupGloo, Work
from torch.distributed._tools.mem_tracker import MemTracker

from vppo import VPPOTrainer


def of_allocator(build: Callable[[], VPPOTrainer]) -> dict[str, int]:
    """What PyTorch's allocator tells the profiler, of a trainer that is built and trains.

    The profiler sees what its own thread frees. With several processes it counts too much: what a collective has moved
    is often freed by a thread of gloo's, and then never taken off.
    """

    def says(name: str) -> None:
        with record_function(f"phase: {name}"):
            pass

    with torch.profiler.profile(profile_memory=True) as profile:
        trainer = build()
        _mark(trainer, says)
        trainer.train()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    peaks: dict[str, int] = {}
    held, phase = 0, ""
    for event in events:
        if event.name() == "[memory]":
            held += event.nbytes()
            if phase:
                peaks[phase] = max(peaks.get(phase, 0), held)
        elif event.name().startswith("phase: "):
            phase = event.name().removeprefix("phase: ")
    return peaks


def of_tensors(build: Callable[[], VPPOTrainer]) -> dict[str, int]:
    """The tensors that are alive while a trainer is built and trains, whatever thread lets them go.

    What an operation takes within itself is not among them: the copy that gloo makes to reduce a layer's gradients,
    the kernels' working memory.
    """
    with Tensors() as held:
        trainer = build()
        _mark(trainer, held.begin)
        trainer.train()
    return held.peaks


class Tensors(MemTracker):
    """torch's tracker, which hears of the end of each tensor's storage.

    Attributes:
        peaks: Bytes held at most in each phase that has begun.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peaks: dict[str, int] = {}
        self._phase = ""

    def begin(self, phase: str) -> None:
        self._phase = phase
        self._update_peak_stats(None)

    def _update_peak_stats(self, _: Any) -> None:
        if self._phase:
            held = self._curr_mem_snap[torch.device("cpu")]["Total"]
            self.peaks[self._phase] = max(self.peaks.get(self._phase, 0), held)

    def _track(self, reftype: Any, t: torch.Tensor) -> None:
        if t.untyped_storage().resizable():  # others are numpy's: a processor's images, which no GPU holds
            super()._track(reftype, t)

    # of single modules nothing is wanted here
    def _pre_fw_hook(self, module: Any, inputs: Any) -> None: ...

    def _post_fw_hook(self, module: Any, inputs: Any, outputs: Any) -> None: ...

    def _pre_bw_hook(self, module: Any, args: Any) -> None: ...

    def _post_bw_hook(self, module: Any, args: Any) -> None: ...


def prompt_gloo() -> str:
    """The name of a gloo that has let go of all tensors of a collective when this process has waited for it.

    Gloo's threads do so a little later, whenever they get the interpreter's lock: what is held would depend on how busy
    the machine is. This one has a single thread, which comes to a second collective when it is done with the first.
    """

    def build(store: Any, rank: int, size: int, timeout: Any) -> Any:
        options = ProcessGroupGloo._Options()
        options._devices, options._timeout = [ProcessGroupGloo.create_default_device()], timeout
        options._threads = 1
        return ProcessGroupGloo(store, rank, size, options)

    wait = Work.wait

    def wait_for_all(work: Any, *args: Any) -> Any:
        found = wait(work, *args)
        wait(dist.group.WORLD.barrier())
        return found

    Work.wait = wait_for_all
    dist.Backend.register_backend("prompt_gloo", build, devices=["cpu"])
    return "prompt_gloo"


def _mark(trainer: Any, says: Callable[[str], None]) -> None:
    """Says when a phase begins, and "" when it ends, from the second step on."""

    def around(name: str, first: str | None, last: bool) -> None:
        method = getattr(trainer, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            later = trainer.state.global_step > 0
            if first and later:
                gc.collect()
                says(first)
            found = method(*args, **kwargs)
            if last and later:
                says("")
            return found

        vars(trainer)[name] = run

    around("_measure_tokens", "scoring", True)
    around("_compute_loss", "training pass", False)  # which ends with the backward, in the method around it
    around("training_step", None, True)
