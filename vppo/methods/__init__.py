"""The family of methods that weigh tokens by two views of the image: pure functions of one sweep's results.

Each takes the `DivergenceOutput` of `vppo_kernels.linear_divergence`, in which every field is `[B, T]`, and the mask of
response tokens. `docs/methods.md` tells what each computes, from which equation.
"""

from vppo.methods.cgpo import cgpo_weights
from vppo.methods.papo import papo_penalty, sampled_views
from vppo.methods.pgpo import pgpo_weights
from vppo.methods.soft_mask import soft_mask_weights
from vppo.methods.vepo import vepo_scores, vepo_weights

__all__ = [
    "cgpo_weights",
    "papo_penalty",
    "pgpo_weights",
    "sampled_views",
    "soft_mask_weights",
    "vepo_scores",
    "vepo_weights",
]
