"""The rollouts of a prompt on one worker and in one micro-batch, where their perturbed pass can share it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from verl.utils.seqlen_balancing import calculate_workload, get_seqlen_balanced_partitions


def whole_groups(keys: Sequence[str], lengths: Sequence[int], ranks: int) -> list[int] | None:
    """The order of a batch in which each rank, which takes an equal part, has whole groups and about as much work.

    Args:
        keys: verl's names of rows, `prompt_rollout_output`.
        lengths: Tokens of each row.
        ranks: How many take a part.

    Returns:
        Indices of rows; None where groups differ in size, or there are none for some rank.
    """
    groups: dict[str, list[int]] = {}
    for row, key in enumerate(keys):
        groups.setdefault(key.split("_")[0], []).append(row)
    if len({len(rows) for rows in groups.values()}) != 1 or len(groups) % ranks:
        return None
    work = calculate_workload(torch.tensor(lengths))
    whole = list(groups.values())
    loads = [int(work[rows].sum()) for rows in whole]
    parts = get_seqlen_balanced_partitions(loads, ranks, equal_size=True)
    return [row for part in parts for group in part for row in whole[group]]


def rows_together(keys: Sequence[str], lengths: Sequence[int], most: int) -> int:
    """How many neighbours micro-batches are not to part: a divisor of the groups' size, whose tokens fit `most`.

    Args:
        keys, lengths: As in `whole_groups`, of a batch in its order.
        most: Tokens of a micro-batch.
    """
    names = [key.split("_")[0] for key in keys]
    size = names.count(names[0])
    for count in range(size, 1, -1):
        pieces = range(0, len(keys), count)
        if (
            size % count == 0
            and len(keys) % count == 0
            and all(
                len(set(names[piece : piece + count])) == 1 and sum(lengths[piece : piece + count]) <= most
                for piece in pieces
            )
        ):
            return count
    return 1
