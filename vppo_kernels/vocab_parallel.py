"""A vocabulary split over ranks (tensor parallel): who holds which columns, and what they tell each other.

Every rank sweeps its own rows of the weight. Their statistics merge as those of tiles do, so a rank tells the others a
few numbers per row of hidden states and nothing else.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vppo_kernels import arguments

CHECKSUM_TOLERANCE = 1e-3  # relative: the same hidden states may have been summed in another order on each rank


def check_group(name: str, value: Any) -> None:
    """Raise TypeError where something else than a process group or None was given."""
    if value is not None and not isinstance(value, dist.ProcessGroup):
        raise TypeError(f"{name}: got {type(value).__name__}, takes a torch.distributed.ProcessGroup or None")


class Shard(NamedTuple):
    """The part of a vocabulary that this process holds.

    Attributes:
        first: Vocabulary index of its first column.
        columns: How many columns it holds, without padding.
        max_columns: The most that any rank holds. Tiles are cut by it, so that all ranks have the same row blocks.
        total: Size of the whole vocabulary.
        group: Name of the process group; "" for a vocabulary that is whole.
    """

    first: int
    columns: int
    max_columns: int
    total: int
    group: str = ""


def shard_of(
    process_group: Any, views: list[Tensor], local: int, vocab_size: int | None, of: str, same: dict[str, Any]
) -> Shard:
    """Find this rank's place in the vocabulary. Collective with a group, and the only step that waits for the device.

    Args:
        process_group: Its ranks hold consecutive parts of the vocabulary, of any sizes, in rank order; None for no
            split.
        views: The `[rows, D]` hidden states, the same on every rank, or the `[rows, columns]` logits of this rank.
        local: Columns on this rank, padding included.
        vocab_size: Size of the whole vocabulary without padding; None if there is no padding.
        of: "weight" or "logits": what holds the columns.
        same: Other arguments that must be the same on every rank, by name: numbers, names, None, or tensors of tokens.

    Raises:
        TypeError: `process_group` is something else.
        ValueError: Ranks have different rows or other such arguments, or `vocab_size` exceeds what they hold together.
    """
    sizes, rank, name = [local], 0, ""
    check_group("process_group", process_group)
    if process_group is not None:
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "process_group: got one where torch.compile traces, takes None there: ranks tell each other what they "
                "hold before anything is computed (leave the operation out with torch.compiler.disable)"
            )
        sizes = _sizes(process_group, views, local, of, {**same, "vocab_size": vocab_size})
        rank, name = dist.get_rank(process_group), process_group.group_name
    arguments.vocabulary(vocab_size, sum(sizes), f"the vocabulary that {of} holds")
    total = sum(sizes) if vocab_size is None else vocab_size
    firsts = [sum(sizes[:r]) for r in range(len(sizes))]
    held = [min(max(total - first, 0), size) for first, size in zip(firsts, sizes, strict=True)]
    return Shard(firsts[rank], held[rank], max(held), total, name)


def _number(value: Any) -> float:
    """A number that differs where the argument does; of tokens it also differs where their order does."""
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex():
            return -2.0  # a wrong dtype is refused later
        places = torch.arange(value.numel(), device=value.device) % 65521 + 1
        return float((value.flatten().long() * places).sum() % 2**31)
    if isinstance(value, str):
        return float(zlib.crc32(value.encode()))
    return float(value) if isinstance(value, int | float) else -1.0


def _sizes(process_group: Any, views: list[Tensor], local: int, of: str, same: dict[str, Any]) -> list[int]:
    """Columns of every rank. Raises where ranks hold other rows or arguments, as they do if the weight is FSDP's."""
    counts = torch.tensor([local, len(views[0])], dtype=torch.float64, device=views[0].device)
    contents = [v.detach().float().abs().sum().nan_to_num() / max(v.numel(), 1) for v in views if of == "weight"]
    others = torch.tensor([_number(value) for value in same.values()], dtype=torch.float64, device=counts.device)
    mine = torch.stack([*others, *counts, *(mean.double() for mean in contents)])
    everyone = [theirs.tolist() for theirs in _gather(mine, process_group)]
    for rank, theirs in enumerate(everyone):
        for name, got, expected in zip(same, theirs, everyone[0], strict=False):
            if got != expected:
                raise ValueError(f"{name}: differs between ranks 0 and {rank} of process_group, takes the same on all")
    everyone = [theirs[len(same) :] for theirs in everyone]
    for rank, theirs in enumerate(everyone):
        far = [abs(x - y) > CHECKSUM_TOLERANCE * max(x, y) for x, y in zip(theirs[2:], everyone[0][2:], strict=True)]
        if theirs[1] != everyone[0][1] or any(far):
            raise ValueError(
                f"{'hidden' if of == 'weight' else of}: differs between ranks 0 and {rank} of process_group, takes the "
                "same rows on every rank (a weight that FSDP has sharded is not split over the vocabulary: call the "
                "operation inside the head module's forward)"
            )
    return [int(theirs[0]) for theirs in everyone]


