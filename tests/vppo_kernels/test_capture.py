"""A forward without gradient can be recorded into a CUDA graph: nothing in it reads a value or waits for the device.

It runs on tensors that have no values, so whatever asks for one raises. `test_gpu.py` records a graph.
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from support.chips import gpu
from support.views import OPENED
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vppo_kernels import backends, divergence, linear_divergence, linear_logprob, sweep
from vppo_kernels.backends import available

ROWS, VOCAB, WIDTH = 3000, 20_000, 128


class OnOneDevice(TorchDispatchMode):
    """An error where a tensor of the host takes part, whose copy to the device would be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and tensor.dim():
                assert tensor.device.type == "meta", func
        if func in OPENED:
            with self:
                return OPENED[func](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class Launched:
    """Kernels that are launched and do nothing."""

    def __init__(self) -> None:
        self.count = 0

    def __getitem__(self, grid: Any) -> Any:
        return self

    def __call__(self, *arguments: Any, **options: Any) -> None:
        self.count += 1


def without_values(launched: Launched) -> ExitStack:
    from vppo_kernels.backends import triton, triton_fused

    stack = ExitStack()
    stack.enter_context(gpu("H100"))
    for module in (triton, triton_fused):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            stack.enter_context(mock.patch.object(module, name, launched))
    stack.enter_context(mock.patch.object(backends, "_missing", lambda *_: ""))
    stack.enter_context(mock.patch.object(sweep, "full_precision", lambda device: nullcontext()))
    return stack


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("name", [name for name in available("cpu") if name.startswith("triton")])
@pytest.mark.parametrize("operation", ["kl", "reverse_kl", "jsd", "logprob", "given logits"])
def test_nothing_in_a_forward_depends_on_values(operation: str, name: str) -> None:
    launched = Launched()
    hidden, perturbed, weight, bias = empty(ROWS, WIDTH), empty(ROWS, WIDTH), empty(VOCAB, WIDTH), empty(VOCAB)
    targets = empty(ROWS, dtype=torch.int64)
    with without_values(launched), OnOneDevice(), torch.no_grad():
        if operation == "logprob":
            output: Any = linear_logprob(hidden, weight, targets, bias, backend=name)
        elif operation == "given logits":
            output = divergence(empty(ROWS, VOCAB), empty(ROWS, VOCAB), targets=targets, backend=name)
        else:
            output = linear_divergence(
                hidden, perturbed, weight, bias, targets=targets, kind=operation, backend=name, temperature=0.7
            )
    assert output[0].shape == (ROWS,) and launched.count > 0


def test_a_value_that_is_asked_for_raises() -> None:
    """So the test above proves something."""
    with OnOneDevice():
        for ask in (Tensor.item, Tensor.nonzero, Tensor.cpu, bool):
            with pytest.raises((RuntimeError, NotImplementedError)):
                ask(empty(1))
        with pytest.raises(AssertionError):
            empty(3).copy_(torch.ones(3))
