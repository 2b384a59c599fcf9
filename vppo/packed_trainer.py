"""TRL's GRPO trainer whose passes over a batch's log-probabilities take packed rows and this library's head."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vppo.batch import Batch, View, with_entries
from vppo.config import VPPOConfig
from vppo.fused_head import fused_head
from vppo.logprobs import packed_logprobs
from vppo.packed_rows import PackedRows
from vppo.prefix_sharing import ResponsePasses
from vppo.rollout_trainer import RolloutTrainer
from vppo.trl_seams import keeps_order, unshuffled


class PackedTrainer(RolloutTrainer):
    """`RolloutTrainer` in which a prompt of several rollouts passes once, wherever that changes only the last digits.

    A subclass that scores tokens sets `_passes`. Where `_packs` allows it, it adds "prompt" to a generation batch:
    `[B]` numbers that are equal for rows with the same prompt and images. It finds the log-probabilities of a training
    step in `_train_logprobs`, and sets that to None when it has read them.
    """

    args: VPPOConfig
    _passes: ResponsePasses

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._train_logprobs: Tensor | None = None
        self._train_inputs: dict[str, Any] | None = None  # while TRL computes the loss of a training step
        super().__init__(*args, **kwargs)
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
            # it would round what a model returns to 16 bits, and here these are log-probabilities
            plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)
        self._group_size = self.num_generations  # rollouts of a prompt in the batch at hand
        # Whether the rollouts of a prompt follow each other in a micro-batch. The statistics of the released code are
        # those of micro-batches that TRL has shuffled.
        shares = self.args.scores_tokens and self.args.prefix_sharing != "off"
        self._keeps_groups = shares and self.args.tas_statistics != "micro-batch" and keeps_order()

    def prepare_inputs(self, generation_batch: Any) -> Any:
        """TRL's, but rollouts that may share a prompt stay together and are not shuffled over micro-batches.

        Which prompts meet in a micro-batch is still random, because the sampler has shuffled them.
        """
        with unshuffled() if self._keeps_groups else nullcontext():
            return super().prepare_inputs(generation_batch)

    def generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's."""
        self._group_size = self.num_generations if self.model.training else self.num_generations_eval
        return super().generate_and_score_completions(inputs)

    def get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **images: Any,
    ) -> Any:
        """TRL's, or those of packed rows where the two agree to the last digits."""
        inputs = self._train_inputs
        images = {name: value for name, value in images.items() if value is not None}
        images = with_entries(images, len(input_ids))
        tokens = input_ids, attention_mask, logits_to_keep, batch_size
        passed: Tensor | None = None
        with fused_head(self.accelerator.unwrap_model(model), gathered=self.gathers_in_backward):
            if inputs is not None and "prompt" in inputs:
                *found, passed = self._packed_training_pass(model, inputs)
                result: Any = (*found, None)
            elif (result := self._packed_old_pass(model, *tokens, images)) is None:
                with self._recording(lambda hidden: hidden[:, -(logits_to_keep + 1) : -1]):
                    result = super().get_per_token_logps_and_entropies(
                        model, *tokens, compute_entropy, compute_aux_loss, **images
                    )
        if torch.is_grad_enabled():  # NaN for rows that have not passed: there is nothing to compare the sampler's with
            self._train_logprobs = result[0] if passed is None else result[0].masked_fill(~passed, math.nan)
        return result

    def compute_micro_batch_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """TRL's, with the batch at hand for the training pass that it makes."""
        self._train_inputs = inputs if self.model.training else None
        try:
            return super().compute_micro_batch_loss(model, inputs)
        finally:
            self._train_inputs = None

    def _packs(self, batch: Batch, view: View, compared: bool) -> bool:
        """Whether a pass with packed rows is possible, and differs from TRL's only in the last digits.

        Args:
            batch: The rows. All processes must ask at the same time.
            view: What they are shown.
            compared: Whether the log-probabilities are compared with those of another pass. In 16 bits their ratio is 1
                only where both passes have the same packs.
        """
        exact = self.model.dtype == torch.float32 and self.accelerator.mixed_precision == "no"
        same = self._keeps_groups or exact or not compared
        may = self.args.scores_tokens and same and not self._has_dropout and not self.aux_loss_enabled
        return may and self._passes.packs_rows(batch, view)

    def _packed_old_pass(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        length: int,
        batch_size: int | None,
        images: dict[str, Any],
    ) -> tuple[Tensor, None, None] | None:
        """Log-probabilities before the training passes, from the same packs as those; None if rows cannot be packed."""
        if self._recorded is None or not self.model.training:
            return None
        tokens = {"prompt_ids": input_ids[:, :-length], "completion_ids": input_ids[:, -length:]}
        masks = {"prompt_mask": attention_mask[:, :-length], "completion_mask": attention_mask[:, -length:]}
        batch = Batch({**tokens, **masks, **images})
        view = View(batch.alike(self._prompts(batch)))
        if not self._packs(batch, view, compared=True):
            return None
        found: list[Tensor] = []
        with self._recording(lambda hidden: packed.spread(hidden)[part]), self.accelerator.autocast():
            for start in range(0, len(batch), batch_size or len(batch)):
                part = slice(start, start + (batch_size or len(batch)))
                packs = self._passes.packs(batch, range(len(batch))[part], view)
                packed = PackedRows(self._passes.model, batch, packs, view)
                found.append(packed_logprobs(model, packed)[0][part])
        return torch.cat(found), None, None

    def _packed_training_pass(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities and entropies with gradients, and `[B, 1]` which rows have passed. Packs whose loss is 0
        for any log-probabilities do not pass.
        """
        batch, view = Batch(inputs), View(inputs["prompt"].tolist())
        packs = self._passes.packs(batch, range(len(batch)), view)
        if self._only_advantages_matter:
            alive = (batch.mask & (inputs["advantages"] != 0)).any(1).tolist()
            some = [pack for pack in packs if any(alive[row] for row in pack)]
            if not any(batch.has_image[pack[0]] for pack in some):  # the vision tower's gradients are 0, not missing
                some += [pack for pack in packs if batch.has_image[pack[0]]][:1]
            packs = some or packs[:1]  # every process joins each forward, and a loss has gradients
        packed = PackedRows(self._passes.model, batch, packs, view)
        with self.accelerator.autocast():
            logprobs, entropy = packed_logprobs(model, packed)
        passed = torch.zeros(len(batch), 1, dtype=torch.bool, device=logprobs.device)
        passed[packed.rows] = True
        if not passed.all():
            logprobs = torch.where(passed, logprobs, inputs.get("old_per_token_logps", 0.0))  # the ratio there is 1
            mean = entropy.detach()[batch.mask & passed].mean().nan_to_num()  # so that TRL logs that of the others
            entropy = torch.where(passed, entropy, mean)
        return logprobs, entropy, passed

    @property
    def _only_advantages_matter(self) -> bool:
        """Whether the loss of a row without advantage is 0, and has no gradient."""
        others = self.beta or self.args.nll_coef or self.rewards_entropy
        return not others and self.top_entropy_quantile == 1.0

    def _prompts(self, batch: Batch) -> list[int]:
        """Which prompt of the generation batch, of all processes, a row answers."""
        first = self.accelerator.process_index * len(batch)
        return [(first + row) // self._group_size for row in range(len(batch))]
