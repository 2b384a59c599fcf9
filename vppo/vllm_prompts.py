"""Prompts as vLLM's own processor takes them: one placeholder an image, where the trainer's processor has expanded it.

In `colocate` mode vLLM is given tokens and images, and expands each placeholder itself. TRL 1.16 gives it the trainer's
tokens, in which every image has as many placeholders as the model reads: the first of them is expanded once more, and
the answer is drawn from a prompt that the trainer never sees (TRL's issues 6294 and 6401).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class TextOnly:
    """A processor whose chat template is rendered and tokenized as it stands, its placeholders included.

    Args:
        processor: With a tokenizer and a chat template; everything else is its own.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def apply_chat_template(self, conversation: Any, *, tokenize: bool = False, **kwargs: Any) -> Any:
        """The processor's; tokens are those of the text alone, in lists of a batch also for one conversation."""
        return_dict = kwargs.pop("return_dict", False)
        text = self._processor.apply_chat_template(conversation, tokenize=False, **kwargs)
        if not tokenize:
            return text
        texts = [text] if isinstance(text, str) else text
        tokenizer = self._processor.tokenizer
        begun = bool(tokenizer.bos_token) and texts[0].startswith(tokenizer.bos_token)  # as processors decide it
        ids = tokenizer(texts, add_special_tokens=not begun)["input_ids"]
        return {"input_ids": ids} if return_dict else ids


class Unexpanded:
    """What vLLM is to be given in place of the tokens that the trainer's processor has made.

    Prompts, and the ends of prompts that results of tools are, are told one by one; whatever was not told stays as it
    is. So nothing changes where TRL hands over unexpanded prompts.
    """

    def __init__(self) -> None:
        self._prompts: dict[tuple[int, ...], list[int]] = {}
        self._results: dict[tuple[int, ...], list[int]] = {}

    def clear(self) -> None:
        """Forgets all of them."""
        self._prompts.clear()
        self._results.clear()

    def tell_prompts(self, expanded: Sequence[Sequence[int]], plain: Sequence[Sequence[int]]) -> None:
        """The same prompts as the trainer's processor makes them and with one placeholder an image."""
        for ids, text_ids in zip(expanded, plain, strict=True):
            self._prompts[tuple(ids)] = list(text_ids)

    def tell_results(self, expanded: Sequence[int], plain: Sequence[int]) -> None:
        """The same for the messages of tools that follow a response."""
        if list(expanded) != list(plain):
            self._results[tuple(expanded)] = list(plain)

    def __call__(self, ids: Sequence[int]) -> list[int]:
        """A prompt with one placeholder an image: also one that goes on after responses and results of tools."""
        known = _at(ids, 0, self._prompts)
        found, place = list(self._prompts[known]) if known else [], len(known)
        while place < len(ids):
            known = _at(ids, place, self._results)
            found += self._results[known] if known else ids[place : place + 1]
            place += len(known) or 1
        return found


def _at(ids: Sequence[int], start: int, pieces: Mapping[tuple[int, ...], Any]) -> tuple[int, ...]:
    """The longest of the pieces that begins here, or nothing."""
    for length in sorted({len(piece) for piece in pieces}, reverse=True):
        piece = tuple(ids[start : start + length])
        if piece in pieces:
            return piece
    return ()


def first_difference(row: int, used: Sequence[int], expected: Sequence[int], tokenizer: Any) -> str | None:
    """Where the prompt that a sampler used differs from the trainer's, in words, or None.

    Args:
        row: Of the batch, for the message.
        used, expected: Tokens of the sampler's prompt and of the trainer's.
        tokenizer: To show them.
    """
    if list(used) == list(expected):
        return None
    shorter = min(len(used), len(expected))
    place = next((i for i in range(shorter) if used[i] != expected[i]), shorter)

    def shown(ids: Sequence[int]) -> str:
        return f"{ids[place]} ({tokenizer.decode([ids[place]])!r})" if place < len(ids) else "its end"

    return (
        f"the sampler's prompt of row {row} has {len(used)} tokens where the trainer's has {len(expected)}; the first "
        f"that differs is number {place}: {shown(used)} for {shown(expected)}"
    )
