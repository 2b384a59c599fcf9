"""TRL's GRPO trainer whose training steps may pass both views, for a loss of what these differ in."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from vppo.batch import Batch, View
from vppo.methods.papo import papo_penalty
from vppo.packed_rows import PackedRows
from vppo.packed_trainer import PackedTrainer
from vppo.two_views import WholeRows, refusal, two_view_pass
from vppo_kernels.statistics import DivergenceOutput


class TwoViewTrainer(PackedTrainer):
    """`PackedTrainer` with PAPO's penalty on a micro-batch that names its perturbed views.

    A subclass calls `show_in_training` for a generation batch, and adds "view" to it: `[B]` the keys of `shown`.

    Raises:
        ValueError: The algorithm has the penalty, and the model or its sharding does not allow the pass that it needs.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.shown = View([])
        self._both: DivergenceOutput | None = None  # of the training step at hand
        super().__init__(*args, **kwargs)
        if self.args.method.penalizes:
            reason = refusal(self.gathers_in_backward)
            if not reason and self.aux_loss_enabled:
                reason = "the loss of the model's router is not known to it"
            if reason:
                raise ValueError(f"algorithm: got {self.args.algorithm!r}, takes another one here: {reason}")

    def show_in_training(self, batch: Batch, perturbed: View) -> None:
        """What training steps on a generation batch show as the perturbed view: to rows without images their own."""
        keys, own, pixels = list(perturbed.keys)[: len(batch)], batch.split.get("pixel_values"), perturbed.pixels or {}
        if own is not None:
            pixels = {key: own[row] for row, key in enumerate(keys)} | pixels
        self.shown = View(keys, pixels)

    def get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's; in a training step with two views that of the clean one, and both are kept for the loss."""
        inputs = self._train_inputs
        if inputs is None or "view" not in inputs:
            return super().get_per_token_logps_and_entropies(model, *args, **kwargs)
        batch, keys = Batch(inputs), inputs["view"].tolist()
        shown = View(keys, self.shown.pixels)
        policy = self.accelerator.unwrap_model(model)
        if "prompt" in inputs:  # packs of what is alike in both views
            packs = self._passes.packs(batch, range(len(batch)), shown)
            rows: Any = partial(PackedRows, self._passes.model, batch, packs)
        else:
            rows = partial(WholeRows, batch)
        with self.accelerator.autocast():
            logprobs, entropy, self._both = two_view_pass(
                model, policy, rows, View(keys), shown, str(self.args.divergence)
            )
        self._train_logprobs = logprobs
        return logprobs, entropy, None

    def compute_micro_batch_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """TRL's, and PAPO's penalty in the same mean over tokens; rows without an image have none."""
        loss = super().compute_micro_batch_loss(model, inputs)
        both, self._both = self._both, None
        if both is None:
            return loss
        batch = Batch(inputs)
        mask, seen = batch.mask, batch.mask & batch.has_image.unsqueeze(1)
        penalty = papo_penalty(
            both,
            seen,
            kl_coef=self.args.papo_kl_coef,
            entropy_coef=self.args.papo_entropy_coef,
            entropy_perturbed_coef=self.args.papo_entropy_coef,
        )
        tokens = seen.sum().clamp(min=1)
        for name, values in (("kl", both.divergence), ("entropy_perturbed", both.entropy_perturbed)):
            mean = torch.where(seen, values.detach(), 0).sum() / tokens
            self.metrics_of("train")[f"vppo/papo_{name}"].append(self.accelerator.gather(mean).mean().item())
        if self.args.loss_type == "grpo":
            return loss + (penalty.sum(1) / mask.sum(1).clamp(min=1)).mean() / self.current_gradient_accumulation_steps
        return loss + penalty.sum() / self.tokens_of_a_step(inputs)

    def tokens_of_a_step(self, inputs: dict[str, Any]) -> Tensor:
        """Response tokens that one optimizer step averages over, per process: the divisor of TRL's "dapo" loss."""
        share = self.current_gradient_accumulation_steps / self.args.steps_per_generation
        tokens: Tensor = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes * share
        return tokens
