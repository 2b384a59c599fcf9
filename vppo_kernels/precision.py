"""float32 matrix products in float32: torch has only settings of the whole process for it, which threads must share."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def _backends() -> list[Any]:
    """The settings that have an `fp32_precision` of their own since torch 2.9: products of cuBLAS and of oneDNN."""
    found = (getattr(module, "matmul", None) for module in (torch.backends.cuda, torch.backends.mkldnn))
    return [matmul for matmul in found if hasattr(matmul, "fp32_precision")]


def _overall() -> str | None:
    """`torch.get_float32_matmul_precision()`, or None where the backends' own settings contradict it."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


class ExactFloat32:
    """Full precision for as long as any thread holds it: the first one in sets it, the last one out restores it."""

    def __init__(self) -> None:
        self._lock, self._holders = threading.Lock(), 0
        self._before: tuple[str | None, list[str]] = None, []

    @contextmanager
    def held(self) -> Iterator[None]:
        with self._lock:
            if self._holders == 0:
                self._set()
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if self._holders == 0:
                    self._restore()

    def _set(self) -> None:
        self._before = _overall(), [matmul.fp32_precision for matmul in _backends()]
        if self._before[0] is not None:
            torch.set_float32_matmul_precision("highest")
        for matmul in _backends():
            matmul.fp32_precision = "ieee"

    def _restore(self) -> None:
        overall, own = self._before
        if overall is not None:
            torch.set_float32_matmul_precision(overall)
        for matmul, precision in zip(_backends(), own, strict=True):
            matmul.fp32_precision = precision


exact_float32 = ExactFloat32()
