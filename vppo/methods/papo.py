"""PAPO: the policy is trained to answer otherwise where it does not see (arXiv 2507.06448)."""

from __future__ import annotations

from torch import Tensor

from vppo.methods.tokens import checked
from vppo_kernels import arguments, sampled_divergence
from vppo_kernels.statistics import DivergenceOutput


def papo_penalty(
    views: DivergenceOutput,
    mask: Tensor,
    *,
    kl_coef: float = 0.01,
    entropy_coef: float = 0.03,
    entropy_perturbed_coef: float = 0.03,
) -> Tensor:
    """What PAPO adds to the loss of each token (Eq. 2): `-kl_coef KL(p || q) + entropy_coef H(p) + ... H(q)`.

    The divergence, which is maximised, has no bound; both entropies, which rise before a collapse, hold it ("Double
    Entropy Loss"). Add the mean that your clipped loss takes over its tokens.

    Args:
        views: Of `linear_divergence(..., kind="kl")` on hidden states that have a gradient in both views, or of
            `sampled_views`; `divergence`, `entropy` and `entropy_perturbed` are read, each `[B, T]` floating in nats.
        mask: `[B, T]` bool or 0/1, the response tokens; nothing else is read.
        kl_coef: At least 0 (gamma; 0.01 with DAPO and 0.02 with GRPO in the released scripts).
        entropy_coef, entropy_perturbed_coef: At least 0 (eta 1 and 2; 0.03 with DAPO and 0.05 with GRPO at 7B).

    Returns:
        `[B, T]` float32 (float64 for float64) in nats, 0 at padding. Differentiable in the three that are read.

    Raises:
        TypeError, ValueError: An argument is of the wrong type, shape, device or range, or, on a CPU, not finite.
    """
    coefficients = {
        "kl_coef": kl_coef,
        "entropy_coef": entropy_coef,
        "entropy_perturbed_coef": entropy_perturbed_coef,
    }
    for name, value in coefficients.items():
        arguments.non_negative(name, value)
    _, divergence, entropy, perturbed = checked(
        mask, divergence=views.divergence, entropy=views.entropy, entropy_perturbed=views.entropy_perturbed
    )
    return entropy_coef * entropy + entropy_perturbed_coef * perturbed - kl_coef * divergence


def sampled_views(logprobs: Tensor, logprobs_perturbed: Tensor, *, clamp: float | None = 10.0) -> DivergenceOutput:
    """PAPO's own estimates from the sampled token: k3 for the divergence, and `-log p` for an entropy.

    The gradient of `-log p(y)` at a sampled `y` says nothing of the entropy's: on average it is 0 where samples are the
    policy's own, and it raises what was sampled. The exact terms of `linear_divergence` have no such trouble.

    Args:
        logprobs, logprobs_perturbed: `[B, T]` log p(y) given the clean and the perturbed image, in nats.
        clamp: As in `sampled_divergence`.

    Returns:
        A `DivergenceOutput` for `papo_penalty`, in the dtype of the inputs; differentiable in both.

    Raises:
        TypeError, ValueError: As in `sampled_divergence`.
    """
    divergence = sampled_divergence(logprobs, logprobs_perturbed, kind="k3", clamp=clamp)
    return DivergenceOutput(divergence, -logprobs, -logprobs_perturbed, logprobs, logprobs_perturbed)
