"""Who computes: which backends there are, which of them run here, and what a name stands for.

A backend is a module of tile operations, and a module of token operations that goes with it; `protocols.py` says what
both must have. The matrix products between them stay with torch, except where a backend has a faster one.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

from torch import Tensor, compiler, cuda, float32, float64
from torch import device as Device
from torch import dtype as Dtype

from vppo_kernels import arguments, native_library
from vppo_kernels.backends import torch_tokens
from vppo_kernels.backends.protocols import FusedSweep, TileOps, TokenOps
from vppo_kernels.linear_head import LinearHead, NarrowProduct

NAMES = ("torch", "native", "native_fused", "triton", "triton_fused")


def _missing(name: str, device: Device, dtype: Dtype) -> str:
    """Why a backend cannot take tensors of this device and dtype; "" if it can."""
    if name == "torch":
        return ""
    if name == "native":
        return "it takes float32, bfloat16 and float16" if dtype == float64 else native_library.missing(device.type)
    if name == "native_fused":
        if dtype == float64:
            return "it takes bfloat16 and float16"
        return native_library.missing(device.type) or _no_sweep(device)
    if not _installed("triton"):
        return "Triton is not installed"
    if dtype == float64:
        return "it takes float32, bfloat16 and float16"
    if device.type != "cuda" and not (device.type == "cpu" and _interpreted()):
        return "Triton needs a GPU (or TRITON_INTERPRET=1)"
    return ""


@cache
def _no_sweep(device: Device) -> str:
    """Why the native library has no fused sweep for this device; "" if it has one."""
    places = getattr(native_library.library(device.type), "sweep_places", None)  # of CUDA's library, not of the CPU's
    index = device.index
    if index is None:
        index = cuda.current_device() if device.type == "cuda" and cuda.is_available() else 0
    return "" if places is not None and places(index, 1) else "it takes a Hopper GPU (compute capability 9.0)"


@cache
def _installed(package: str) -> bool:
    return find_spec(package) is not None


def _interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


@cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def available(device: Device | str = "cpu", dtype: Dtype = float32) -> list[str]:
    """Names of the backends that take tensors of this device and dtype."""
    return [name for name in NAMES if not _missing(name, Device(device), dtype)]


def _check_name(name: str) -> None:
    arguments.one_of("backend", name, ("auto", *NAMES))


def _choose(name: str, device: Device, dtype: Dtype) -> str:
    """The backend that a name stands for; "auto" is the first available of triton (on a GPU), native and torch."""
    if name == "auto":
        best = ("triton", "native", "torch") if device.type == "cuda" else ("native", "torch")
        name = next(name for name in best if not _missing(name, device, dtype))
        if name == "torch" and dtype != float64 and device.type in ("cpu", "cuda"):
            kind, reason = "CPU" if device.type == "cpu" else "GPU", _missing("native", device, dtype)
            _say_once(f'backend "auto" takes plain torch on this {kind}, which is slower: {reason}')
    _check_name(name)
    reason = _missing(name, device, dtype)
    if reason:
        raise ValueError(f"backend: got {name!r}, takes one of {['auto', *available(device, dtype)]} here: {reason}")
    return name


class Backend(NamedTuple):
    """What sweeps over the vocabulary.

    Attributes:
        name: Of the backend, never "auto".
        tiles: Its tile operations.
        fused: Its sweeps with the product inside, where it has them.
        product: Its product of bfloat16 operands for a `LinearHead`, where this machine can run one.
    """

    name: str
    tiles: TileOps
    fused: FusedSweep | None = None
    product: NarrowProduct | None = None

    def check(self, source: LinearHead) -> None:
        """Raise ValueError where its fused sweep takes no operation on these hidden states and this head."""
        if self.fused is not None and (reason := self.fused.refuses(source)):
            raise ValueError(f"backend: got {self.name!r}, {reason}")


def resolve(name: str, device: Device, dtype: Dtype) -> Backend:
    """The backend of that name, or the one that "auto" stands for.

    Raises:
        ValueError: There is no such backend, or not for these tensors.
    """
    name = _choose(name, device, dtype)
    if name == "torch":
        from vppo_kernels.backends import torch

        return Backend(name, torch)
    if name == "native":
        from vppo_kernels.backends import native

        return Backend(name, native, product=native.product if native.has_product() else None)
    if name == "native_fused":
        from vppo_kernels.backends import native, native_fused

        return Backend(name, native, fused=native_fused)
    from vppo_kernels.backends import triton

    if name == "triton":
        return Backend(name, triton)
    from vppo_kernels.backends import triton_fused

    return Backend(name, triton, fused=triton_fused)


def token_ops(name: str, *tensors: Any) -> TokenOps:
    """The token operations of that backend, or of the one that "auto" stands for, for these tensors.

    A fused backend has those of the one without a fused sweep. Empty input goes to plain torch, which launches nothing,
    and so does code that `torch.compile` traces, whatever the name: the compiler fuses it.

    Raises:
        ValueError: There is no such backend, or not for these tensors.
    """
    if compiler.is_compiling():
        _check_name(name)
        return torch_tokens
    given = [x for x in tensors if isinstance(x, Tensor)]
    dtype = float64 if any(x.dtype == float64 for x in given) else float32
    chosen = _choose(name, given[0].device, dtype)
    if chosen == "torch" or not given[0].numel():
        return torch_tokens
    if chosen in ("native", "native_fused"):
        from vppo_kernels.backends import native_tokens

        return native_tokens
    from vppo_kernels.backends import triton_tokens

    return triton_tokens
