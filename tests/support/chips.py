"""GPUs that are not here: their sizes, and tensors on them that have no values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import torch

from vppo_kernels import tensor_cores
from vppo_kernels.tiling import MIB

CHIPS = {"H100": (50, 132), "B200": (126, 148)}  # MiB of L2, multiprocessors


@contextmanager
def gpu(chip: str, add: bool = True) -> Iterator[None]:
    """Tensors without values on this GPU, whose products are accepted but not made."""
    cache, multiprocessors = CHIPS[chip]
    properties = SimpleNamespace(L2_cache_size=cache * MIB, multi_processor_count=multiprocessors)
    nothing = dict(_mm=lambda a, b, out: None, _addmm_=lambda total, a, b: None)
    accepted = tensor_cores._Accepted(product=True, sum=add)
    with (
        mock.patch.object(torch.cuda, "get_device_properties", lambda device: properties),
        mock.patch.multiple(tensor_cores, _accepted=lambda x: accepted, **nothing),
        mock.patch.object(tensor_cores, "_on_gpu", lambda x: True),
    ):
        yield
