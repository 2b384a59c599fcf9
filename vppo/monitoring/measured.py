"""How much the tokens of a batch depend on their images, of all processes, and what is logged of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

QUANTILES = (50, 90, 99)


@dataclass(frozen=True)
class Measured:
    """The scored response tokens of the rows of a batch, in the order of the rows.

    Attributes:
        values: `[N]` dependency in nats.
        kept: `[N]` float, 1 where the token is among those that a step would keep.
        counts: For each row, how many of the N tokens are its own; 0 for a row that was not scored.
        scored: For each row, whether it was; a response without tokens has none for all that.
    """

    values: Tensor
    kept: Tensor
    counts: Sequence[int]
    scored: Sequence[bool]

    @classmethod
    def gather(cls, accelerator: Any, dependency: Tensor, mask: Tensor, keep: Tensor, scored: Tensor) -> Measured:
        """Of all processes.

        Args:
            accelerator: Whose processes they are.
            dependency: `[B, T]` in nats.
            mask, keep: `[B, T]` bool, the response tokens, and those that a step would keep.
            scored: `[B]` bool, the rows that were scored.
        """
        tokens = mask & scored.unsqueeze(1)
        values, kept = (_gather_uneven(accelerator, part[tokens]) for part in (dependency, keep.float()))
        counts, rows = accelerator.gather(torch.stack([tokens.sum(1), scored], 1)).T.tolist()
        return cls(values, kept, counts, [bool(row) for row in rows])

    @classmethod
    def join(cls, parts: Sequence[Measured], rows: int | None = None) -> Measured:
        """Several batches as one, of which only the first `rows` rows count; None counts all."""
        counts = [count for part in parts for count in part.counts][:rows]
        scored = [seen for part in parts for seen in part.scored][:rows]
        tokens = sum(counts)
        values, kept = (
            torch.cat([getattr(part, name).cpu() for part in parts])[:tokens] if parts else torch.zeros(0)
            for name in ("values", "kept")
        )
        return cls(values, kept, counts, scored)

    def metrics(self) -> dict[str, float]:
        """Names and values as they are logged; those of tokens only where one was scored."""
        if not self.scored:
            return {}
        fraction = {"vppo/scored_fraction": sum(self.scored) / len(self.scored)}
        if not self.values.numel():
            return fraction
        ordered = self.values.sort().values
        quantiles = {
            f"vppo/dependency_q{percent}": ordered[(len(ordered) - 1) * percent // 100].item() for percent in QUANTILES
        }
        mean, kept = self.values.mean().item(), self.kept.mean().item()
        return {**fraction, "vppo/dependency_mean": mean, **quantiles, "vppo/kept_fraction": kept}

    def columns(self) -> dict[str, list[float]]:
        """Each row's mean dependency in nats and the kept fraction of its tokens; NaN for a row that was not scored."""
        parts = {"dependency": self.values, "kept_fraction": self.kept}
        return {
            name: [part.mean().item() if len(part) else math.nan for part in values.cpu().split(list(self.counts))]
            for name, values in parts.items()
        }


def _gather_uneven(accelerator: Any, values: Tensor) -> Tensor:
    """1-D values of all processes, however many each has."""
    if accelerator.num_processes == 1:
        return values
    count = accelerator.gather(torch.tensor([len(values)], device=values.device))
    padded = values.new_zeros(int(count.max()))
    padded[: len(values)] = values
    everyone = accelerator.gather(padded).view(len(count), -1)
    return torch.cat([row[: int(n)] for row, n in zip(everyone, count, strict=True)])
