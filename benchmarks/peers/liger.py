"""Liger's fused linear JSD, with beta 0 KL(teacher || student), and its fused linear GRPO loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.lesson import Lesson
from benchmarks.pair import Pair
from benchmarks.rollout import Rollouts
from vppo_kernels import vppo_advantages

NOTES = {
    "divergence": "returns the mean only; its forward computes the gradient already, of the perturbed view only; the "
    "clean view is the teacher",
    "distill": "returns the mean only; its forward computes the gradient already",
    "loss": "the same loss (its DAPO on shaped advantages), one trajectory at a time, padding included",
}


def divergence(pair: Pair) -> Callable[[], Tensor]:
    if not pair.hidden.is_cuda:
        raise NotImplementedError("needs a GPU with Triton")
    from liger_kernel.transformers import LigerFusedLinearJSD

    module, ignored = LigerFusedLinearJSD(jsd_beta=0.0), -100
    teacher, teacher_weight = pair.hidden.detach(), pair.weight.detach()

    def call() -> Tensor:
        labels = torch.where(pair.upstream != 0, 0, ignored)
        value: Tensor = module(pair.perturbed, pair.weight, teacher, teacher_weight, labels)
        return value

    return call


def distill(lesson: Lesson) -> Callable[[], Tensor]:
    if not lesson.student.is_cuda:
        raise NotImplementedError("needs a GPU with Triton")
    from liger_kernel.transformers import LigerFusedLinearJSD

    module, ignored = LigerFusedLinearJSD(jsd_beta=lesson.beta), -100
    student, weight, teacher, teacher_weight = lesson.tensors

    def call() -> Tensor:
        labels = torch.where(lesson.upstream != 0, 0, ignored)
        value: Tensor = module(student, weight, teacher, teacher_weight, labels)
        return value

    return call


def loss(rollouts: Rollouts) -> Callable[[], Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    plan = rollouts.plan
    advantages, mask, dependency = plan.arguments
    # its default of one trajectory per chunk is what lets it broadcast advantages of every token
    module = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, chunk_size=1, epsilon_low=0.2, epsilon_high=0.28, loss_type="dapo"
    )

    def call() -> Tensor:
        shaped = vppo_advantages(advantages, dependency, mask, **plan.options)
        value: Tensor = module(
            rollouts.hidden, rollouts.weight, rollouts.targets, mask, shaped, old_per_token_logps=rollouts.old_logprobs
        )[0]
        return value

    return call
