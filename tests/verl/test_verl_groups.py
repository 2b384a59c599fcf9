"""Whole groups on a worker and in a micro-batch."""

from __future__ import annotations

import bench_torchvision  # noqa: F401  (before transformers)
import pytest

KEYS = [f"{prompt}_{rollout}_0" for rollout in range(4) for prompt in "abcdef"]  # no two neighbours of one group
LENGTHS = [10 + 7 * (number % 5) for number in range(len(KEYS))]


def groups(order: list[int]) -> list[str]:
    return [KEYS[row][0] for row in order]


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_ranks_have_whole_groups_side_by_side(ranks: int) -> None:
    from vppo.verl.whole_groups import whole_groups

    order = whole_groups(KEYS, LENGTHS, ranks)
    assert order is not None and sorted(order) == list(range(len(KEYS)))
    assert groups(order) == [name for name in dict.fromkeys(groups(order)) for _ in range(4)]
    share = len(KEYS) // ranks
    loads = [sum(LENGTHS[row] for row in order[rank * share : (rank + 1) * share]) for rank in range(ranks)]
    assert max(loads) - min(loads) <= 2 * 4 * 28  # at most two groups' difference


@pytest.mark.parametrize(
    ("keys", "ranks"),
    [(KEYS, 4), (KEYS, 5), ([*KEYS, "padding_0_0", "padding_1_0"], 2), (KEYS[:-1], 1)],
    ids=["six groups for four", "six for five", "verl filled the batch", "a rollout is missing"],
)
def test_an_order_of_whole_groups_that_is_not_there_is_left_to_verl(keys: list[str], ranks: int) -> None:
    from vppo.verl.whole_groups import whole_groups

    assert whole_groups(keys, [10] * len(keys), ranks) is None


@pytest.mark.parametrize(("most", "together"), [(400, 8), (80, 8), (79, 4), (40, 4), (39, 2), (20, 2), (19, 1)])
def test_neighbours_stay_together_as_far_as_they_fit(most: int, together: int) -> None:
    from vppo.verl.whole_groups import rows_together

    keys = [f"{prompt}_{rollout}_0" for prompt in "abc" for rollout in range(8)]
    assert rows_together(keys, [10] * 24, most) == together


def test_groups_that_are_parted_are_not_held_together() -> None:
    from vppo.verl.whole_groups import rows_together

    assert rows_together(KEYS, LENGTHS, 10**6) == 1
