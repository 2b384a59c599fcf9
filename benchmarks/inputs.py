"""Heads and hidden states that behave like a language model's: peaked distributions, and two views that differ.

Uniform noise would not do: on flat distributions every divergence is alike and no formula cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

GROUP = 8  # tokens whose weights resemble each other; a row's probability lies on one group
RESEMBLANCE = 0.8  # share of a weight's square that its group has in common
TAIL = 2e-3  # probability of all tokens outside the group
ENTROPY = (0.25, 1.9)  # nats of the clean view, uniform over rows
DIVERGENCE = (2e-4, 4.0)  # nats, log-uniform over rows
ROWS_AT_ONCE = 1024


class Shape(NamedTuple):
    """Vocabulary size and width of a head."""

    vocab: int
    width: int


PRESETS = {
    "tiny": Shape(8_192, 256),
    "cpu": Shape(152_064, 1_536),
    "narrow": Shape(152_064, 256),
    "small": Shape(32_768, 1_024),
    "3b": Shape(151_936, 2_048),
    "7b": Shape(152_064, 3_584),
    "32b": Shape(152_064, 5_120),
}


def make_weight(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """`[V, D]` weight of a head, `V` a multiple of `GROUP`: rows of length about 1, alike within their group."""
    generator = torch.Generator(device).manual_seed(seed)
    weight = torch.empty(shape, device=device, dtype=dtype)
    for part in weight.view(-1, GROUP, shape.width).split(2048):
        common = torch.randn(len(part), 1, shape.width, device=device, generator=generator)
        own = torch.randn(part.shape, device=device, generator=generator)
        part.copy_((RESEMBLANCE**0.5 * common + (1 - RESEMBLANCE) ** 0.5 * own) / shape.width**0.5)
    return weight


def make_views(weight: Tensor, rows: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Hidden states `[rows, D]` of the clean and of the perturbed view, in the weight's dtype.

    The clean view's distributions have entropies within `ENTROPY`, its divergences from the perturbed view lie within
    `DIVERGENCE` (both nats, to within the scatter of the tokens outside the row's group).
    """
    generator = torch.Generator(weight.device).manual_seed(seed)
    hidden, perturbed = (weight.new_empty(rows, weight.shape[1]) for _ in range(2))
    for part, part_perturbed in zip(hidden.split(ROWS_AT_ONCE), perturbed.split(ROWS_AT_ONCE), strict=True):
        clean, moved = _views(weight, len(part), generator)
        part.copy_(clean)
        part_perturbed.copy_(moved)
    return hidden, perturbed


def _views(weight: Tensor, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Both views of some rows, `[rows, D]` float32.

    A hidden state is the smallest one that gives the tokens of a group the wanted logits, plus noise. The logits of all
    other tokens are then Gaussian with variance `|h|^2 / D`, so their normaliser is `log V + |h|^2 / 2D`.
    """
    vocab, width = weight.shape
    device = weight.device

    def draw(*size: int) -> Tensor:
        return torch.rand(*size, device=device, generator=generator)

    def noise(norm: float) -> Tensor:
        return torch.randn(rows, width, device=device, generator=generator) * (norm / width**0.5)

    group = torch.randint(vocab // GROUP, (rows,), device=device, generator=generator)
    tokens = weight.view(-1, GROUP, width)[group].float()  # [rows, GROUP, D]
    inverse = torch.linalg.inv(tokens @ tokens.mT)

    def solve(logits: Tensor, base: Tensor) -> Tensor:
        """`base`, moved as little as gives the group's tokens these logits."""
        missing = logits.float() - (tokens @ base[..., None]).squeeze(-1)
        return base + (tokens.mT @ (inverse @ missing[..., None])).squeeze(-1)

    low, high = ENTROPY
    ranks = draw(rows, GROUP).argsort(-1) + 0.5 * draw(rows, GROUP)
    log_shares = _log_shares(-torch.log1p(ranks), vocab, low + (high - low) * draw(rows))  # Zipf's law, steep or flat
    base = noise(4.0)
    clean = base
    for _ in range(6):
        normaliser = math.log(vocab) + clean.double().square().sum(-1, keepdim=True) / (2 * width)
        clean = solve(log_shares - math.log(TAIL) + normaliser, base)

    # the perturbed view loses its first choice, as if it could not see, and drifts towards others
    top = log_shares.argmax(-1, keepdim=True)
    slope = draw(rows, GROUP).double().scatter_(-1, top, -1.0)
    direction = solve(slope, noise(0.5))
    along = (clean * direction).double().sum(-1) / width
    square = direction.double().square().sum(-1) / (2 * width)

    def divergence(step: Tensor) -> Tensor:
        """KL of the group's tokens and the Gaussian rest; it grows with the step."""
        moved = log_shares + step[:, None] * slope
        rest = math.log(TAIL) + step * along + step.square() * square
        normaliser = torch.logsumexp(torch.cat([moved, rest[:, None]], -1), -1)
        kl = (log_shares.exp() * (log_shares - moved + normaliser[:, None])).sum(-1)
        return kl + TAIL * (math.log(TAIL) - rest + normaliser + step.square() * square)

    small, large = (math.log(value) for value in DIVERGENCE)
    step = _solve_increasing(divergence, (small + (large - small) * draw(rows).double()).exp(), 64.0)
    return clean, clean + step[:, None].float() * direction


def _log_shares(scores: Tensor, vocab: int, entropy: Tensor) -> Tensor:
    """`[rows, GROUP]` log-probabilities with these entropies, `1 - TAIL` in all: the softmax of scaled scores."""
    scores, tail = scores.double(), TAIL * (math.log(vocab) - math.log(TAIL))

    def negative_entropy(sharpness: Tensor) -> Tensor:
        logp = (sharpness[:, None] * scores).log_softmax(-1)
        return (logp.exp() * logp).sum(-1)

    sharpness = _solve_increasing(negative_entropy, tail - entropy.double(), 64.0)
    return (sharpness[:, None] * scores).log_softmax(-1) + math.log1p(-TAIL)


def _solve_increasing(function: Callable[[Tensor], Tensor], wanted: Tensor, limit: float) -> Tensor:
    """Where a function that increases in every row, on 0..limit, takes the wanted values: bisection, `[rows]`."""
    low, high = torch.zeros_like(wanted), torch.full_like(wanted, limit)
    for _ in range(50):
        middle = (low + high) / 2
        below = function(middle) < wanted
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2
