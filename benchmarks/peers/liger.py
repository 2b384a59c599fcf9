"""Liger's fused linear JSD with beta 0, which is KL(teacher || student); the clean view is the teacher."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.pair import Pair

NOTE = "returns the mean only; its forward computes the gradient already, of the perturbed view only"


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
