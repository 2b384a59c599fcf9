"""A GPU's tensor cores on a CPU: 16-bit products with the roundings of a Hopper chip; see the C++ beside."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
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


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of finite 16-bit `[rows, depth]` and `[depth, columns]`, in float32."""
    left, right = a.float().contiguous(), b.T.float().contiguous()
    out = torch.empty(len(left), len(right))
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in (left, right, out))
    _library().multiply(*pointers, *(ctypes.c_int64(n) for n in (*out.shape, left.shape[1])))
    return out


def _mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    out.copy_(product(a, b))


def _addmm_(total: Tensor, a: Tensor, b: Tensor) -> None:
    total.add_(product(a, b))


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
        yield
