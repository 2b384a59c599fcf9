"""TRL's chunked divergence and log-probabilities, called as its distillation and its GRPO trainer call them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks.lesson import Lesson
from benchmarks.pair import Pair
from benchmarks.rollout import Rollouts
from vppo_kernels import vppo_loss

NOTES = {
    "divergence": "differentiates the perturbed view only; the clean view is the teacher",
    "distill": "the function of its distillation trainer",
    "logprob": "differentiates every row",
    "loss": "the log-probabilities of all response tokens, on a CPU of the padding too; then vppo_loss",
}


def divergence(pair: Pair) -> Callable[[], Tensor]:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    teacher, teacher_weight = pair.hidden.detach(), pair.weight.detach()
    forward_kl, temperature = 0.0, 1.0

    def call() -> Tensor:
        value: Tensor = ChunkedDivergenceFunction.apply(
            pair.perturbed, pair.weight, None, teacher, teacher_weight, None, forward_kl, temperature
        )[0]
        return value

    return call


def distill(lesson: Lesson) -> Callable[[], Tensor]:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    student, weight, teacher, teacher_weight = lesson.tensors

    def call() -> Tensor:
        value: Tensor = ChunkedDivergenceFunction.apply(
            student, weight, None, teacher, teacher_weight, None, lesson.beta
        )[0]
        return value

    return call


def logprob(rollouts: Rollouts) -> Callable[[], Tensor]:
    return lambda: _logprobs(rollouts.hidden, rollouts.weight, rollouts.targets)


def loss(rollouts: Rollouts) -> Callable[[], Tensor]:
    plan, mask = rollouts.plan, rollouts.plan.mask

    def call() -> Tensor:
        if rollouts.hidden.is_cuda:  # as TRL's fused head: where Triton runs, padding is left out first
            found = _logprobs(rollouts.hidden[mask], rollouts.weight, rollouts.targets[mask])
            logprobs = found.new_zeros(mask.shape).masked_scatter(mask, found)
        else:
            logprobs = _logprobs(rollouts.hidden, rollouts.weight, rollouts.targets)
        return vppo_loss(logprobs, rollouts.old_logprobs, *plan.arguments, **plan.options)[0]

    return call


def _logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    temperature, softcap, logit_scale, outputs = 1.0, None, 1.0, ("log_probs", "entropy")
    value: Tensor = ChunkedLogProbFunction.apply(
        hidden.reshape(-1, hidden.shape[-1]), weight, None, targets.reshape(-1),
        temperature, _CHUNKED_LOGPROB_CHUNK_SIZE, softcap, logit_scale, outputs,
    )[0]  # fmt: skip
    return value.view(targets.shape)
