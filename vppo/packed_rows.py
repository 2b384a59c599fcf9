"""Rollouts of a prompt as one row: `[prompt | response 1 | ... | response G]`, in which no response sees another.

Every response has the positions that it would have behind its prompt alone, and a mask keeps it to the prompt and to
itself. So an ordinary forward gives each token the hidden state of its own row, and prompt and image pass once:
gradient checkpointing, FSDP and compilers see nothing unusual.

What predicts a response are the prompt's last token and all of the response but its last. Each response therefore
begins with a token of its own that repeats the prompt's last one; the prompt goes without it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from vppo.batch import TOKEN_INPUTS, Batch, View
from vppo.packed_flash import FLASH, Segments, unusable

DENSE = ("sdpa", "eager")  # implementations of attention that pay for what their mask hides
MASKS = (*DENSE, "flex_attention")  # those that obey one
ATTENDING = {"full_attention", "sliding_attention", "chunked_attention"}  # layers that know a token's past by a mask


class PackedRows:
    """What a model's forward takes for packed rows, and where in its output the responses are.

    Args:
        model: A vision-language model that `refusal` has nothing against.
        batch: Tokens and images.
        packs: Rows of the batch that share prompt and images, pack by pack.
        view: What they are shown.

    Attributes:
        rows: All rows, in the order of the packs.
        inputs: Of the model's forward: `[packs, L]` tokens, padded on the right, and the images of each pack's prompt.
        labels: `[packs, L]` the token that each position predicts, -100 where it is none of a response.
    """

    def __init__(self, model: Any, batch: Batch, packs: Sequence[Sequence[int]], view: View) -> None:
        self.batch, self.config = batch, model.config.get_text_config()
        self.rows = [row for pack in packs for row in pack]
        leaders = [pack[0] for pack in packs]
        tokens = torch.cat([batch.prompt_ids, batch.completion_ids], 1)
        width, total = batch.prompt_ids.shape[1], tokens.shape[1]
        self._start: list[tuple[int, int]] = []  # of each row: its pack, and where its response begins to be predicted
        # of a pack's tokens: which of the batch, of which response, and where in its own row
        source, segment, place = list[Tensor](), list[Tensor](), list[Tensor]()
        self._lengths: list[list[int]] = []  # of each pack's prompt and responses
        for number, pack in enumerate(packs):
            first = width - batch.prompt_lengths[pack[0]]
            parts = [(pack[0], first, width - 1)]
            parts += [(row, width - 1, width - 1 + batch.response_lengths[row]) for row in pack]
            sizes = torch.tensor([end - begin for _, begin, end in parts])
            columns = torch.cat([torch.arange(begin, end) for _, begin, end in parts])
            rows = torch.tensor([row for row, *_ in parts])
            source.append((rows * total).repeat_interleave(sizes) + columns)
            segment.append(torch.arange(len(parts)).repeat_interleave(sizes))
            place.append(columns - first)
            self._lengths.append(sizes.tolist())
            self._start += [(number, start) for start in sizes.cumsum(0)[:-1].tolist()]
        device = batch.prompt_ids.device
        filling = leaders[0] * total + width - 1  # any token but an image's
        self._source = pad_sequence(source, batch_first=True, padding_value=filling).to(device)
        self._segment = pad_sequence(segment, batch_first=True, padding_value=-1).to(device)
        self._place = pad_sequence(place, batch_first=True).to(device)

        prompts = batch.prompts(leaders, view)
        self.inputs = {name: value for name, value in prompts.items() if name not in TOKEN_INPUTS}
        self.inputs["input_ids"] = self._take(tokens)
        self.inputs["attention_mask"] = (self._segment >= 0).long()
        self.inputs["position_ids"] = self._positions(model, prompts)
        for name in TOKEN_INPUTS:
            if name in prompts:
                self.inputs[name] = self._take(batch.split[name])
        self.labels = torch.where(self._segment > 0, self._take(tokens.roll(-1, 1)), -100)

    def responses(self, values: Tensor) -> Tensor:
        """`[len(rows), T, ...]` of `[packs, L, ...]`: what predicts the tokens of each response, T the longest.

        What lies behind a response's end has no meaning.
        """
        pack, start = torch.tensor(self._start, device=values.device).T
        steps = torch.arange(self.batch.longest(self.rows), device=values.device)
        return values[pack.unsqueeze(1), (start.unsqueeze(1) + steps).clamp(max=values.shape[1] - 1)]

    def spread(self, values: Tensor) -> Tensor:
        """`[B, T, ...]` of `[packs, L, ...]`, for all rows of the batch: 0 outside responses and in rows not packed."""
        found = self.responses(values)
        given = self.batch.completion_mask[self.rows, : found.shape[1]].bool().to(values.device)
        row, column = given.nonzero(as_tuple=True)
        shape = *self.batch.completion_ids.shape, *values.shape[2:]
        rows = torch.tensor(self.rows, device=values.device)[row]
        return values.new_zeros(shape).index_put((rows, column), found[row, column])

    @contextmanager
    def masked(self) -> Iterator[None]:
        """Within the block the model's own masks (causal, of a window, of an image's tokens among themselves) count
        places in a response's own row, and keep responses apart. Flash-attention is given `Segments` in their place.

        Raises:
            NotImplementedError: At the end, if the model has made no mask in the way of this version of transformers.
        """
        name, made = self.config._attn_implementation, []
        segments = Segments(self._segment, self._lengths) if name == FLASH else None
        own = ALL_MASK_ATTENTION_FUNCTIONS[name]

        def mask(*args: Any, **kwargs: Any) -> Any:
            if type(kwargs.get("config")) is not type(self.config):  # the vision tower's
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
        segment, place = self._segment, self._place

        def inside(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            of_query, of_key = segment[batch, query], segment[batch, key]
            return ((of_key == 0) | (of_key == of_query)) & sees(batch, head, place[batch, query], place[batch, key])

        return inside

    def _take(self, values: Tensor) -> Tensor:
        """`[packs, L]` of `[B, P + T]`."""
        return values.flatten()[self._source]

    def _positions(self, model: Any, prompts: dict[str, Any]) -> Tensor:
        """`[packs, L]`; `[3, packs, L]` where images have height and width."""
        owner = next((module for module in model.modules() if hasattr(module, "get_rope_index")), None)
        if owner is None or "image_grid_thw" not in prompts:
            return self._place
        names = inspect.signature(owner.get_rope_index).parameters
        positions, _ = owner.get_rope_index(**{name: prompts[name] for name in names if name in prompts})
        last = prompts["attention_mask"].sum(1, keepdim=True) - 1
        index = (self._place.clamp(max=last) + prompts["input_ids"].shape[1] - 1 - last).expand(3, -1, -1)
        return positions.gather(2, index) + (self._place - last).clamp(min=0)


def refusal(model: Any) -> str:
    """Why a model cannot take packed rows, as its configuration tells; "" if nothing speaks against it."""
    config = model.config.get_text_config()
    name, kinds = config._attn_implementation, set(getattr(config, "layer_types", None) or ())
    if name == FLASH:
        others = ", ".join(sorted(kinds - {"full_attention"}))
        return f"the model has layers of {others}, which {FLASH} has not for packed rows" if others else unusable()
    if name not in MASKS:
        return f"attention by {name} takes no mask ({', '.join(MASKS)} do, and {FLASH} needs none)"
    others = ", ".join(sorted(kinds - ATTENDING))
    return f"the model has layers of {others}, which no mask reaches" if others else ""
