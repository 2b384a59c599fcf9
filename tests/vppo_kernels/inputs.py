"""Inputs that look like a language model's: peaked logits, and two views that differ by a chosen amount."""

from __future__ import annotations

import torch
from torch import Tensor

BACKENDS = ["torch"]
KINDS = ["kl", "reverse_kl", "jsd"]


def head(vocab: int = 700, width: int = 24, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`[V, D]` weight and `[V]` bias whose logits spread over about +-12."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, width, generator=generator) / width**0.5
    return weight.to(dtype), torch.randn(vocab, generator=generator).to(dtype)


def views(
    rows: int, width: int = 24, gap: float = 0.1, dtype: torch.dtype = torch.float32, seed: int = 1
) -> tuple[Tensor, Tensor]:
    """Hidden states of both views, `[rows, D]`; `gap` 1 is a KL of nats, 0.001 one of 1e-6."""
    generator = torch.Generator().manual_seed(seed)
    clean = 4.0 * torch.randn(rows, width, generator=generator)
    return clean.to(dtype), (clean + gap * torch.randn(rows, width, generator=generator)).to(dtype)


def bound(divergence: Tensor) -> Tensor:
    """How far a divergence may lie from float64."""
    divergence = divergence.clamp_min(0)  # float64 can leave -1e-17
    return 1e-5 * divergence + 3e-6 * divergence.sqrt() + 1e-8
