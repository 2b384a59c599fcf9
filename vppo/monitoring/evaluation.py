"""What makes evaluations comparable with each other, and training the same with and without them."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed

KEY = int.from_bytes(b"eval", "big")  # in the place of the step in the seeds of training's views; larger than any step


@contextmanager
def random_numbers(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers of their own for what runs inside; afterwards all generators go on where they were.

    Args:
        seed: Every process draws from its own stream of this seed.
        device: Where the model is. On Apple's `mps`, whose generator torch cannot put aside, that one alone moves on.
    """
    python, numpy = random.getstate(), np.random.get_state()
    devices = [] if device.type in ("cpu", "mps") else range(getattr(torch, device.type).device_count())
    kind = "cuda" if not devices else device.type
    with torch.random.fork_rng(devices=devices, device_type=kind):
        set_seed(seed, device_specific=True)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def fingerprint(row: Mapping[str, Any]) -> int:
    """A number of 32 bits for a problem, made of its messages and the pixels of its images.

    It belongs to the problem alone: not to the order, the batch or the process in which it is evaluated.

    Args:
        row: Of a dataset as TRL takes it: `prompt`, and `images` or `image`.
    """
    problem = [row.get("prompt"), row.get("images"), row.get("image")]
    return zlib.crc32(json.dumps(problem, default=_content).encode())


def _content(value: Any) -> Any:
    """What JSON cannot hold: the pixels of an image, else the value's own text."""
    if hasattr(value, "tobytes"):
        return [str(getattr(value, "size", None)), zlib.crc32(value.tobytes())]
    return str(value)
