"""Rollouts of a prompt as one row, `[prompt | response 1 | ... | response G]`: where they lie, and a mask for them.

Every response has the places that it would have behind its prompt alone, and the mask keeps it to the prompt and to
itself. What predicts a response are the prompt's last token and all of the response but its last. Each response
therefore begins with a token of its own that repeats the prompt's last one; the prompt goes without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from vppo.packed_flash import FLASH, Segments

DENSE = ("sdpa", "eager")  # implementations of attention that pay for what their mask hides
MASKS = (*DENSE, "flex_attention")  # those that obey one


class Packing:
    """Packs of rows that share a prompt, as `[packs, L]` places of their tokens, padded on the right.

    Args:
        packs: Rows in packs.
        prompt_lengths, response_lengths: Tokens of each row, whether it is in a pack or not.
        device: Of the results.

    Attributes:
        rows: All rows, in the order of the packs.
        row, place: `[packs, L]` which row a token is of, and where in that row; padding repeats a prompt's last token.
        segment: `[packs, L]` 0 of the prompt, 1 and up of its responses, -1 of padding.
        lengths: Of each pack its prompt's and its responses' tokens.
        starts: For each of `rows` its pack, and where in it the response begins to be predicted.
    """

    def __init__(
        self,
        packs: Sequence[Sequence[int]],
        prompt_lengths: Sequence[int],
        response_lengths: Sequence[int],
        device: torch.device,
    ) -> None:
        self.rows = [row for pack in packs for row in pack]
        self.starts: list[tuple[int, int]] = []
        self.lengths: list[list[int]] = []
        rows, places, segments = list[Tensor](), list[Tensor](), list[Tensor]()
        for number, pack in enumerate(packs):
            last = prompt_lengths[pack[0]] - 1
            parts = [(pack[0], 0, last), *((row, last, last + response_lengths[row]) for row in pack)]
            sizes = torch.tensor([end - begin for _, begin, end in parts])
            rows.append(torch.tensor([row for row, *_ in parts]).repeat_interleave(sizes))
            places.append(torch.cat([torch.arange(begin, end) for _, begin, end in parts]))
            segments.append(torch.arange(len(parts)).repeat_interleave(sizes))
            self.lengths.append(sizes.tolist())
            self.starts += [(number, start) for start in sizes.cumsum(0)[:-1].tolist()]
        first = packs[0][0]
        self.row = pad_sequence(rows, batch_first=True, padding_value=first).to(device)
        self.place = pad_sequence(places, batch_first=True, padding_value=prompt_lengths[first] - 1).to(device)
        self.segment = pad_sequence(segments, batch_first=True, padding_value=-1).to(device)

    @contextmanager
    def masked(self, config: Any) -> Iterator[None]:
        """Within the block a model's own masks (causal, of a window, of an image's tokens among themselves) count
        places in a response's own row, and keep responses apart. Flash-attention is given `Segments` in their place.

        Args:
            config: Of the model's text part.

        Raises:
            NotImplementedError: At the end, if the model has made no mask in the way of this version of transformers.
        """
        name, made = config._attn_implementation, []
        segments = Segments(self.segment, self.lengths) if name == FLASH else None
        own = ALL_MASK_ATTENTION_FUNCTIONS[name]

        def mask(*args: Any, **kwargs: Any) -> Any:
            if type(kwargs.get("config")) is not type(config):  # the vision tower's
                return own(*args, **kwargs)
            made.append(name)
            if name == FLASH:
                return segments
            inner = self._apart(kwargs["mask_function"])
            return own(*args, **{**kwargs, "mask_function": inner, "allow_is_causal_skip": False})

        ALL_MASK_ATTENTION_FUNCTIONS[name] = mask
        try:
            yield
        finally:
            del ALL_MASK_ATTENTION_FUNCTIONS[name]
        if not made:
            raise NotImplementedError("the model makes its masks in a way of its own")

    def _apart(self, sees: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A mask function of packed rows from the one of a single row."""
        segment, place = self.segment, self.place

        def inside(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            of_query, of_key = segment[batch, query], segment[batch, key]
            return ((of_key == 0) | (of_key == of_query)) & sees(batch, head, place[batch, query], place[batch, key])

        return inside


def _cut(group: Sequence[int], count: int) -> list[list[int]]:
    """A group in so many packs of neighbours, alike in size."""
    ends = [len(group) * number // count for number in range(count + 1)]
    return [list(group[a:b]) for a, b in pairwise(ends)]


def cheapest_packs(
    group: Sequence[int],
    prompt: int,
    responses: Sequence[int],
    config: Any,
    *,
    dense: bool,
    fits: Callable[[list[int]], bool] = lambda pack: True,
) -> list[list[int]]:
    """Rows of one prompt in as many packs as make a pass the least work, or more where one would not fit.

    Where attention pays for what is masked, too, smaller packs are better with long responses.

    Args:
        group: The rows.
        prompt: Its tokens; the vision tower is taken to need as much for them as the language model.
        responses: Tokens of each row's response.
        config: Of the model's text part.
        dense: Whether attention pays for what its mask hides.
        fits: Whether there is room for a pack; a single row is let through.
    """
    inner = getattr(config, "intermediate_size", None)
    inner = inner if isinstance(inner, int) else 4 * config.hidden_size
    weights = 2 * config.hidden_size + 3 * inner // 2  # tokens to attend to that cost as much as a token's products

    def work(pack: Sequence[int]) -> int:  # in products of one token with another
        length = prompt + sum(responses[row] for row in pack)
        attended = length if dense else 0
        return length * (weights + attended) + prompt * weights

    ways = [_cut(group, count) for count in range(1, len(group) + 1)]
    return min([way for way in ways if all(map(fits, way))] or ways[-1:], key=lambda way: sum(map(work, way)))
