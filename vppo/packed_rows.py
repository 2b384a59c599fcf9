"""Rollouts of a TRL batch as packed rows (see `vppo.packing`): an ordinary forward gives each token the hidden state of
its own row, and prompt and image pass once. Gradient checkpointing, FSDP and compilers see nothing unusual.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from vppo.batch import TOKEN_INPUTS, Batch, View
from vppo.packed_flash import FLASH, unusable
from vppo.packing import MASKS, Packing

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
        tokens = torch.cat([batch.prompt_ids, batch.completion_ids], 1)
        width, total = batch.prompt_ids.shape[1], tokens.shape[1]
        device = batch.prompt_ids.device
        self._packing = Packing(packs, batch.prompt_lengths, batch.response_lengths, device)
        self.rows = self._packing.rows
        begins = torch.tensor([row * total + width - length for row, length in enumerate(batch.prompt_lengths)])
        self._source = begins.to(device)[self._packing.row] + self._packing.place
        leaders = [pack[0] for pack in packs]

        prompts = batch.prompts(leaders, view)
        self.inputs = {name: value for name, value in prompts.items() if name not in TOKEN_INPUTS}
        self.inputs["input_ids"] = self._take(tokens)
        self.inputs["attention_mask"] = (self._packing.segment >= 0).long()
        self.inputs["position_ids"] = self._positions(model, prompts)
        for name in TOKEN_INPUTS:
            if name in prompts:
                self.inputs[name] = self._take(batch.split[name])
        self.labels = torch.where(self._packing.segment > 0, self._take(tokens.roll(-1, 1)), -100)

    def responses(self, values: Tensor) -> Tensor:
        """`[len(rows), T, ...]` of `[packs, L, ...]`: what predicts the tokens of each response, T the longest.

        What lies behind a response's end has no meaning.
        """
        pack, start = torch.tensor(self._packing.starts, device=values.device).T
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

    def masked(self) -> AbstractContextManager[None]:
        """See `Packing.masked`."""
        return self._packing.masked(self.config)

    def _take(self, values: Tensor) -> Tensor:
        """`[packs, L]` of `[B, P + T]`."""
        return values.flatten()[self._source]

    def _positions(self, model: Any, prompts: dict[str, Any]) -> Tensor:
        """`[packs, L]`; `[3, packs, L]` where images have height and width."""
        place = self._packing.place
        owner = next((module for module in model.modules() if hasattr(module, "get_rope_index")), None)
        if owner is None or "image_grid_thw" not in prompts:
            return place
        names = inspect.signature(owner.get_rope_index).parameters
        positions, _ = owner.get_rope_index(**{name: prompts[name] for name in names if name in prompts})
        last = prompts["attention_mask"].sum(1, keepdim=True) - 1
        index = (place.clamp(max=last) + prompts["input_ids"].shape[1] - 1 - last).expand(3, -1, -1)
        return positions.gather(2, index) + (place - last).clamp(min=0)


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
