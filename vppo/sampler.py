"""TRL's order of prompts, the same in a resumed run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler

from vppo.trl_utils import RepeatSampler


class EpochSampler(Sampler[int]):
    """A `RepeatSampler` that can be told which epoch comes next.

    TRL's draws a new permutation from one generator at each pass and so knows the epoch only by having lived through
    the earlier ones: a run resumed in its second epoch would see the first one's order again.

    Args:
        sampler: TRL's.
    """

    def __init__(self, sampler: Any) -> None:
        self.sampler: RepeatSampler = sampler

    def set_epoch(self, epoch: int) -> None:
        """Continue as if `epoch` passes had been made; called by accelerate before each pass."""
        if self.sampler.shuffle and self.sampler.seed is not None:
            self.sampler.generator.manual_seed(self.sampler.seed)
            for _ in range(epoch):
                torch.randperm(self.sampler.num_samples, generator=self.sampler.generator)

    def __iter__(self) -> Iterator[int]:
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)
