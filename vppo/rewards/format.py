r"""A reward for the form that the default instruction asks for: a thought in `<think>` tags, then a boxed answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vppo.rewards.accuracy import last_boxed, response_text

OPENING, CLOSING = "<think>", "</think>"


def format_reward(completions: Sequence[Any], **kwargs: Any) -> list[float]:
    r"""1.0 where a completion has the form of `vppo.data.INSTRUCTION`, else 0.0; nothing in between.

    The form: apart from space around it, the completion begins with `<think>`; it has one `<think>` and one `</think>`;
    between them is something other than space; and the last `\boxed{...}` behind `</think>` is closed and not empty.
    Whatever else stands behind `</think>` is free, and so is a box within the thought.

    A chat template that opens the thought itself leaves `<think>` to the prompt: its completions never have this form.

    Args:
        completions: `n` completions: strings, or lists of messages whose `content` is a string or a list of parts.
        **kwargs: What else TRL passes to a reward; not used.

    Returns:
        `n` rewards.
    """
    return [float(has_format(response_text(completion))) for completion in completions]


def has_format(text: str) -> bool:
    """Whether a text has the form that `format_reward` rewards."""
    text = text.strip()
    if not text.startswith(OPENING) or text.count(OPENING) != 1 or text.count(CLOSING) != 1:
        return False
    thought, _, rest = text.removeprefix(OPENING).partition(CLOSING)
    return bool(thought.strip() and last_boxed(rest))
