"""The sort-based formula: every row sorted, its k-th score is the threshold."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.peers.plain import scale
from benchmarks.scores import Scores

NOTES = {"selection": "keeps too many among equals"}


def selection(scores: Scores) -> Callable[[], Tensor]:
    def call() -> Tensor:
        ordered = scores.values.masked_fill(~scores.mask, -torch.inf).sort(1, descending=True).values
        count = (scores.mask.sum(1, keepdim=True).double() * scores.keep_ratio).ceil().long()
        return ((scores.values >= ordered.gather(1, count - 1)) & scores.mask).to(scores.values.dtype)

    return call


def advantages(scores: Scores) -> Callable[[], Tensor]:
    select = selection(scores)

    def call() -> Tensor:
        return select() * (scores.advantages * scale(scores.values, scores.mask)).unsqueeze(1)

    return call
