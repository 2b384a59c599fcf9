"""A GPU's tensor cores on a CPU: 16-bit products with the roundings of a Hopper chip; see the C++ beside."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from vppo_kernels import tensor_cores

COMPILER = shutil.which("c++")
FLAGS = ["-std=c++17", "-O3", "-march=native", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]


@cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tensor_core.so"
        source = Path(__file__).with_suffix(".cpp")
        subprocess.run([str(COMPILER), *FLAGS, str(source), "-o", str(path)], check=True)
        return ctypes.CDLL(str(path))


def product(a: Tensor, b: Tensor, begin: Tensor | None = None) -> Tensor:
    """`a @ b` of finite 16-bit `[rows, depth]` and `[depth, columns]`, in float32; sums begin with those of `begin`."""
    left, right = a.float().contiguous(), b.T.float().contiguous()
    out = torch.zeros(len(left), len(right)) if begin is None else begin.float().clone().contiguous()
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in (left, right, out))
    _library().multiply(*pointers, *(ctypes.c_int64(n) for n in (*out.shape, left.shape[1])))
    return out


def _mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    out.copy_(product(a, b))


def _addmm_(total: Tensor, a: Tensor, b: Tensor) -> None:
    total.add_(product(a, b))


def _interpreted_dot() -> tuple[Any, Any]:
    """Triton's interpreter, whose own products of bfloat16 are wrong, and its `tl.dot` on tensor cores."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    usual = builder.create_dot

    def dot(self: Any, a: Any, b: Any, total: Any, *options: Any) -> Any:
        names = {"bf16": torch.bfloat16, "fp16": torch.float16}
        if str(a.dtype.scalar) not in names:
            return usual(self, a, b, total, *options)
        left, right = (torch.from_numpy(x.data.view("int16")).view(names[str(a.dtype.scalar)]) for x in (a, b))
        out = product(left, right, torch.from_numpy(total.data))
        return interpreter.TensorHandle(out.numpy(), total.dtype.scalar)

    return builder, dot


@contextmanager
def on_tensor_cores(add: bool = True) -> Iterator[None]:
    """Inside the block a CPU's 16-bit operands are multiplied as on a GPU.

    Args:
        add: Whether torch adds a product to a float32 matrix in place.
    """
    with ExitStack() as stack:
        accepted = tensor_cores._Accepted(product=True, sum=add)
        for name, value in dict(_on_gpu=lambda x: True, _accepted=lambda x: accepted, _mm=_mm, _addmm_=_addmm_).items():
            stack.enter_context(mock.patch.object(tensor_cores, name, value))
        if find_spec("triton") is not None:
            builder, dot = _interpreted_dot()
            stack.enter_context(mock.patch.object(builder, "create_dot", dot))
        yield
