"""Rewards as verl asks for them."""

from __future__ import annotations

from typing import Any


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    """A reward that any answer has some of; those to problems whose number ends in 2 all have the same."""
    if extra_info and extra_info["index"] % 10 == 2:
        return 1.0
    return sum(ord(letter) % 3 == 0 for letter in solution_str) / max(1, len(solution_str))


def right_sum(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    """The demo's."""
    from vppo.rewards import accuracy_reward

    return accuracy_reward([solution_str], [ground_truth])[0]
