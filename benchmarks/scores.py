"""Scores of the tokens of a batch, from which some are selected."""

from __future__ import annotations

import math
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from benchmarks.inputs import DIVERGENCE
from vppo_kernels import reference

KEEP_RATIO = 0.4


class Scores:
    """The inputs of the selection suite. No two scores of a row are equal, so every method has one answer.

    Attributes:
        values: `[B, T]` float32 dependencies in nats.
        mask: `[B, T]` bool, 1 up to the end of each trajectory.
        advantages: `[B]`.
        keep_ratio: Fraction kept.
    """

    keep_ratio = KEEP_RATIO

    def __init__(self, trajectories: int, length: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        small, large = (math.log(value) for value in DIVERGENCE)
        ranks = torch.stack([torch.randperm(length, generator=generator) for _ in range(trajectories)])
        level = torch.randn(trajectories, 1, generator=generator, dtype=torch.float64)
        values = (small + (large - small) * ranks / length + 0.2 * level).exp()
        lengths = (length * (0.3 + 0.7 * torch.rand(trajectories, generator=generator))).ceil().long()
        self.values = values.float().to(device)
        self.mask = (torch.arange(length) < lengths.unsqueeze(1)).to(device)
        self.advantages = torch.randn(trajectories, generator=generator).to(device)

    def keep_count(self, length: int) -> int:
        return reference.keep_count(length, self.keep_ratio)

    @cached_property
    def keep(self) -> Tensor:
        """`[B, T]` bool, by the definition; on the CPU."""
        return reference.topk_mask(self.values.cpu(), self.mask.cpu(), self.keep_ratio)

    @cached_property
    def shaped(self) -> Tensor:
        """`[B, T]` float64 advantages, by the definition; on the CPU."""
        scale = reference.trajectory_scale(self.values.cpu().double(), self.mask.cpu())
        return (self.advantages.cpu().double() * scale).unsqueeze(1) * self.keep


@lru_cache(maxsize=1)
def make_scores(trajectories: int, length: int, device: torch.device) -> Scores:
    return Scores(trajectories, length, device)
