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
        whole: Whether every rank of the group was given the head's whole weight, of which it takes its own rows.
    """

    first: int
    columns: int
    max_columns: int
    total: int
    group: str = ""
    whole: bool = False

    def part(self, weight: Tensor) -> Tensor:
        """The rows of a weight, or entries of a bias, that begin with the first column."""
        return weight[self.first :] if self.whole else weight


def shard_of(
    process_group: Any, views: list[Tensor], local: int, vocab_size: int | None, of: str, same: dict[str, Any]
) -> Shard:
    """`shards_of` one head, or of logits: `of` is what holds the columns, "weight" or "logits"."""
    return shards_of(process_group, views, {of: local}, [False], vocab_size, same)[0]


def shards_of(
    process_group: Any,
    views: list[Tensor],
    local: dict[str, int],
    whole: list[bool],
    vocab_size: int | None,
    same: dict[str, Any],
) -> list[Shard]:
    """Find this rank's place in the vocabulary. Collective with a group, and the only step that waits for the device.

    Args:
        process_group: Its ranks hold consecutive parts of the vocabulary, of any sizes, in rank order; None for no
            split.
        views: The `[rows, D]` hidden states, the same on every rank, or the `[rows, columns]` logits of this rank.
        local: Columns on this rank, padding included, of each head, by the name of what holds them.
        whole: Of each head, whether that is all of them; not of every head where there is a group, and no matter where
            there is none.
        vocab_size: Size of the whole vocabulary without padding; None if there is no padding.
        same: Other arguments that must be the same on every rank, by name: numbers, names, None, or tensors of tokens.

    Raises:
        TypeError: `process_group` is something else.
        ValueError: Ranks have different rows or other such arguments, `vocab_size` exceeds what they hold together, or
            two heads hold different vocabularies, or different parts of it.
    """
    sizes, rank, name = [[count] for count in local.values()], 0, ""
    check_group("process_group", process_group)
    if process_group is not None:
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "process_group: got one where torch.compile traces, takes None there: ranks tell each other what they "
                "hold before anything is computed (leave the operation out with torch.compiler.disable)"
            )
        sizes = _sizes(process_group, views, local, {**same, "vocab_size": vocab_size})
        rank, name = dist.get_rank(process_group), process_group.group_name
    heads = [
        (of, of_ranks, is_whole and name != "") for of, of_ranks, is_whole in zip(local, sizes, whole, strict=True)
    ]
    totals = [min(of_ranks) if is_whole else sum(of_ranks) for _, of_ranks, is_whole in heads]
    for (of, *_), total in zip(heads, totals, strict=True):
        arguments.vocabulary(vocab_size, total, f"the vocabulary that {of} holds")
    if vocab_size is None and len(set(totals)) > 1:
        (first_head, *_), (other, *_) = heads
        raise ValueError(
            f"{other}: got {totals[1]} rows, takes the {totals[0]} of {first_head}, or a vocab_size that neither's "
            "padding is part of"
        )
    total = totals[0] if vocab_size is None else vocab_size
    splits = {of: _split(of_ranks, total) for of, of_ranks, is_whole in heads if not is_whole}
    firsts, held = next(iter(splits.values()))
    for of, (_, others) in splits.items():
        if others != held:
            raise ValueError(
                f"{of}: its ranks hold {others} words, takes the {held} that those of {next(iter(splits))} hold, or "
                "the whole weight on every rank, as a replicated DTensor"
            )
    return [Shard(firsts[rank], held[rank], max(held), total, name, is_whole) for *_, is_whole in heads]


def _split(sizes: list[int], total: int) -> tuple[list[int], list[int]]:
    """Where each rank's columns begin, and how many of the `total` it holds."""
    firsts = [sum(sizes[:rank]) for rank in range(len(sizes))]
    return firsts, [min(max(total - first, 0), size) for first, size in zip(firsts, sizes, strict=True)]


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


