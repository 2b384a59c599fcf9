"""The perturbed pass of rows that share a prompt: its tokens and its image pass once, as packed rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLAttention
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLAttention
from verl.utils.model import extract_multi_modal_inputs

from vppo.exchange import exchanged
from vppo.packing import DENSE, MASKS, Packing, cheapest_packs

# verl replaces these for packed sequences by one that takes no mask; this module is imported before it does
OWN_ATTENTION = {kind: kind.forward for kind in (Qwen2VLAttention, Qwen2_5_VLAttention)}


def groups_alike(
    rows: Sequence[int], draws: Sequence[int], prompts: Sequence[Tensor], images: Sequence[dict[str, Tensor]]
) -> list[list[int]]:
    """Rows in groups that are shown the same perturbed images behind the same prompt.

    Args:
        rows: Which rows.
        draws, prompts, images: Of every row, what its view is drawn by, its tokens, and what the processor made of it.
    """
    groups: list[list[int]] = []
    for row in rows:
        for group in groups:
            first = group[0]
            same = draws[row] == draws[first] and torch.equal(prompts[row], prompts[first])
            if same and all(torch.equal(value, images[first][name]) for name, value in images[row].items()):
                group.append(row)
                break
        else:
            groups.append([row])
    return groups


class SharedPrompts:
    """Rows of one of verl's micro-batches as packed rows, see `vppo.packing`.

    Args:
        model: verl's module.
        micro_batch: Whose `input_ids`, `responses` and `position_ids` are jagged.
        groups: Rows of it that share prompt and images.
        shown: For each group, what the processor made of its images.

    Attributes:
        inputs: Of the model's forward.
    """

    def __init__(
        self, model: Any, micro_batch: Any, groups: Sequence[Sequence[int]], shown: Sequence[dict[str, Any]]
    ) -> None:
        self._config = model.config.get_text_config()
        own = self._config._attn_implementation
        self._attention = own if own in MASKS else "sdpa"
        ids, positions = micro_batch["input_ids"], micro_batch["position_ids"]
        responses = micro_batch["responses"].offsets().diff()
        prompts = (ids.offsets().diff() - responses).tolist()
        self._lengths: list[int] = responses.tolist()
        packs, pictures = list[list[int]](), list[dict[str, Any]]()
        for group, images in zip(groups, shown, strict=True):
            dense = self._attention in DENSE
            chosen = cheapest_packs(group, prompts[group[0]], self._lengths, self._config, dense=dense)
            packs += chosen
            pictures += [images] * len(chosen)
        self._packing = Packing(packs, prompts, self._lengths, ids.device)
        source = ids.offsets()[self._packing.row] + self._packing.place
        self.inputs = {
            "input_ids": ids.values()[source],
            "attention_mask": (self._packing.segment >= 0).long(),
            "position_ids": positions.values()[..., source],
            **extract_multi_modal_inputs(pictures),
        }

    def take(self, hidden: Tensor) -> Tensor:
        """`[tokens, D]` of `[packs, L, D]`: what predicts the responses, row by row in the order of the batch."""
        starts = dict(zip(self._packing.rows, self._packing.starts, strict=True))
        parts = [hidden[pack, start : start + self._lengths[row]] for row, (pack, start) in sorted(starts.items())]
        return torch.cat(parts)

    @contextmanager
    def attending(self) -> Iterator[None]:
        """Within the block the model attends by a mask that keeps responses apart, where need be not in its own way."""
        with ExitStack() as stack:
            for kind, own in OWN_ATTENTION.items():
                stack.enter_context(exchanged(kind, forward=own))
            stack.callback(setattr, self._config, "_attn_implementation", self._config._attn_implementation)
            self._config._attn_implementation = self._attention
            stack.enter_context(self._packing.masked(self._config))
            yield
