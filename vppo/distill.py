"""On-policy distillation: the exact divergence between a student and a teacher at every token, and its loss.

The student writes, the teacher reads along: at every token of the response their whole next-token distributions are
compared, from hidden states and the two heads, without logits of either. This page is for a loop of your own;
`vppo.distill_trainer` is the same inside TRL's trainer.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vppo.heads import logit_options
from vppo_kernels import linear_divergence, topk_mask
from vppo_kernels.loss import Reduction

KINDS = {"forward_kl": "reverse_kl", "reverse_kl": "kl", "jsd": "jsd", "topk": "topk"}  # the kernels': student first


class Head(NamedTuple):
    """A language-model head: what turns hidden states into logits.

    Attributes:
        weight: `[V, D]`.
        bias: `[V]` or None.
        logit_scale, softcap: As in `vppo_kernels.linear_divergence`.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: Any) -> Head:
        """Of a transformers model, with what its family does to a logit (Gemma's cap, Cohere's and Granite's scale)."""
        head, options = model.get_output_embeddings(), logit_options(model, 1.0)
        return cls(head.weight, getattr(head, "bias", None), options["logit_scale"], options["softcap"])


class Distillation(NamedTuple):
    """What `distillation_loss` returns.

    Attributes:
        loss: Scalar; differentiable in the student's hidden states and head. `[B, T]` with loss_agg "none".
        divergence: `[B, T]` in nats, without gradient, 0 outside the mask.
        entropy, teacher_entropy: The same for the entropies of student and teacher.
    """

    loss: Tensor
    divergence: Tensor
    entropy: Tensor
    teacher_entropy: Tensor


