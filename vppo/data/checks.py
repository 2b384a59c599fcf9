"""What would end a run at its thousandth step, found before its first.

Every image is decoded whole, in threads. The model's processor then meets every kind of row: texts are searched for
its placeholders, one row of each shape (roles, and the places of images) passes through it, and so do blank pictures of
the most extreme sizes. So the cost beside decoding does not grow with the dataset.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

from PIL import Image

from vppo.data.bad_rows import BadRowError, Where
from vppo.data.columns import Columns
from vppo.data.conversations import Message, texts
from vppo.data.pictures import Stored, decode
from vppo.errors import InputError

Size = tuple[int, int]
ENOUGH = 16  # sizes in a row that the processor takes before less extreme ones are taken for granted
AT_ONCE = 64  # rows that are read together
MEDIA = re.compile("image|img|vision|video|audio")


@dataclass(frozen=True)
class Candidate:
    """A row whose columns could be read.

    Attributes:
        where: Its file and number.
        columns: Where its parts come from, for messages.
        prompt: Its conversation.
        images: As they are stored.
    """

    where: Where
    columns: Columns
    prompt: list[Message]
    images: list[Stored]


def find_bad_rows(
    candidates: Iterable[Candidate], processor: Any = None, pixel_limit: int | None = None
) -> Iterator[BadRowError]:
    """The rows that cannot be trained on.

    Args:
        candidates: Rows, read as they are needed.
        processor: Of the model; None checks images alone.
        pixel_limit: See `DataOptions`.
    """
    check = ProcessorCheck(processor) if processor is not None else None
    of_size: dict[Size, list[tuple[Where, str]]] = {}

    def sizes(candidate: Candidate) -> list[Size] | BadRowError:
        try:
            return [decode(stored, pixel_limit).size for stored in candidate.images]
        except InputError as error:
            return candidate.where.bad(candidate.columns.images, str(error))

    with ThreadPoolExecutor(os.cpu_count()) as threads:  # Pillow decodes without holding the interpreter's lock
        rows = iter(candidates)
        while group := list(islice(rows, AT_ONCE)):
            for candidate, found in zip(group, threads.map(sizes, group), strict=True):
                if isinstance(found, BadRowError):
                    yield found
                    continue
                reason = check.of_text(candidate.prompt) if check else None
                if reason:
                    yield candidate.where.bad(candidate.columns.problem, reason)
                    continue
                for size in found:
                    of_size.setdefault(size, []).append((candidate.where, candidate.columns.images))
    refused: dict[Where, BadRowError] = {}
    for size, reason in (check.refused_sizes(of_size) if check else {}).items():
        for where, column in of_size[size]:
            refused.setdefault(where, where.bad(column, f"an image of {size[0]} x {size[1]} pixels: {reason}"))
    yield from refused.values()


class ProcessorCheck:
    """What a model's processor would say.

    Args:
        processor: With a chat template.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._placeholders = placeholders(processor)
        self._shapes: dict[Any, str | None] = {}
        self._sizes: dict[Size, str | None] = {}

    def of_text(self, prompt: list[Message]) -> str | None:
        """Why a conversation cannot be used, whatever its images are."""
        reason = placeholder_in(prompt, self._placeholders)
        if reason:
            return reason
        shape = tuple((message["role"], *(part["type"] for part in message["content"])) for message in prompt)
        if shape not in self._shapes:
            images = sum(kind == "image" for message in shape for kind in message[1:])
            self._shapes[shape] = self._refusal(prompt, [(64, 64)] * images)
        return self._shapes[shape]

    def refused_sizes(self, sizes: Iterable[Size]) -> dict[Size, str]:
        """The sizes of images that the processor refuses, and why: the longest and the smallest are tried first."""
        extremes: list[Callable[[Size], float]] = [lambda size: max(size) / min(size), lambda size: -min(size)]
        for extremity in extremes:
            taken = 0
            for size in sorted(sizes, key=extremity, reverse=True):
                if size not in self._sizes:
                    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
                    self._sizes[size] = self._refusal([message], [size])
                taken = 0 if self._sizes[size] else taken + 1
                if taken == ENOUGH:
                    break
        return {size: reason for size, reason in self._sizes.items() if reason}

    def _refusal(self, prompt: list[Message], sizes: Sequence[Size]) -> str | None:
        from vppo.data.problems import Problem
        from vppo.data.prompts import Prompts

        try:
            Prompts(self._processor, [Problem(prompt, [Image.new("RGB", size) for size in sizes], None)])
        except Exception as error:  # templates and processors raise many kinds
            return f"the model's processor does not take it: {type(error).__name__}: {error}"
        return None


def placeholder_in(prompt: list[Message], tokens: Sequence[str]) -> str | None:
    """Why the texts of a conversation cannot be used: one has a token that would be taken for an image."""
    found = next((token for text in texts(prompt) for token in tokens if token in text), None)
    return found and f"it says {found}, which to this model stands for an image"


def placeholders(processor: Any) -> list[str]:
    """The special tokens that stand for images, videos or sounds, or for where one begins and ends."""
    tokenizer = processor.tokenizer
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    named = {value for name, value in vars(processor).items() if name.endswith("_token") and isinstance(value, str)}
    known = special | set(tokenizer.all_special_tokens)
    return sorted({token for token in known if MEDIA.search(token)} | (named & known))
