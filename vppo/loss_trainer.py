"""TRL's GRPO trainer whose loss has what a recipe adds to it, and whose log says what the updates do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vppo.monitoring.measured import spread
from vppo.released_scale import micro_batch_scale
from vppo.two_view_trainer import TwoViewTrainer


class LossTrainer(TwoViewTrainer):
    """`TwoViewTrainer` with the released recipe's trajectory factor of a micro-batch and its penalty on -log p.

    Where shaping takes the statistics of micro-batches, a subclass adds "trajectory_dependency" to a generation batch:
    `[B]` mean scores of the responses, NaN for one that enters no statistic.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._sampled_at = 0  # optimizer steps done when the batch at hand was sampled
        super().__init__(*args, **kwargs)

    def generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's."""
        if self.model.training:
            self._sampled_at = self.state.global_step
        return super().generate_and_score_completions(inputs)

    def compute_micro_batch_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """TRL's, with the trajectory factor of a micro-batch and the penalty on -log p where the recipe has them."""
        mode = "train" if self.model.training else "eval"
        if mode == "train" and "trajectory_dependency" in inputs:
            alpha = self._micro_batch_scale(inputs["trajectory_dependency"])
            inputs = {**inputs, "advantages": inputs["advantages"] * alpha.unsqueeze(1)}
        loss = super().compute_micro_batch_loss(model, inputs)
        mask = inputs["completion_mask"].bool()
        if "tool_mask" in inputs:
            mask &= inputs["tool_mask"].bool()
        if mode == "train" and self.args.nll_coef and self._train_logprobs is not None:
            nll = -torch.where(mask, self._train_logprobs, 0).sum()
            loss = loss + self.args.nll_coef * nll / self.tokens_of_a_step(inputs)
        if mode == "train" and "old_per_token_logps" in inputs and self.state.global_step > self._sampled_at:
            self._log_drift(inputs, mask)
        self._train_logprobs = None
        self._log_clip(inputs["advantages"], mask, mode)
        return loss

    def _micro_batch_scale(self, means: Tensor) -> Tensor:
        window = torch.cat([micro_batch["trajectory_dependency"] for micro_batch in self.accumulated()])
        shaping = self.args.shaping
        alpha = micro_batch_scale(means, window, shaping["scale_min"], shaping["scale_max"])
        if not window.isnan().all() and not means.isnan().all():
            self._log_factors(alpha)
        return alpha

    def _log_drift(self, inputs: dict[str, Any], mask: Tensor) -> None:
        """How far the policy is from the one that sampled, of tokens with and without gradient: k3 of their
        log-probabilities, in nats. Where several updates use the same rollouts both are at hand; the first finds none.
        """
        if self._train_logprobs is None:
            return
        gap = self._train_logprobs.detach() - inputs["old_per_token_logps"]
        advantages = inputs["advantages"] if inputs["advantages"].dim() == 2 else inputs["advantages"].unsqueeze(1)
        mask = mask & ~gap.isnan()  # rows that have not passed
        gap = torch.where(mask, gap, 0).clamp(-20, 20)
        drift, kept = gap.exp() - gap - 1, mask & (advantages != 0)
        parts = [kept, mask & ~kept]
        sums = torch.stack([*((drift * part).sum() for part in parts), *(part.sum() for part in parts)]).float()
        of_kept, of_filtered, tokens, others = self.accelerator.reduce(sums, reduction="sum").tolist()
        for name, total, count in (("kept", of_kept, tokens), ("filtered", of_filtered, others)):
            if count:
                self.metrics_of("train")[f"vppo/drift_{name}"].append(total / count)

    def _log_clip(self, advantages: Tensor, mask: Tensor, mode: str) -> None:
        """Clipped tokens among those that carry gradient; TRL's own ratio counts all response tokens."""
        log = self.metrics_of(mode)
        clipped = log.get("clip_ratio/region_mean")
        if not self.args.scores_tokens or not clipped or advantages.dim() == 1:
            return
        counts = torch.stack([(mask & (advantages != 0)).sum(), mask.sum()]).float()
        active, total = self.accelerator.reduce(counts, reduction="sum").tolist()
        log["vppo/clip_ratio_kept"].append(clipped[-1] * total / max(active, 1.0))

    def _log_factors(self, factors: Tensor) -> None:
        """Of the trajectories that were scored."""
        log = self.metrics_of("train")
        for name, value in spread(factors).items():
            log[f"vppo/alpha_{name}"].append(value)
