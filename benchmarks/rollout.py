"""A batch of rollouts under a head: what a policy loss is made of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.inputs import DIVERGENCE, PRESETS, make_views, make_weight
from vppo.errors import InputError
from vppo_kernels import reference

GROUP = 8  # rollouts of a prompt
ACTIVE = 0.4  # share of all rows whose advantage is not 0 once it is shaped
OFF_POLICY = 0.05  # standard deviation of what the log-probabilities have moved by since sampling, in nats
COLUMNS = 8_192  # of the float64 weight at a time
ROWS_AT_ONCE = 512


class Plan(NamedTuple):
    """Everything about a batch but its states and tokens.

    Attributes:
        mask: `[B, T]` bool, the response tokens.
        advantages: `[B]`, 0 in the groups in which every rollout got the same reward.
        dependency: `[B, T]` in nats.
        keep_ratio: With which the wanted share of rows stays active.
        shaped: `[B, T]` float64 shaped advantages by the definition.
    """

    mask: Tensor
    advantages: Tensor
    dependency: Tensor
    keep_ratio: float
    shaped: Tensor

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        """As the losses take them."""
        return self.advantages, self.mask, self.dependency

    @property
    def options(self) -> dict[str, Any]:
        return {"keep_ratio": self.keep_ratio}


class Tokens(NamedTuple):
    """Hidden states `[N, D]`, tokens `[N]`, their log-probabilities in float64, and the largest logits of the rows."""

    hidden: Tensor
    targets: Tensor
    exact: Tensor
    size: Tensor


class Rollouts:
    """The inputs of a suite with log-probabilities of sampled tokens.

    Attributes:
        hidden: `[B, T, D]` states that predict the tokens; a leaf that asks for gradients if wanted.
        weight: `[V, D]`, likewise.
        targets: `[B, T]` the sampled tokens.
        exact: `[B, T]` their log-probabilities, float64.
        size: `[B, T]` largest logit of each row.
        old_logprobs: `[B, T]` log-probabilities when they were sampled.
        plan: The rest.
        upstream: `[B, T]` gradient of an on-policy loss, 0 in every row that is not active.
    """

    def __init__(self, tokens: Tokens, weight: Tensor, plan: Plan, backward: bool) -> None:
        shape = plan.mask.shape
        self.hidden, self.weight = tokens.hidden.detach().view(*shape, -1), weight.detach()
        self.targets, self.exact, self.size = (x.view(shape) for x in tokens[1:])
        self.plan, self.backward = plan, backward
        for leaf in self.leaves:
            leaf.requires_grad_(backward)
        device = weight.device
        generator = torch.Generator(device).manual_seed(4)
        moved = OFF_POLICY * torch.randn(shape, device=device, generator=generator)
        self.old_logprobs = (self.exact + moved).clamp(max=0).float()
        self.upstream = (-plan.shaped / plan.mask.sum()).float()

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden, self.weight

    @property
    def active(self) -> Tensor:
        """Flat indices of the rows whose shaped advantage is not 0."""
        return self.plan.shaped.flatten().nonzero().squeeze(-1)

    def labels(self, preset: str) -> dict[str, Any]:
        return {
            "preset": preset,
            "rows": self.targets.numel(),
            "vocab": len(self.weight),
            "width": self.weight.shape[1],
            "dtype": str(self.weight.dtype).removeprefix("torch."),
            "backward": self.backward,
            "trajectories": len(self.targets),
            "active_rows": len(self.active),
        }


def make_rollouts(
    preset: str,
    rows: int,
    device: torch.device,
    dtype: torch.dtype,
    backward: bool,
    active: float = ACTIVE,
    padded: bool = True,
) -> Rollouts:
    """Seeded inputs; those of the previous call are kept, so cases that share them should follow each other.

    Without padding every rollout has the full length, so that any share of the rows can be active.

    Raises:
        InputError: The rows do not make trajectories of one length.
    """
    trajectories = GROUP * max(1, min(4, rows // 1024))
    if rows % trajectories:
        raise InputError(f"--rows: got {rows}, takes a multiple of {trajectories} here: trajectories of one length")
    plan = _plan(trajectories, rows // trajectories, active, padded, device)
    return Rollouts(_tokens(preset, rows, device, dtype), _weight(preset, device, dtype), plan, backward)


def make_plan(trajectories: int, length: int, active: float, padded: bool = True) -> Plan:
    """Lengths, advantages and dependencies of `GROUP` rollouts per prompt, on the CPU.

    Every eighth rollout is cut off at the limit; the others end after 55 to 95 % of it, or with it where nothing is
    padded. Rewards are 0 or 1; in every fourth group all are alike, so that its advantages are 0.
    """
    generator = torch.Generator().manual_seed(3)

    def draw(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator)

    lengths = (length * (0.55 + 0.4 * draw(trajectories))).round().long()
    lengths[:: GROUP if padded else 1] = length
    mask = torch.arange(length) < lengths.unsqueeze(1)
    rewards = torch.zeros(trajectories // GROUP, GROUP)
    for group, right in enumerate(rewards):
        if group % 4 < 3:
            right[torch.randperm(GROUP, generator=generator)[: 2 + group % 4 * 2]] = 1
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    small, large = (math.log(value) for value in DIVERGENCE)
    dependency = (small + (large - small) * draw(trajectories, length)).exp()

    alive = lengths[advantages != 0].tolist()
    wanted = active * trajectories * length
    ratios = [step / 1000 for step in range(1, 1001)]
    counts = {ratio: sum(reference.keep_count(n, ratio) for n in alive) for ratio in ratios}
    keep_ratio = min(ratios, key=lambda ratio: abs(counts[ratio] - wanted))
    if abs(counts[keep_ratio] - wanted) > trajectories:
        raise ValueError(f"active: got {active}, takes at most {counts[1.0] / (trajectories * length):.2f} here")
    keep = reference.topk_mask(dependency, mask, keep_ratio)
    scale = reference.trajectory_scale(dependency.double(), mask)
    shaped = (advantages.double() * scale).unsqueeze(1) * keep
    return Plan(mask, advantages, dependency, keep_ratio, shaped)


@lru_cache(maxsize=1)
def _plan(trajectories: int, length: int, active: float, padded: bool, device: torch.device) -> Plan:
    mask, advantages, dependency, keep_ratio, shaped = make_plan(trajectories, length, active, padded)
    return Plan(mask.to(device), advantages.to(device), dependency.to(device), keep_ratio, shaped.to(device))


@lru_cache(maxsize=1)
def _weight(preset: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    return make_weight(PRESETS[preset], device, dtype)


@lru_cache(maxsize=1)
def _tokens(preset: str, rows: int, device: torch.device, dtype: torch.dtype) -> Tokens:
    """Tokens sampled from the distributions of hidden states."""
    weight = _weight(preset, device, dtype)
    hidden = make_views(weight, rows)[0]
    generator = torch.Generator(device).manual_seed(2)
    found = []
    for part in hidden.split(ROWS_AT_ONCE):
        logits = torch.cat([part.double() @ tile.T for _, tile in tiles(weight)], -1)
        size, logp = logits.abs().amax(-1), logits.log_softmax(-1)
        del logits
        targets = torch.multinomial(logp.exp().float(), 1, generator=generator)
        found.append((targets.squeeze(-1), logp.gather(-1, targets).squeeze(-1), size))
    targets, exact, size = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Tokens(hidden, targets, exact, size)


def tiles(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """A `[V, D]` weight in float64, `COLUMNS` vocabulary entries at a time."""
    for start in range(0, len(weight), COLUMNS):
        columns = slice(start, min(start + COLUMNS, len(weight)))
        yield columns, weight.detach()[columns].double()