def distillation_loss(
    student: Tensor,
    student_head: Head,
    teacher: Tensor,
    teacher_head: Head,
    mask: Tensor,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    k: int | None = None,
    temperature: float = 1.0,
    weights: Tensor | None = None,
    loss_agg: str = "token-mean",
    denominator: float | Tensor | None = None,
    vocab_size: int | None = None,
    **options: Any,
) -> Distillation:
    """Mean divergence between student p and teacher q over response tokens (GKD, arXiv 2306.13649, Eq. 4).

    Width, dtype and padding of the two heads may differ. To train the student on a perturbed view of an image against
    what the teacher says of the clean one, pass the student's hidden states of the perturbed view.

    Args:
        student: `[B, T, D]` final hidden states before each response token; float32, bfloat16 or float16.
        student_head: Of the student; `[V, D]`.
        teacher: `[B, T, E]` likewise, on the same device. The teacher gets no gradient, and no product for one.
        teacher_head: Of the teacher; `[V, E]`.
        mask: `[B, T]` bool or 0/1. Other positions are not read, whatever they hold, and meet neither head.
        kind: "forward_kl" is `KL(q || p)`, "reverse_kl" `KL(p || q)`. "jsd" is GKD's
            `beta KL(q || m) + (1 - beta) KL(p || m)` with `m = beta q + (1 - beta) p`. "topk" is `KL(q || p)` over
            the teacher's `k` most probable tokens and one bin for all others.
        beta: Of "jsd", from 0 to 1. At the ends it means, as in GKD and TRL, the forward KL (0) and the reverse KL (1).
        k: Of "topk", and None for the others.
        temperature: Divides the logits of both; above 0. The loss is not multiplied by its square.
        weights: `[B, T]` floating-point factors of the tokens, without gradient; None for 1. See `visual_weights`.
        loss_agg: How tokens are averaged; the names of `vppo_kernels.vppo_loss`.
        denominator: Divides the sum in place of this batch's number of tokens (or of responses, as `loss_agg` has it):
            of all processes and micro-batches of an optimizer step, over the number of processes.
        vocab_size: Only the first entries of both heads are vocabulary, the others padding: needed where they differ.
        options: `precision`, `backend`, `process_group` and `check` of `vppo_kernels.linear_divergence`.

    Returns:
        `Distillation(loss, divergence, entropy, teacher_entropy)`.

    Raises:
        TypeError, ValueError, RuntimeError: An argument is of the wrong type, shape or range; see `linear_divergence`.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, takes one of {list(KINDS)}")
    _check("student", student, "[B, T, D]", mask)
    _check("teacher", teacher, "[B, T, E]", mask)
    if weights is not None and tuple(weights.shape) != tuple(mask.shape):
        raise ValueError(f"weights: got shape {list(weights.shape)}, takes {list(mask.shape)} (that of mask)")
    reduction = Reduction(loss_agg, denominator)
    inside = mask.bool()
    found = linear_divergence(
        student[inside],
        teacher.detach()[inside],
        student_head.weight,
        student_head.bias,
        weight_other=_constant(teacher_head.weight),
        bias_other=None if teacher_head.bias is None else _constant(teacher_head.bias),
        kind=KINDS[kind],
        beta=beta,
        k=k,
        temperature=temperature,
        logit_scale=student_head.logit_scale,
        logit_scale_other=teacher_head.logit_scale,
        softcap=student_head.softcap,
        softcap_other=math.inf if teacher_head.softcap is None else teacher_head.softcap,
        vocab_size=vocab_size,
        **options,
    )
    divergence, entropy, teacher_entropy = (
        value.new_zeros(mask.shape).masked_scatter(inside, value) for value in found[:3]
    )
    each = divergence if weights is None else divergence * weights.detach().masked_fill(~inside, 0)
    loss = each if reduction.per_token else reduction(each.sum(1), inside.sum(1), mask.shape[1])
    return Distillation(loss, divergence.detach(), entropy.detach(), teacher_entropy.detach())


def _constant(value: Tensor) -> Tensor:
    """Without gradient; a frozen head that both models share stays one tensor, whose rows then share one product."""
    return value.detach() if value.requires_grad else value


def _check(name: str, hidden: Tensor, takes: str, mask: Tensor) -> None:
    if hidden.dim() != 3 or mask.dim() != 2 or hidden.shape[:2] != mask.shape:
        raise ValueError(
            f"{name}: got shape {list(hidden.shape)} beside a mask of {list(mask.shape)}, takes {takes} beside [B, T]"
        )


def visual_weights(scores: Tensor, mask: Tensor, *, share: float = 0.2, mass: float = 0.5) -> Tensor:
    """Weights of tokens by what the image says about them (VA-OPD, arXiv 2605.21924, Eq. 6, within one response).

    Of each response the `ceil(share * n)` tokens of highest score have the part `mass` of the weight in common, its
    other tokens the rest. The mean over a response's tokens is 1, so the size of the loss stays what it was; VA-OPD
    has the sum 1, which is `loss_agg="seq-mean-token-mean"` of these.

    Args:
        scores: `[B, T]`. VA-OPD's visual advantage is `max(0, log q(y | image) - log q(y | perturbed))` of the
            teacher's log-probabilities of the sampled token; the teacher's exact dependency (`linear_divergence` of
            its two views) says the same without the sampling noise.
        mask: `[B, T]` bool or 0/1, response tokens.
        share: Of the tokens in the group of highest scores, above 0 and at most 1; among equal ones the earlier.
        mass: Their part of the weight, 0 to 1.

    Returns:
        `[B, T]` float32, 0 outside the mask; 1 where a group has all tokens of a response. Not differentiable.

    Raises:
        TypeError, ValueError: As `vppo_kernels.topk_mask`; `mass` is out of range.
    """
    if not 0 <= mass <= 1:
        raise ValueError(f"mass: got {mass!r}, takes a number from 0 to 1")
    inside = mask.bool()
    high = topk_mask(scores.detach(), inside, share)
    low = inside & ~high
    n, n_high, n_low = (group.sum(1, keepdim=True) for group in (inside, high, low))
    above, below = mass * n / n_high.clamp_min(1), (1 - mass) * n / n_low.clamp_min(1)
    alone = torch.ones_like(above)
    return torch.where(high, torch.where(n_low > 0, above, alone), torch.where(low, below, 0.0))
