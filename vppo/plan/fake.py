"""Tensors without values: what a pass of a model needs, found out without memory for it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from vppo.errors import InputError

aten = torch.ops.aten
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
IN_PLACE = {
    aten._fused_adamw_.default,
    aten._fused_adamw_.tensor_lr,
}  # which PyTorch would fake by copies of everything
RANGES = {aten.linspace.default, aten.arange.default, aten.arange.start, aten.arange.start_step}
ASKING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Fake(FakeTensorMode):
    """`FakeTensorMode` in which small tensors of integers are real, and what is computed from real ones alone.

    Models ask where a prompt's images lie and how large they are, and cut their tensors by the answers. Those questions
    are put to a few integers, which can be had; what is multiplied are weights, which are fake, and with them all that
    they meet.
    """

    MOST = 1 << 22  # entries of a real tensor: the tokens of a generation, and no mask of a long row

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in IN_PLACE:
            return None
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(isinstance(leaf, FakeTensor) for leaf in given):
            if func in INDEXED:
                args = (args[0], _numbered(args[1]), *args[2:])
            args, kwargs = tree_map_only(Tensor, self._faked, (args, kwargs))
            return super().__torch_dispatch__(func, types, args, kwargs)
        if given and (func.is_view or ASKING & set(func.tags) or _entries(given) <= self.MOST):
            return func(*args, **kwargs)
        found = super().__torch_dispatch__(func, types, args, kwargs)
        made = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        wanted = given or func in RANGES or not any(leaf.is_floating_point() for leaf in made)
        return func(*args, **kwargs) if wanted and all(leaf.numel() <= self.MOST for leaf in made) else found

    def _faked(self, tensor: Tensor) -> Tensor:
        """Like `from_tensor`, which looks into a tensor for what none has here, and takes a hundred times as long."""
        if isinstance(tensor, FakeTensor):
            return tensor
        shape = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        return FakeTensor(self, shape, tensor.device)


def _entries(given: list[Tensor]) -> float:
    """At most so many has what is computed from these, where lengths are multiplied by broadcasting alone."""
    if len(given) == 1:
        return given[0].numel()
    try:
        return math.prod(torch.broadcast_shapes(*(tensor.shape for tensor in given)))
    except RuntimeError:
        return math.prod(tensor.numel() for tensor in given)


def _numbered(indices: Any) -> list[Any]:
    """Real masks as the places that they name, whose number is known then."""
    found: list[Any] = []
    for index in indices:
        masks = isinstance(index, Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor)
        found += index.nonzero().unbind(1) if masks else [index]
    return found


@contextmanager
def fake_processes(count: int) -> Iterator[None]:
    """Within the block this process is the first of so many, whose collectives do nothing.

    Raises:
        InputError: This process has real ones.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise InputError("plan: this process belongs to a group of processes already: run it in one alone")
    dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
