"""Response tokens through a model: what rows have in common passes once.

The rollouts of a prompt share its image and its question. They pass as one row in which no response sees another
(`vppo.packing`). Where layers know their past by a state and not by a mask, one pass over the prompt fills the
model's cache, the cache is repeated for each rollout, and only responses pass rollout by rollout
(`vppo.cached_prompts`). Where neither can be, rows pass whole. The result is the same.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vppo.batch import Batch, View
from vppo.cached_prompts import CachedPrompts
from vppo.heads import head_forward
from vppo.packed_rows import PackedRows, refusal
from vppo.packing import DENSE, cheapest_packs

logger = logging.getLogger(__name__)
SHARING = ("auto", "on", "off")
GIB = 1 << 30
TOLERANCE, TOLERANCE_16_BIT = 2e-3, 0.1  # relative: rounding stays far below, a token in a wrong place does not

Receive = Callable[[Any, list[int], Tensor], Tensor | None]


@dataclass(frozen=True)
class Footprint:
    """What a token takes in a pass, as the model's configuration suggests.

    Attributes:
        cached: Bytes of its keys and values in all layers, and once more in the layer at work.
        passing: Bytes of its activations.
        pair: Bytes of the mask that says whether it sees another token: while it is made, and as attention takes it.
    """

    cached: int
    passing: int
    pair: int

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
        return cls(
            cached=2 * item * depth * (config.num_hidden_layers * pairs + at_work),
            passing=item * (8 * width + 3 * inner),
            pair=4 + item,
        )


def _own(count: int) -> int:
    """The largest count of all processes that join a forward, where a process is alone with its model."""
    return count


class ResponsePasses:
    """Runs the responses of a batch through a model and hands over the hidden states that predict their tokens.

    Args:
        model: A vision-language model in evaluation mode. Its own forward is called; its head never multiplies.
        sharing: "auto" passes a prompt of several rows once where the model can take it: the first such pass is
            compared with the plain one, and if it fails or differs, one warning names the reason, and rows pass in the
            next best way from then on. "on" raises if nothing can be shared. "off" passes rows whole.
        memory: Bytes for activations, masks and repeated caches; a single row may exceed it.
        max_over_ranks: From a count of this process to the largest of all that must join each forward. A sharded model
            gathers its weights in every one, so a process with less to do runs passes of which nothing is kept.

    Raises:
        ValueError: `sharing` is none of these; and, when passes run, it is "on" and cannot be.
    """

    def __init__(
        self, model: Any, *, sharing: str = "auto", memory: int = 4 * GIB, max_over_ranks: Callable[[int], int] = _own
    ) -> None:
        if sharing not in SHARING:
            raise ValueError(f"sharing: got {sharing!r}, takes one of {list(SHARING)}")
        self.model, self.sharing, self.memory, self.max_over_ranks = model, sharing, memory, max_over_ranks
        self._footprint = Footprint.of(model)
        self._ways = [] if sharing == "off" else [self._pass_packed, self._pass_cached]  # the first one is to be taken
        self._tried = False  # whether that one has been compared with the plain pass
        self._warned: set[str] = set()

    def portions(self, batch: Batch, rows: Sequence[int], view: View) -> list[list[int]]:
        """The rows in portions of whole prompts that fit the memory; as many, some empty, on every process."""
        groups = _groups(batch, rows, view)
        if self._ways[:1] == [self._pass_packed]:
            costs = [sum(self._pack_cost(batch, pack) for pack in self._packs(batch, [group])) for group in groups]
        else:
            costs = [self._prompt_cost(batch, g) + sum(self._row_cost(batch, row) for row in g) for g in groups]
        portions = [[row for group in part for row in group] for part in fill(groups, costs, self.memory)]
        return portions + [[] for _ in range(self.max_over_ranks(len(portions)) - len(portions))]

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
        if not rows:  # of any row, whose perturbed view nobody has made
            rows, view, receive = [int(batch.has_image.int().argmax())], View(view.keys), _drop
        groups = _groups(batch, rows, view)
        self._way(batch, groups, view)(batch, groups, view, receive)

    def packs_rows(self, batch: Batch, view: View) -> bool:
        """Whether the rows of a batch may pass in `packs`, of all processes."""
        groups = _groups(batch, range(len(batch)), view)
        return self._way(batch, groups, view) == self._pass_packed

    def packs(self, batch: Batch, rows: Sequence[int], view: View) -> list[list[int]]:
        """Rows in packs (see `vppo.packing`), for a forward of the caller's own."""
        return self._packs(batch, _groups(batch, rows, view), math.inf)

    # -- the three ways ----------------------------------------------------------------------------------------------

    def _pass_whole(self, batch: Batch, groups: list[list[int]], view: View, receive: Receive) -> None:
        rows = [row for group in groups for row in group]
        costs = [self._prompt_cost(batch, [row]) + self._row_cost(batch, row) for row in rows]
        for part, wanted in self._parts(rows, costs, self.memory):
            length = batch.longest(part)
            take = partial(_hand_over, receive if wanted else _drop, part, slice(-(length + 1), -1))
            with head_forward(self.model, take):
                self.model(**batch.whole(part, view), use_cache=False)

    def _pass_packed(self, batch: Batch, groups: list[list[int]], view: View, receive: Receive) -> None:
        self._pass_packs(batch, self._packs(batch, groups), view, receive)

    def _pass_packs(self, batch: Batch, packs: list[list[int]], view: View, receive: Receive) -> None:
        for part, wanted in self._parts(packs, [self._pack_cost(batch, pack) for pack in packs], self.memory):
            packed = PackedRows(self.model, batch, part, view)
            take = partial(_unpack, receive if wanted else _drop, packed)
            with packed.masked(), head_forward(self.model, take):
                self.model(**packed.inputs, use_cache=False)

    def _pass_cached(self, batch: Batch, groups: list[list[int]], view: View, receive: Receive) -> None:
        prompts = CachedPrompts(self.model, batch, groups, view)
        rows = [row for group in groups for row in group]
        left = self.memory - sum(self._prompt_cost(batch, group) for group in groups)
        parts = self._parts(rows, [self._row_cost(batch, row) for row in rows], left)
        for number, (part, wanted) in enumerate(parts):
            whole = slice(0, batch.longest(part))
            take = partial(_hand_over, receive if wanted else _drop, part, whole, before=prompts.before(part))
            with head_forward(self.model, take):
                prompts.go_on(part, last=number == len(parts) - 1)

    def _parts(self, items: Sequence[Any], costs: list[int], memory: int) -> list[tuple[list[Any], bool]]:
        """Rows or packs in parts that fit, and whether what they give is wanted; as many parts on every process."""
        parts = fill(items, costs, memory)
        unwanted = self.max_over_ranks(len(parts)) - len(parts)
        return [(part, True) for part in parts] + [(parts[-1], False)] * unwanted

    def _packs(self, batch: Batch, groups: list[list[int]], memory: float | None = None) -> list[list[int]]:
        """Groups in the packs that are the least work, see `cheapest_packs`."""
        memory = self.memory if memory is None else memory
        config = self.model.config.get_text_config()
        packs: list[list[int]] = []
        for group in groups:
            packs += cheapest_packs(
                group,
                batch.prompt_lengths[group[0]],
                batch.response_lengths,
                config,
                dense=self._dense,
                fits=lambda pack: self._pack_cost(batch, pack) <= memory,
            )
        return packs

    def _pack_cost(self, batch: Batch, pack: list[int]) -> int:
        """Bytes of one pack, its mask among them."""
        length = self._pack_length(batch, pack)
        vision = 2 * batch.prompt_lengths[pack[0]]
        mask = length**2 * self._footprint.pair if self._dense else 0
        return (length + vision) * self._footprint.passing + mask

    @property
    def _dense(self) -> bool:
        """Whether attention has a mask of every pair of tokens, and pays for those that it hides."""
        return self.model.config.get_text_config()._attn_implementation in DENSE

    def _pack_length(self, batch: Batch, pack: list[int]) -> int:
        return batch.prompt_lengths[pack[0]] + sum(batch.response_lengths[row] for row in pack)

    def _prompt_cost(self, batch: Batch, group: list[int]) -> int:
        """Bytes of one prompt; the vision tower is taken to need as much as the language model."""
        return batch.prompt_lengths[group[0]] * (self._footprint.cached + 2 * self._footprint.passing)

    def _row_cost(self, batch: Batch, row: int) -> int:
        """Bytes of one response and of the cache that it goes on from."""
        response = batch.response_lengths[row]
        return (batch.prompt_lengths[row] + response) * self._footprint.cached + response * self._footprint.passing

    # -- which of them -----------------------------------------------------------------------------------------------

    def _way(self, batch: Batch, groups: list[list[int]], view: View) -> Callable[..., None]:
        """How these groups pass; the same answer on every process."""
        if not self._ways or self.max_over_ranks(max(map(len, groups))) == 1:
            return self._pass_whole
        if self.max_over_ranks(_shows_images(self.model, batch, [row for group in groups for row in group])):
            self._refuse("a response holds image tokens")
            return self._pass_whole
        reasons: list[str] = []
        while self._ways and not self._tried:
            reason = self._difference(self._ways[0], batch, max(groups, key=len), view)
            if self.max_over_ranks(bool(reason)):
                reasons.append(reason or "another process found that it cannot be")
                self._ways.pop(0)
            else:
                self._tried = True
        if not self._ways:
            self._refuse("; ".join(reasons))
            return self._pass_whole
        if reasons:
            logger.warning(f"Prompts are shared while scoring, but not in training passes: {reasons[0]}.")
        return self._ways[0]

    @torch.no_grad()
    def _difference(self, way: Callable[..., None], batch: Batch, group: list[int], view: View) -> str:
        """What tells a way to pass from the plain one; "" if nothing does."""
        packed = way == self._pass_packed
        if packed:
            if reason := refusal(self.model):
                return reason
            way = self._pass_packs
        rows = sorted(group, key=lambda row: batch.response_lengths[row])[-2:]
        with quiet(self.model):
            plain = _gathered(batch, rows, lambda receive: self._pass_whole(batch, [rows], view, receive))
            try:
                shared = _gathered(batch, rows, lambda receive: way(batch, [rows], view, receive))
            except torch.OutOfMemoryError:
                raise
            except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                cannot = "take packed rows" if packed else "go on from a cache"
                return f"the model cannot {cannot}: {type(error).__name__}: {str(error).splitlines()[0]}"
        tokens = batch.completion_mask[rows, : plain.shape[1]].bool().to(plain.device)
        expected = plain[tokens].float()
        difference = (shared[tokens].float() - expected).norm() / expected.norm().clamp(min=1e-30)
        device = plain.device.type
        rounds = plain.dtype.itemsize < 4 or torch.is_autocast_enabled(device)
        if difference <= (TOLERANCE_16_BIT if rounds else TOLERANCE):
            return ""
        source = "packed rows" if packed else "a cache"
        return f"hidden states from {source} differ from the plain pass by {difference:.1e}"

    def _refuse(self, reason: str) -> None:
        if self.sharing == "on":
            raise ValueError(f"prefix_sharing: got 'on', takes 'auto' or 'off' here: {reason}")
        if reason not in self._warned:
            self._warned.add(reason)
            logger.warning(f"Prompts are not shared, which is slower and gives the same numbers: {reason}.")


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


@contextmanager
def quiet(model: Any) -> Iterator[None]:
    """Evaluation mode: dropout would make two passes differ by chance, checkpoints of activations forbid a cache."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _unpack(receive: Receive, packed: PackedRows, head: Any, hidden: Tensor) -> Tensor | None:
    """What a head's forward does in a packed pass."""
    return receive(head, packed.rows, packed.responses(hidden))


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
    """Whether a response holds image tokens, as the result of a tool may; or a prompt ends with one."""
    ids = [getattr(model.config, name, None) for name in ("image_token_id", "image_token_index")]
    tokens = torch.where(batch.completion_mask[rows].bool(), batch.completion_ids[rows], batch.prompt_ids[rows, -1:])
    return any(bool((tokens == token).any()) for token in ids if token is not None)
