r"""Which completions have the form `<think>...</think> ... \boxed{...}`."""

from __future__ import annotations

import pytest

from vppo.rewards.format import format_reward

GOOD = [
    r"<think>3 and 5.</think> \boxed{8}",
    "\n <think>\n3 and\n5.\n</think>\nSo it is\n$\\boxed{\\frac{1}{2}}$.\n",
    r"<think>first \boxed{7}? no</think>\boxed{8}",
    r"<think>a</think> \boxed{7} or rather \boxed{8}, I think",
]
BAD = [
    "",
    r"\boxed{8}",
    "<think>3 and 5.</think> 8",
    r"<think>3 and 5. \boxed{8}",
    r"<think>3 and 5. \boxed{8}</think>",
    r"Well. <think>3 and 5.</think> \boxed{8}",
    r"<think> </think> \boxed{8}",
    r"<think>a</think> \boxed{}",
    r"<think>a</think> \boxed{ }",
    r"<think>a</think> \boxed{8",
    r"<think>a</think> \boxed{7} \boxed{8",
    r"<think>a<think>b</think> \boxed{8}",
    r"<think>a</think> b</think> \boxed{8}",
    r"<think>a</think> <think>b</think> \boxed{8}",
    r"</think>a<think> \boxed{8}",
    r"<THINK>a</THINK> \boxed{8}",
    r"a</think> \boxed{8}",
]


@pytest.mark.parametrize("text", GOOD)
def test_form(text: str) -> None:
    assert format_reward([text]) == [1.0]


@pytest.mark.parametrize("text", BAD)
def test_no_form(text: str) -> None:
    assert format_reward([text]) == [0.0]


def test_as_trl_calls_it() -> None:
    said = [[{"role": "assistant", "content": GOOD[0]}], [{"role": "assistant", "content": BAD[1]}]]
    parts = [[{"role": "assistant", "content": [{"type": "text", "text": GOOD[0]}]}]]
    assert format_reward(completions=said, answer=["8", "8"], trainer_state=None) == [1.0, 0.0]
    assert format_reward(parts) == [1.0]
    assert format_reward([]) == []
