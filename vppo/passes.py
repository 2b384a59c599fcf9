"""Response tokens through a model, without gradient: what rows have in common passes once.

The rollouts of a prompt share its image and its question. One pass over the prompt fills the model's cache, the cache
is repeated for each rollout, and only responses pass rollout by rollout. Where a model cannot go on from a cache, rows
pass whole, with the same result.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from vppo.batch import Batch, View
from vppo.heads import head_forward

logger = logging.getLogger(__name__)
SHARING = ("auto", "on", "off")
GIB = 1 << 30
JOINING = (DynamicLayer, DynamicSlidingWindowLayer)  # layers of a cache that gradients pass: nothing is overwritten
TOLERANCE, TOLERANCE_16_BIT = 2e-3, 0.1  # relative: rounding stays far below, a token in a wrong place does not

Receive = Callable[[Any, list[int], Tensor], Tensor | None]


@dataclass(frozen=True)
class Footprint:
    """Bytes that a token takes in a pass, as the model's configuration suggests.

    Attributes:
        cached: Its keys and values in all layers, and once more in the layer at work.
        passing: Its activations.
    """

    cached: int
    passing: int

    @classmethod
    def of(cls, model: Any) -> Footprint:
        config = model.config.get_text_config()
        heads, width = config.num_attention_heads, config.hidden_size
        pairs = getattr(config, "num_key_value_heads", None) or heads
        depth = getattr(config, "head_dim", None) or width // heads
        inner = getattr(config, "intermediate_size", None)
        inner = inner if isinstance(inner, int) else 4 * width
        item = model.dtype.itemsize
        at_work = pairs + heads  # joined with the new ones, and spread over all heads
        return cls(2 * item * depth * (config.num_hidden_layers * pairs + at_work), item * (8 * width + 3 * inner))


def _own(count: int) -> int:
    """The largest count of all processes that join a forward, where a process is alone with its model."""
    return count


class ResponsePasses:
    """Runs the responses of a batch through a model and hands over the hidden states that predict their tokens.

    Args:
        model: A vision-language model in evaluation mode. Its own forward is called; its head never multiplies.
        sharing: "auto" passes a prompt of several rows once where the model can go on from a cache: the first such pass
            is compared with the plain one, and if it fails or differs, one warning names the reason and rows pass whole
            from then on. "on" raises instead. "off" passes rows whole.
        memory: Bytes for repeated caches and activations; a single row may exceed it.
        most: From a count of this process to the largest of all that must join each forward. A sharded model gathers
            its weights in every one, so a process with less to do runs passes of which nothing is kept.

    Raises:
        ValueError: `sharing` is none of these; and, when passes run, it is "on" and cannot be.
    """

    def __init__(
        self, model: Any, *, sharing: str = "auto", memory: int = 4 * GIB, most: Callable[[int], int] = _own
    ) -> None:
        if sharing not in SHARING:
            raise ValueError(f"sharing: got {sharing!r}, takes one of {list(SHARING)}")
        self.model, self.sharing, self.memory, self.most = model, sharing, memory, most
        self._footprint = Footprint.of(model)
        self._able = False if sharing == "off" else None  # None: not tried yet
        self._cache = cache_name(model)
        self._gradients_pass = False  # through the model's cache
        self._warned: set[str] = set()

    def portions(self, batch: Batch, rows: Sequence[int], view: View) -> list[list[int]]:
        """The rows in portions of whole prompts that fit the memory; as many, some empty, on every process."""
        groups = _groups(batch, rows, view)
        costs = [self._prompt_cost(batch, group) + sum(self._row_cost(batch, row) for row in group) for group in groups]
        portions = [[row for group in part for row in group] for part in fill(groups, costs, self.memory)]
        return portions + [[] for _ in range(self.most(len(portions)) - len(portions))]

    @torch.no_grad()
    def hidden(self, batch: Batch, rows: Sequence[int], view: View) -> Tensor:
        """`[len(rows), T, D]` hidden states that predict the response tokens, T the longest response of these rows.

        They are the head's input, in the model's dtype; what lies behind a response's end has no meaning.
        """
        return _gathered(batch, rows, lambda receive: self.run(batch, rows, view, receive))

    @torch.no_grad()
    def run(self, batch: Batch, rows: Sequence[int], view: View, receive: Receive) -> None:
        """Pass the responses of these rows under a view.

        Args:
            batch: The rows' tokens and images.
            rows: Which rows, one of `portions`; may be empty where other processes have some.
            view: What they are shown.
            receive: Called inside the head's own forward, once or several times, with the head, some of the rows, and
                `[len(part), T, D]` hidden states that predict the tokens of their responses.
        """
        if not rows:
            rows, receive = [int(batch.has_image.int().argmax())], _drop
        groups = _groups(batch, rows, view)
        if self._shares(batch, groups, view):
            self._pass_shared(batch, groups, view, receive)
        else:
            self._pass_whole(batch, [row for group in groups for row in group], view, receive)

    @torch.no_grad()
    def carry_gradients(self, batch: Batch, view: View) -> bool:
        """Whether `run_with_gradients` would share a prompt, and can."""
        groups = _groups(batch, range(len(batch)), view)
        return self._shares(batch, groups, view) and self._gradients_pass

    def run_with_gradients(self, forward: Callable[..., Any], batch: Batch, view: View, receive: Receive) -> None:
        """Pass all responses once, in one piece and in the mode that the model is in; a prompt of several rows once.

        Args:
            forward: Called once, for the responses: the model, or what wraps it and prepares for its backward.
            batch: The rows' tokens and images.
            view: What they are shown.
            receive: As for `run`; called once. What it returns is what the model gives as logits.
        """
        self._pass_shared(batch, _groups(batch, range(len(batch)), view), view, receive, forward)

    # -- the two ways ------------------------------------------------------------------------------------------------

    def _pass_whole(self, batch: Batch, rows: Sequence[int], view: View, receive: Receive) -> None:
        costs = [self._prompt_cost(batch, [row]) + self._row_cost(batch, row) for row in rows]
        for part, wanted in self._parts(rows, costs, self.memory):
            length = batch.longest(part)
            take = partial(_hand_over, receive if wanted else _drop, part, slice(-(length + 1), -1))
            with head_forward(self.model, take):
                self.model(**batch.whole(part, view), use_cache=False)

    def _pass_shared(
        self,
        batch: Batch,
        groups: list[list[int]],
        view: View,
        receive: Receive,
        forward: Callable[..., Any] | None = None,
    ) -> None:
        prompt = batch.prompts([group[0] for group in groups], view)
        ends: list[Tensor] = []  # a response's first token is predicted by its prompt's last hidden state
        with _rope_deltas(self.model) as deltas, head_forward(self.model, lambda _, h: ends.append(h[:, -1:])):
            cache = getattr(self.model(**prompt, use_cache=True), self._cache)
        if not hasattr(cache, "reorder_cache"):
            raise NotImplementedError(f"the model's cache is a {type(cache).__name__}, which cannot be repeated")
        self._gradients_pass = all(type(layer) in JOINING for layer in getattr(cache, "layers", [None]))
        place = {row: index for index, group in enumerate(groups) for row in group}
        left = self.memory - sum(self._prompt_cost(batch, group) for group in groups)
        parts = self._parts(list(place), [self._row_cost(batch, row) for row in place], left)
        if torch.is_grad_enabled():  # what is passed lives until the backward: parts would save nothing
            parts = [(list(place), True)]
        for number, (part, wanted) in enumerate(parts):
            index = torch.tensor([place[row] for row in part], device=batch.prompt_ids.device)
            own = cache if number == len(parts) - 1 else copy.deepcopy(cache)
            own.reorder_cache(index)
            length = batch.longest(part)
            given = slice(0, max(length - 1, 1))  # from a response's last token nothing is predicted
            mask = torch.cat([prompt["attention_mask"][index], batch.completion_mask[part, given]], dim=1)
            first = ends[0][index.to(ends[0].device)]
            take = partial(_hand_over, receive if wanted else _drop, part, slice(0, length), before=first)
            with head_forward(self.model, take):
                (self.model if forward is None else forward)(
                    input_ids=batch.completion_ids[part, given],
                    attention_mask=mask,
                    position_ids=_positions(mask, prompt["attention_mask"].shape[1], deltas, index),
                    use_cache=True,
                    **{self._cache: own},
                )

    def _parts(self, rows: Sequence[int], costs: list[int], memory: int) -> list[tuple[list[int], bool]]:
        """Rows in parts that fit, and whether what they give is wanted; as many parts on every process."""
        parts = fill(rows, costs, memory)
        unwanted = self.most(len(parts)) - len(parts)
        return [(part, True) for part in parts] + [(parts[-1], False)] * unwanted

    def _prompt_cost(self, batch: Batch, group: list[int]) -> int:
        """Bytes of one prompt; the vision tower is taken to need as much as the language model."""
        return batch.prompt_lengths[group[0]] * (self._footprint.cached + 2 * self._footprint.passing)

    def _row_cost(self, batch: Batch, row: int) -> int:
        """Bytes of one response and of the cache that it goes on from."""
        response = batch.response_lengths[row]
        return (batch.prompt_lengths[row] + response) * self._footprint.cached + response * self._footprint.passing

    # -- which of them -----------------------------------------------------------------------------------------------

    def _shares(self, batch: Batch, groups: list[list[int]], view: View) -> bool:
        """Whether prompts pass once; the same answer on every process."""
        if self._able is False or self.most(max(map(len, groups))) == 1:
            return False
        if self.most(_shows_images(self.model, batch, [row for group in groups for row in group])):
            self._refuse("a response holds image tokens")
            return False
        if self._able is None:
            reason = self._difference(batch, max(groups, key=len), view)
            if self.most(bool(reason)):
                self._able = False
                self._refuse(reason or "another process found that it cannot be")
            else:
                self._able = True
        return self._able

    def _difference(self, batch: Batch, group: list[int], view: View) -> str:
        """What tells a shared pass from the plain one; "" if nothing does."""
        rows = sorted(group, key=lambda row: batch.response_lengths[row])[-2:]
        plain = _gathered(batch, rows, lambda receive: self._pass_whole(batch, rows, view, receive))
        try:
            shared = _gathered(batch, rows, lambda receive: self._pass_shared(batch, [rows], view, receive))
        except torch.OutOfMemoryError:
            raise
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            return f"the model cannot go on from a cache: {type(error).__name__}: {str(error).splitlines()[0]}"
        tokens = batch.completion_mask[rows, : plain.shape[1]].bool().to(plain.device)
        expected = plain[tokens].float()
        difference = (shared[tokens].float() - expected).norm() / expected.norm().clamp(min=1e-30)
        device = plain.device.type
        rounds = plain.dtype.itemsize < 4 or torch.is_autocast_enabled(device)
        if difference <= (TOLERANCE_16_BIT if rounds else TOLERANCE):
            return ""
        return f"hidden states from a cache differ from the plain pass by {difference:.1e}"

    def _refuse(self, reason: str) -> None:
        if self.sharing == "on":
            raise ValueError(f"prefix_sharing: got 'on', takes 'auto' or 'off' here: {reason}")
        if reason not in self._warned:
            self._warned.add(reason)
            logger.warning(
                f"Prompts are not shared while scoring, which is slower and gives the same numbers: {reason}."
            )


def cache_name(model: Any) -> str:
    """What a model's forward calls its cache: "cache" from transformers 5.24 on, "past_key_values" before.

    Args:
        model: A `PreTrainedModel`, or one with adapters around it.
    """
    own = getattr(model, "get_base_model", lambda: model)()
    return "cache" if "cache" in inspect.signature(type(own).forward).parameters else "past_key_values"


def fill(items: Sequence[Any], costs: Sequence[int], memory: int) -> list[list[Any]]:
    """Items in order, in lists whose costs fit the memory or that hold one item."""
    lists: list[list[Any]] = []
    room = 0
    for item, cost in zip(items, costs, strict=True):
        if cost > room:
            lists.append([])
            room = memory
        lists[-1].append(item)
        room -= cost
    return lists


def _groups(batch: Batch, rows: Sequence[int], view: View) -> list[list[int]]:
    """Rows that have prompt and images in common."""
    groups: dict[tuple[int, bytes], list[int]] = {}
    for row in rows:
        groups.setdefault((view.keys[row], batch.prompt_bytes[row]), []).append(row)
    return list(groups.values())


def _drop(head: Any, rows: list[int], hidden: Tensor) -> None:
    """Of a pass that only other processes need."""


def _hand_over(
    receive: Receive, rows: list[int], tokens: slice, head: Any, hidden: Tensor, before: Tensor | None = None
) -> Tensor | None:
    """What a head's forward does: it passes on the hidden states of some positions."""
    if before is not None:
        hidden = torch.cat([before.to(hidden.device), hidden], dim=1)
    return receive(head, rows, hidden[:, tokens])


def _gathered(batch: Batch, rows: Sequence[int], run: Callable[[Receive], None]) -> Tensor:
    """What a run hands over, in the order of the rows."""
    place = {row: index for index, row in enumerate(rows)}
    found: list[Tensor] = []

    def receive(head: Any, part: list[int], hidden: Tensor) -> None:
        if not found:
            found.append(hidden.new_zeros(len(rows), batch.longest(rows), hidden.shape[-1]))
        found[0][[place[row] for row in part], : hidden.shape[1]] = hidden

    run(receive)
    return found[0] if found else torch.empty(0, 1, 0)


def _shows_images(model: Any, batch: Batch, rows: list[int]) -> bool:
    """Whether a response holds image tokens, as the result of a tool may."""
    ids = [getattr(model.config, name, None) for name in ("image_token_id", "image_token_index")]
    tokens = torch.where(batch.completion_mask[rows].bool(), batch.completion_ids[rows], -1)
    return any(bool((tokens == token).any()) for token in ids if token is not None)


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
