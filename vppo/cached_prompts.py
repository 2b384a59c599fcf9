"""Prompts in a model's cache, from which their responses go on: where a model cannot take packed rows."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vppo.batch import Batch, View
from vppo.heads import head_forward


class CachedPrompts:
    """One pass over the prompts of some groups; see `go_on`.

    Args:
        model: A vision-language model in evaluation mode.
        batch: Tokens and images.
        groups: Rows of the batch that share prompt and images, group by group.
        view: What they are shown.

    Raises:
        NotImplementedError: The model's cache cannot be repeated.
    """

    def __init__(self, model: Any, batch: Batch, groups: Sequence[Sequence[int]], view: View) -> None:
        self.model, self.batch = model, batch
        self._name = cache_name(model)
        self._prompt = batch.prompts([group[0] for group in groups], view)
        self._place = {row: index for index, group in enumerate(groups) for row in group}
        self.ends: list[Tensor] = []  # a response's first token is predicted by its prompt's last hidden state
        with _rope_deltas(model) as self._deltas, head_forward(model, lambda _, h: self.ends.append(h[:, -1:])):
            self._cache = getattr(model(**self._prompt, use_cache=True), self._name)
        if not hasattr(self._cache, "reorder_cache"):
            raise NotImplementedError(f"the model's cache is a {type(self._cache).__name__}, which cannot be repeated")

    def before(self, rows: Sequence[int]) -> Tensor:
        """`[rows, 1, D]` hidden states that predict the first token of each response."""
        return self.ends[0][[self._place[row] for row in rows]]

    def go_on(self, rows: Sequence[int], last: bool) -> None:
        """Pass the responses of some rows, without their last tokens, from which nothing is predicted.

        Args:
            rows: Some of the groups'.
            last: Whether these are the last ones: the cache need not be kept.
        """
        index = torch.tensor([self._place[row] for row in rows], device=self.batch.prompt_ids.device)
        own = self._cache if last else copy.deepcopy(self._cache)
        own.reorder_cache(index)
        given = slice(0, max(self.batch.longest(rows) - 1, 1))
        prompt = self._prompt["attention_mask"]
        mask = torch.cat([prompt[index], self.batch.completion_mask[list(rows), given]], dim=1)
        self.model(
            input_ids=self.batch.completion_ids[list(rows), given],
            attention_mask=mask,
            position_ids=_positions(mask, prompt.shape[1], self._deltas, index),
            use_cache=True,
            **{self._name: own},
        )


def cache_name(model: Any) -> str:
    """What a model's forward calls its cache: "cache" from transformers 5.24 on, "past_key_values" before.

    Args:
        model: A `PreTrainedModel`, or one with adapters around it.
    """
    own = getattr(model, "get_base_model", lambda: model)()
    return "cache" if "cache" in inspect.signature(type(own).forward).parameters else "past_key_values"


@contextmanager
def _rope_deltas(model: Any) -> Iterator[list[Tensor]]:
    """A list that holds, after the block, how far each row's next position lies from its number of tokens.

    Models with positions in an image's height and width remember it for the tokens that follow; others have none.
    """
    owner = next((module for module in model.modules() if "rope_deltas" in vars(module)), None)
    deltas: list[Tensor] = []
    if owner is None:
        yield deltas
        return
    before, owner.rope_deltas = owner.rope_deltas, None
    try:
        yield deltas
        if owner.rope_deltas is not None:
            deltas.append(owner.rope_deltas)
    finally:
        owner.rope_deltas = before


def _positions(mask: Tensor, prompt: int, deltas: list[Tensor], index: Tensor) -> Tensor:
    """Where the tokens behind `prompt` columns stand: `[3, rows, T]` where images have height and width, else
    `[rows, T]`.
    """
    if deltas:  # counted from the first token that is not padding
        tokens = mask.cumsum(1)[:, prompt:] - 1
        return (tokens + deltas[0][index].to(mask.device)).expand(3, -1, -1)
    return torch.arange(prompt, mask.shape[1], device=mask.device).expand(len(mask), -1)
