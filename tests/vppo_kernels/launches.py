"""Launches every kernel of tiles through Triton, on a GPU that is not here; prints a line of JSON for each.

What Triton hands to the driver is noted: of the ordinary launch, and of the one that `start` has prepared. Run as a
process of its own: kernels that the interpreter has taken over are not launched.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

LAUNCHED: list[list[Any]] = []
METADATA = 6  # place of what is made for hooks alone, of the launch itself


class Launcher:
    """What a compiled kernel calls to start on the device: (grid, stream, function, ..., arguments)."""

    def __init__(self, *_: Any) -> None: ...

    def __call__(self, *arguments: Any) -> None:
        place = arguments[:METADATA] + arguments[METADATA + 1 :]
        LAUNCHED.append([x.data_ptr() if isinstance(x, torch.Tensor) else x for x in place])


class Absent:
    """A driver of an H100 that loads and launches nothing."""

    launcher_cls = Launcher
    stream = 7
    utils = SimpleNamespace(
        load_binary=lambda *_: (1, 2, 32, 0, 1024),
        get_device_properties=lambda device: dict(max_shared_mem=232_448, multiprocessor_count=132, warpSize=32),
    )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def main() -> None:
    device = Absent()
    driver.set_active(device)
    from vppo_kernels.backends import triton as tiles
    from vppo_kernels.logits import LogitTransform

    rows, columns = 32, 1024
    z, narrow = torch.zeros(2, rows, columns), torch.zeros(2, 3 * rows, columns, dtype=torch.bfloat16)
    stats, targets, grads = torch.zeros(10, rows), torch.zeros(rows, dtype=torch.int64), torch.zeros(5, rows)
    once, capped = LogitTransform(), LogitTransform(0.9, 1.1, 20.0)
    calls: dict[str, Callable[[int], Any]] = {
        "fold": lambda first: tiles.fold(z[0], targets, first, stats[:4], z),
        "fold_pair": lambda first: tiles.fold_pair(z, None, first, stats, z),
        "gradient": lambda first: tiles.gradient_(z[0], stats[:4], targets, first, grads[:2], capped, z[0]),
        "gradient_pair": lambda first: tiles.gradient_pair_(
            z, stats, None, 0.5, targets, first, grads, (once, capped), narrow[:, :rows]
        ),
    }
    for name, call in calls.items():
        tiles._prepared.clear()
        noted = []
        for forget, first in ((False, 4096), (False, 0), (False, 1), (False, 4097), (True, 4097)):
            if forget:
                tiles._prepared.clear()
            device.stream += 1
            call(first)
            (launched,) = LAUNCHED
            LAUNCHED.clear()
            noted.append(dict(first=first, remembered=len(tiles._prepared), at=device.stream, launched=launched))
        print(json.dumps(dict(kernel=name, noted=noted), default=str), flush=True)


if __name__ == "__main__":
    main()