def _sizes(
    process_group: Any, views: list[Tensor], local: dict[str, int], same: dict[str, Any]
) -> list[list[int]]:  # fmt: skip
    """Columns of every rank, of each head. Raises where ranks hold other rows or arguments, as those of FSDP do."""
    of = next(iter(local))
    counts = torch.tensor([len(views[0]), *local.values()], dtype=torch.float64, device=views[0].device)
    contents = [v.detach().float().abs().sum().nan_to_num() / max(v.numel(), 1) for v in views if of == "weight"]
    others = torch.tensor([_number(value) for value in same.values()], dtype=torch.float64, device=counts.device)
    mine = torch.stack([*others, *counts, *(mean.double() for mean in contents)])
    everyone = [theirs.tolist() for theirs in _gather(mine, process_group)]
    for rank, theirs in enumerate(everyone):
        for name, got, expected in zip(same, theirs, everyone[0], strict=False):
            if got != expected:
                raise ValueError(f"{name}: differs between ranks 0 and {rank} of process_group, takes the same on all")
    everyone = [theirs[len(same) :] for theirs in everyone]
    means = slice(1 + len(local), None)
    for rank, theirs in enumerate(everyone):
        pairs = zip(theirs[means], everyone[0][means], strict=True)
        far = [abs(x - y) > CHECKSUM_TOLERANCE * max(x, y) for x, y in pairs]
        if theirs[0] != everyone[0][0] or any(far):
            raise ValueError(
                f"{'hidden' if of == 'weight' else of}: differs between ranks 0 and {rank} of process_group, takes the "
                "same rows on every rank (a weight that FSDP has sharded is not split over the vocabulary: call the "
                "operation inside the head module's forward)"
            )
    return [[int(theirs[1 + head]) for theirs in everyone] for head in range(len(local))]


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


def gather_ranks(value: Tensor, group: str) -> list[Tensor]:
    """The `value` of every rank, in rank order; they have the same shape."""
    return _gather(value, _group(group)) if group else [value]


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


def localize(weight: Any, bias: Any, process_group: Any, of: str = "") -> tuple[Tensor, Tensor | None, Any]:
    """A head given as DTensors: this rank's part of weight and bias, and the group that holds the others.

    `of` is what follows the names of weight and bias.

    Raises:
        ValueError: The DTensor is placed in a way that no vocabulary split has.
    """
    if not _is_dtensor(weight):
        return weight, _replicated(f"bias{of}", bias), process_group
    if weight.device_mesh.ndim != 1 or not (weight.placements[0].is_shard(0) or weight.placements[0].is_replicate()):
        raise ValueError(
            f"weight{of}: got a DTensor placed {weight.placements} on a mesh of {weight.device_mesh.ndim} dimensions, "
            "takes one dimension that shards the vocabulary, Shard(0), or replicates it"
        )
    if weight.placements[0].is_replicate():
        return weight.to_local(), _replicated(f"bias{of}", bias), process_group
    if _is_dtensor(bias):
        bias = bias.redistribute(placements=weight.placements).to_local()
    elif bias is not None:
        raise ValueError(f"bias{of}: got a plain tensor, takes a DTensor placed as the weight")
    return weight.to_local(), bias, weight.device_mesh.get_group()


def localize_heads(
    heads: list[tuple[Any, Any]], process_group: Any
) -> tuple[list[tuple[Tensor, Tensor | None]], list[bool], Any]:  # fmt: skip
    """`localize` of one or two heads: this rank's parts, which of them are whole, and the group of the others.

    Of two heads a plain weight is this rank's part of `process_group`. Without one it is whole, and so is a replicated
    DTensor.

    Raises:
        ValueError: As `localize`, or the heads are split over different ranks.
    """
    if len(heads) == 1:
        weight, bias, group = localize(*heads[0], process_group)
        return [(weight, bias)], [False], group
    local, groups = [], []
    for (weight, bias), of in zip(heads, ("", "_other"), strict=True):
        weight, bias, group = localize(weight, bias, None if _is_dtensor(weight) else process_group, of)
        check_group("process_group", group)
        local.append((weight, bias))
        groups.append(group)
    split = [group for group in groups if group is not None]
    ranks = [dist.get_process_group_ranks(group) for group in split]
    if len(ranks) == 2 and ranks[0] != ranks[1]:
        raise ValueError(f"weight_other: got one split over ranks {ranks[1]}, takes those of weight, {ranks[0]}")
    return local, [group is None for group in groups], split[0] if split else None


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