def _gather(value: Tensor, process_group: Any) -> list[Tensor]:
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(parts, value.contiguous(), group=process_group)
    return parts


def _group(name: str) -> Any:
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def merge_ranks(packed: Tensor, group: str, merge: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Packed statistics of all ranks' columns, from those of this rank's; the same on every rank."""
    if not group:
        return packed
    merged, *others = _gather(packed, _group(group))
    for other in others:
        merged = merge(merged, other)
    return merged


def sum_ranks(value: Tensor, group: str) -> Tensor:
    """`value` summed over the ranks, in place."""
    if group:
        dist.all_reduce(value, group=_group(group))
    return value


def max_ranks(value: Tensor, group: str) -> Tensor:
    """The largest `value` of all ranks, in place."""
    if group:
        dist.all_reduce(value, dist.ReduceOp.MAX, group=_group(group))
    return value


def gather_columns(local: Tensor, shard: Shard) -> Tensor:
    """`[rows, V]` from every rank's `[rows, columns]`."""
    if not shard.group:
        return local
    group = _group(shard.group)
    widths = _gather(torch.tensor([shard.columns], device=local.device), group)
    padded = torch.nn.functional.pad(local, (0, shard.max_columns - shard.columns))
    return torch.cat([part[:, : int(w)] for part, w in zip(_gather(padded, group), widths, strict=True)], dim=1)


def localize(weight: Any, bias: Any, process_group: Any) -> tuple[Tensor, Tensor | None, Any]:
    """A head given as DTensors: this rank's part of weight and bias, and the group that holds the others.

    Raises:
        ValueError: The DTensor is placed in a way that no vocabulary split has.
    """
    if not _is_dtensor(weight):
        return weight, _replicated("bias", bias), process_group
    if weight.device_mesh.ndim != 1 or not (weight.placements[0].is_shard(0) or weight.placements[0].is_replicate()):
        raise ValueError(
            f"weight: got a DTensor placed {weight.placements} on a mesh of {weight.device_mesh.ndim} dimensions, "
            "takes one dimension that shards the vocabulary, Shard(0), or replicates it"
        )
    if weight.placements[0].is_replicate():
        return weight.to_local(), _replicated("bias", bias), process_group
    if _is_dtensor(bias):
        bias = bias.redistribute(placements=weight.placements).to_local()
    elif bias is not None:
        raise ValueError("bias: got a plain tensor, takes a DTensor placed as the weight")
    return weight.to_local(), bias, weight.device_mesh.get_group()


def _is_dtensor(value: Any) -> bool:
    return hasattr(value, "device_mesh")  # asking the class would import torch.distributed.tensor, a second of it


def _replicated(name: str, value: Any) -> Any:
    if not _is_dtensor(value):
        return value
    if not all(placement.is_replicate() for placement in value.placements):
        raise ValueError(f"{name}: got a DTensor placed {value.placements}, takes a plain tensor or a replicated one")
    return value.to_local()


def local_hidden(name: str, hidden: Any) -> Any:
    """Hidden states as a plain tensor; a replicated DTensor is one already.

    Raises:
        ValueError: The DTensor is not replicated.
    """
    return _replicated(name, hidden)
