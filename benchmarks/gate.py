"""The gates before any timing: how far a result may lie from float64.

Two gates, because they answer two questions. Our own backends have promised a bound in every row, and one that breaks
it is broken. The peers never promised it: most subtract two numbers of the size of the normaliser, or round logits to
16 bits, and lose the small divergences. That is what the error column is there to show, so they are timed all the
same, unless they compute something else.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.contest import Role
from vppo_kernels.reference import LOGPROB_BOUND, LOGPROB_BOUND_CUT, divergence_bound

PEER_ROWS = 1e-2  # nats: the gate of the peers looks at rows above it
PEER_SHARE = 0.25  # of the sum over those rows, and of a gradient's norm; KL of bfloat16 logits took 0.013 and 0.028


def logprob_bound(size: Tensor, cut: bool = False) -> Tensor:
    """How far a log-probability in float32 may lie from float64; its error grows with the row's largest logit.

    With `cut` logits are sums of 16-bit products on tensor cores, which cut off what they add.
    """
    return (LOGPROB_BOUND_CUT if cut else LOGPROB_BOUND) + 4 * torch.finfo(torch.float32).eps * size


def judge_divergence(
    role: Role, value: Tensor, truth: Tensor, cut: bool = False, allowed: float = 1.0
) -> tuple[float, str]:
    """Largest error as a multiple of the bound, and what is wrong ("" if nothing is).

    Args:
        role: Whose gate.
        value: `[rows]` or scalar result.
        truth: The same in float64, not negative.
        cut: As in `divergence_bound`.
        allowed: How many times the bound our own backends may be off, where no arithmetic could keep it.
    """
    multiple, wrong = _judge(role, value, truth, divergence_bound(truth, cut), "divergences", allowed)
    negative = role == "ours" and bool((value < 0).any())
    return multiple, "a negative divergence" if negative else wrong


def judge_logprob(role: Role, value: Tensor, truth: Tensor, size: Tensor, cut: bool = False) -> tuple[float, str]:
    """The same for log-probabilities.

    Args:
        role: Whose gate.
        value: `[rows]` result.
        truth: The same in float64.
        size: `[rows]` largest logits.
        cut: As in `divergence_bound`.
    """
    return _judge(role, -value, -truth, logprob_bound(size, cut), "log-probabilities")


def judge_gradient(role: Role, error: float, plain_error: float) -> tuple[float, str]:
    """The same for a gradient.

    Args:
        role: Whose gate.
        error: Norm of the error over the norm of the gradient in float64.
        plain_error: The same of the textbook formula with the same inputs in the same dtype.
    """
    multiple, wrong = _judge_relative(role, error, plain_error)
    return multiple, wrong and f"gradient error {error:.3g} of its norm"


def judge_loss(role: Role, error: float, plain_error: float) -> tuple[float, str]:
    """The same for a loss.

    Args:
        role: Whose gate.
        error: Of the loss, over the sum of its terms' absolute values in float64.
        plain_error: The same of the textbook formula with the same inputs in the same dtype.
    """
    multiple, wrong = _judge_relative(role, error, plain_error)
    return multiple, wrong and f"error {error:.3g} of the loss's terms"


def _judge(
    role: Role, value: Tensor, truth: Tensor, bound: Tensor, what: str, allowed: float = 1.0
) -> tuple[float, str]:
    error = (value.double() - truth).abs()
    multiple = _number(error / bound)
    if role == "ours":
        return multiple, "" if multiple <= allowed else f"error {multiple:.3g} x the bound"
    large = truth > PEER_ROWS
    share = _number(error[large].sum() / truth[large].sum()) if large.any() else 0.0
    return multiple, "" if share <= PEER_SHARE else f"error {share:.3g} of the {what}"


def _judge_relative(role: Role, error: float, plain_error: float) -> tuple[float, str]:
    error = math.inf if math.isnan(error) else error
    limit = plain_error + 1e-6 if role == "ours" else PEER_SHARE
    return error / (plain_error + 1e-6), "" if error <= limit else "outside"


def _number(values: Tensor) -> float:
    """The largest; infinity where one is not a number."""
    return float(torch.where(values.isnan(), torch.inf, values).max())
