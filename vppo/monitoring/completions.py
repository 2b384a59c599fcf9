"""The completions of a run with their rewards and what was measured of them: rows, tables and files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from vppo.files import replacing
from vppo.trl_utils import strip_images_from_messages

Row = dict[str, Any]


class CompletionLog:
    """The completions of the latest generation, or of a whole evaluation, one row each.

    TRL hands them over generation by generation. A column that one generation has and another has not is empty there.

    Args:
        rewards: Names of the reward functions.
        rows: Only so many of the last rows are kept; None keeps all.
        images: Only the first so many rows keep their images, which are large.

    Attributes:
        rows: One dict a completion: `prompt` and `completion` as TRL has them, each reward, what reward functions
            logged with `log_extra`, `advantage`, and the columns that `add` was given.
    """

    def __init__(self, rewards: Sequence[str], *, rows: int | None, images: int) -> None:
        self.rewards, self._limit, self._images = list(rewards), rows, images
        self.rows: list[Row] = []

    def add(self, logs: Mapping[str, Any], columns: Mapping[str, Sequence[Any]]) -> None:
        """Takes the rows of a generation over.

        Args:
            logs: What `GRPOTrainer` gathered of it; it is emptied.
            columns: Further values, one per row of the generation over all processes.

        Raises:
            ValueError: A reward function logged a column with more or fewer values than there are completions.
        """
        named = {
            "prompt": logs["prompt"],
            "completion": logs["completion"],
            **logs["rewards"],
            **logs["extra"],
            "advantage": logs["advantages"],
            **columns,
        }
        for name, values in named.items():
            if len(values) != len(logs["prompt"]):
                raise ValueError(f"log_extra: {name!r} got {len(values)} values for {len(logs['prompt'])} completions")
        self.rows += [dict(zip(named, values, strict=True)) for values in zip(*named.values(), strict=True)]
        for values in logs.values():
            values.clear()
        if self._limit is not None:
            del self.rows[: -self._limit]
        for row in self.rows[self._images :]:
            row["prompt"] = strip_images_from_messages(row["prompt"])

    def keep(self, count: int) -> None:
        """Drops all rows but the first `count`."""
        del self.rows[count:]

    def reward_metrics(self, weights: Sequence[float]) -> dict[str, float]:
        """TRL's reward metrics, over all rows alike.

        Args:
            weights: Of the reward functions.

        Returns:
            `rewards/NAME/mean` and `rewards/NAME/std` of each function, over the rows that it scored; `reward` and
            `reward_std` of the weighted sum, over the rows that any function scored.
        """
        if not self.rows:
            return {}
        rewards = pd.DataFrame(self.rows)[self.rewards].astype(float)
        metrics: dict[str, float] = {}
        for name, values in rewards.items():
            metrics |= {f"rewards/{name}/mean": values.mean(), f"rewards/{name}/std": values.std()}
        total = (rewards * list(weights)).sum(axis=1, min_count=1)
        return {**metrics, "reward": total.mean(), "reward_std": total.std()}

    def table(self, step: int) -> pd.DataFrame:
        """All rows, with messages as plain data: without image objects, and of one shape in all rows."""
        table = pd.DataFrame([{"step": step, **row} for row in self.rows])
        for column in ("prompt", "completion"):
            table[column] = _uniform([strip_images_from_messages(messages) for messages in table[column]])
        return table

    def pictures(self) -> list[list[Any]]:
        """The images of the first rows, as many as keep theirs."""
        return [images_of(row["prompt"]) for row in self.rows[: self._images]]

    def write(self, path: Path, step: int) -> None:
        """Writes the table as parquet; the folder is made."""
        with replacing(path) as file:
            self.table(step).to_parquet(file)


def images_of(messages: Any) -> list[Any]:
    """The image objects within a conversation, in order."""
    if not isinstance(messages, list):
        return []
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part["image"] for part in parts if part.get("type") == "image" and part.get("image") is not None]


def plain_text(messages: Any) -> list[tuple[str, str]]:
    """A conversation as (role, text); an image is `[image]`, a call of a tool is `name(arguments)`.

    Args:
        messages: As TRL has them, or the text of a prompt or completion, whose role is "".
    """
    if not isinstance(messages, list):
        return [("", str(messages))]
    return [(str(message.get("role") or ""), _text(message)) for message in messages]


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = ["[image]" if part.get("type") == "image" else str(part.get("text") or "") for part in parts]
    thought = message.get("reasoning_content") or message.get("thinking")
    calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
    called = [f"{call.get('name', '?')}({_arguments(call.get('arguments'))})" for call in calls]
    return "\n".join(filter(None, [thought, " ".join(filter(None, texts)), *called]))


def _arguments(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False, default=str)


def _uniform(conversations: list[Any]) -> list[Any]:
    """Conversations that fit one column of Arrow: contents are all text or all lists of parts; tool calls are text."""
    messages = [message for messages in conversations if isinstance(messages, list) for message in messages]
    lists = any(isinstance(message.get("content"), list) for message in messages)

    def one(message: Row) -> Row:
        content = message.get("content")
        if lists and not isinstance(content, list):
            message = {**message, "content": [{"type": "text", "text": content}]}
        if message.get("tool_calls"):
            message = {**message, "tool_calls": json.dumps(message["tool_calls"], ensure_ascii=False, default=str)}
        return message

    return [[one(m) for m in messages] if isinstance(messages, list) else messages for messages in conversations]
