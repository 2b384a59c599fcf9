"""A tool that shows pictures, and rollouts that begin by calling it."""

from __future__ import annotations

import json
from typing import Any

from support import families


def look(which: int) -> list[dict[str, Any]]:
    """Shows a picture.

    Args:
        which: The number of the picture.

    Returns:
        The picture.
    """
    picture = families.picture(100 + which, ((84, 28), (28, 28))[which % 2])
    return [{"type": "image", "image": picture}, {"type": "text", "text": "so"}]


def call_it_first(run: Any) -> None:
    """Every rollout of a trainer begins by calling `look`, each for a picture of its own; what follows is sampled."""
    sample, encode = run._generate_single_turn, run.processing_class.tokenizer.encode

    def play(prompt_ids: list[Any], *args: Any, **kwargs: Any) -> Any:
        if "has_tool_images" in kwargs:
            return sample(prompt_ids, *args, **kwargs)
        calls = [json.dumps({"name": "look", "arguments": {"which": i}}) for i in range(len(prompt_ids))]
        answers = [encode(f"<tool_call>\n{call}\n</tool_call><eos>") for call in calls]
        return answers, [[None] * len(ids) for ids in answers]  # no sampler drew them: nothing to compare

    run._generate_single_turn = play
