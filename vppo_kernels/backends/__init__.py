"""The tile operations, once per kind of machine. A backend folds tiles and writes gradients; it knows nothing else.

Every backend is a module with `fold`, `fold_pair`, `fold_jsd`, `gradient_` and `gradient_pair_` (`torch.py` says what
each does) and two numbers for the tile rule: `SCRATCH`, the tiles of working space that the driver hands to a fold, and
`PEAK`, the tiles of one view that its hungriest step holds at a time. One that also multiplies has `sweep_pair`, or
`product`, a `NarrowProduct`, and `has_product`, which says whether this machine can run it.

What happens to tokens afterwards has modules of kernels of its own: `triton_selection.py` for selection, shaping and
the loss, `native_selection.py` for selection and the loss. Plain torch stands beside each call of them.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from torch import Tensor, compiler, float32, float64
from torch import device as Device
from torch import dtype as Dtype

from vppo_kernels import arguments, native_library
from vppo_kernels.logits import NarrowProduct

NAMES = ("torch", "native", "triton", "triton_fused")


def _missing(name: str, device: Device, dtype: Dtype) -> str:
    """Why a backend cannot take tensors of this device and dtype; "" if it can."""
    if name == "torch":
        return ""
    if name == "native":
        return "it takes float32, bfloat16 and float16" if dtype == float64 else native_library.missing(device.type)
    if not _installed("triton"):
        return "Triton is not installed"
    if dtype == float64:
        return "it takes float32, bfloat16 and float16"
    if device.type != "cuda" and not (device.type == "cpu" and _interpreted()):
        return "Triton needs a GPU (or TRITON_INTERPRET=1)"
    return ""


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
    """The backend that a name stands for; "auto" is the first that is there of Triton's (on a GPU), native, torch."""
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


def resolve(name: str, device: Device, dtype: Dtype) -> ModuleType:
    """The backend module of that name, or of the one that "auto" stands for.

    Raises:
        ValueError: There is no such backend, or not for these tensors.
    """
    return import_module(f"vppo_kernels.backends.{_choose(name, device, dtype)}")


def narrow_product(backend: ModuleType) -> NarrowProduct | None:
    """The backend's own product of bfloat16 operands for a `LinearHead`, if it has one on this machine."""
    return backend.product if hasattr(backend, "product") and backend.has_product() else None


def token_kernels(name: str, *tensors: Any) -> ModuleType | None:
    """The kernels of selection, shaping and loss, or None where plain torch takes these tensors.

    Both of Triton's backends have the same ones; the native one leaves shaping to torch. Nothing is launched on empty
    input. Code that `torch.compile` traces stays plain torch, whatever the name: the compiler fuses it.

    Raises:
        ValueError: There is no such backend, or not for these tensors.
    """
    if compiler.is_compiling():
        _check_name(name)
        return None
    given = [x for x in tensors if isinstance(x, Tensor)]
    dtype = float64 if any(x.dtype == float64 for x in given) else float32
    chosen = _choose(name, given[0].device, dtype)
    if chosen == "torch" or not given[0].numel():
        return None
    return import_module(f"vppo_kernels.backends.{'native' if chosen == 'native' else 'triton'}_selection")
