"""How much the tokens of a batch depend on their images, of all processes, and what is logged of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

QUANTILES = (50, 90, 99)
UNSEEN = 0.01  # nats: a token whose dependency is below it does not look at the image, whatever was kept


@dataclass(frozen=True)
class Measured:
    """The scored response tokens of the rows of a batch, in the order of the rows.

    Attributes:
        values: `[N]` dependency in nats; None where the run scores its tokens by something else.
        kept: `[N]` float, 1 where the token is among those that a step would keep.
        counts: For each row, how many of the N tokens are its own; 0 for a row that was not scored.
        scored: For each row, whether it was; a response without tokens has none for all that.
        stderr: `[N]` standard error of each value; None of a single draw of the perturbed view.
    """

    values: Tensor | None
    kept: Tensor
    counts: Sequence[int]
    scored: Sequence[bool]
    stderr: Tensor | None = None

    @classmethod
    def gather(
        cls,
        accelerator: Any,
        dependency: Tensor | None,
        mask: Tensor,
        keep: Tensor,
        scored: Tensor,
        stderr: Tensor | None = None,
    ) -> Measured:
        """Of all processes.

        Args:
            accelerator: Whose processes they are.
            dependency, stderr: `[B, T]` in nats, or None.
            mask, keep: `[B, T]` bool, the response tokens, and those that a step would keep.
            scored: `[B]` bool, the rows that were scored.
        """
        tokens = mask & scored.unsqueeze(1)
        values, errors, kept = (
            None if part is None else _gather_uneven(accelerator, part[tokens])
            for part in (dependency, stderr, keep.float())
        )
        assert kept is not None
        counts, rows = accelerator.gather(torch.stack([tokens.sum(1), scored], 1)).T.tolist()
        return cls(values, kept, counts, [bool(row) for row in rows], errors)

    @classmethod
    def join(cls, parts: Sequence[Measured], rows: int | None = None) -> Measured:
        """Several batches as one, of which only the first `rows` rows count; None counts all."""
        counts = [count for part in parts for count in part.counts][:rows]
        scored = [seen for part in parts for seen in part.scored][:rows]
        tokens = sum(counts)

        def joined(name: str) -> Tensor | None:
            found = [getattr(part, name) for part in parts]
            return (
                None
                if any(part is None for part in found)
                else torch.cat([part.cpu() for part in (torch.zeros(0), *found)])[:tokens]
            )

        kept = joined("kept")
        assert kept is not None
        return cls(joined("values"), kept, counts, scored, joined("stderr") if parts else None)

    def metrics(self) -> dict[str, float]:
        """Names and values as they are logged; those of tokens only where one was scored."""
        if not self.scored:
            return {}
        found = {"vppo/scored_fraction": sum(self.scored) / len(self.scored)}
        if not self.kept.numel():
            return found
        found["vppo/kept_fraction"] = self.kept.mean().item()
        of_rows = self.kept.split(list(self.counts))
        found["vppo/responses_without_kept"] = float(sum(len(row) > 0 and not row.any() for row in of_rows))
        if self.values is None:
            return found
        ordered = self.values.sort().values
        for percent in QUANTILES:
            found[f"vppo/dependency_q{percent}"] = ordered[(len(ordered) - 1) * percent // 100].item()
        found["vppo/dependency_mean"] = self.values.mean().item()
        if self.stderr is not None:
            found["vppo/dependency_stderr"] = self.stderr.mean().item()
        whole = self.values.double().sum().item()
        if whole > 0:
            found["vppo/kept_dependency_fraction"] = (self.values.double() * self.kept).sum().item() / whole
        if self.kept_count:
            found["vppo/kept_unseen_fraction"] = self.unseen_count / self.kept_count
        return found

    @property
    def kept_count(self) -> int:
        """How many tokens are kept."""
        return int(self.kept.sum())

    @property
    def unseen_count(self) -> int:
        """How many of the kept ones depend on the image by less than `UNSEEN`."""
        return 0 if self.values is None else int(((self.values < UNSEEN) & (self.kept > 0)).sum())

    def columns(self) -> dict[str, list[float]]:
        """Each row's mean dependency in nats and the kept fraction of its tokens; NaN for a row that was not scored."""
        unknown = torch.full_like(self.kept, math.nan)
        parts = {"dependency": unknown if self.values is None else self.values, "kept_fraction": self.kept}
        return {
            name: [part.mean().item() if len(part) else math.nan for part in values.cpu().split(list(self.counts))]
            for name, values in parts.items()
        }


def spread(factors: Tensor) -> dict[str, float]:
    """What is logged of the factors of trajectories, at least one."""
    found = {"min": factors.min(), "mean": factors.mean(), "max": factors.max(), "std": factors.std(correction=0)}
    return {name: value.item() for name, value in found.items()}


def _gather_uneven(accelerator: Any, values: Tensor) -> Tensor:
    """1-D values of all processes, however many each has."""
    if accelerator.num_processes == 1:
        return values
    count = accelerator.gather(torch.tensor([len(values)], device=values.device))
    padded = values.new_zeros(int(count.max()))
    padded[: len(values)] = values
    everyone = accelerator.gather(padded).view(len(count), -1)
    return torch.cat([row[: int(n)] for row, n in zip(everyone, count, strict=True)])
