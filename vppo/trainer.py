"""VPPO as a thin subclass of TRL's GRPO trainer.

TRL generates, scores and optimises; this class steps in after the rollouts have their advantages: it measures how much
every response token depends on the image and folds filtering and shaping into per-token advantages, which TRL's clipped
losses take as they are. Further seams are one call deep: TRL's own passes are listened to, so that their hidden states
need not be computed again; its training pass shares prompts; the released recipe adds its penalty to the loss.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate.logging import get_logger
from torch import Tensor
from trl.trainer import grpo_trainer

from vppo.batch import Batch, View, in_rows, with_entries, without_no_images
from vppo.config import VPPOConfig
from vppo.errors import InputError
from vppo.fused_head import fused_head
from vppo.heads import logit_options
from vppo.images import rgb_prompt, rgb_row, rgb_tool
from vppo.loading import own_processor
from vppo.logprobs import packed_logprobs
from vppo.monitoring import evaluation
from vppo.monitoring.measured import Measured
from vppo.packed_rows import PackedRows
from vppo.perturbations import seeded
from vppo.prefix_sharing import GIB, ResponsePasses, quiet
from vppo.processors import placeholder_tokens
from vppo.rewards.checks import checked
from vppo.sampled_trainer import SampledTrainer
from vppo.scoring import score
from vppo.sight import ImageWatch
from vppo.views import ImageViews
from vppo_kernels import TrajectoryStats, topk_mask, trajectory_scale, trajectory_stats
from vppo_kernels.shaping import shape_advantages

logger = get_logger(__name__)
BLIND = 1e-8  # nats: below this mean dependency the perturbed view has changed nothing


class VPPOTrainer(SampledTrainer):
    """`trl.GRPOTrainer` that rewards looking. Takes the same arguments, with a `VPPOConfig` as `args`.

    Example:

        trainer = VPPOTrainer(
            model="Qwen/Qwen2.5-VL-7B-Instruct",
            reward_funcs=accuracy_reward,
            args=VPPOConfig(output_dir="runs/7b"),
            train_dataset=dataset,  # conversational "prompt", "images", and what the reward needs
        )
        trainer.train()

    Beside TRL's metrics it logs, under `vppo/`: dependency_mean, dependency_q50, dependency_q90, dependency_q99 (nats),
    kept_fraction, alpha_min, alpha_mean, alpha_max, scored_fraction (rows that went through the perturbed pass),
    clip_ratio_kept (clipped among the tokens that carry gradient), seconds_scoring and, where the sampler tells its
    log-probabilities, sampler_gap_mean and sampler_gap_max (nats a token, see `vppo.sampler_guard`). An evaluation logs
    those of the dependency as `eval_vppo/...`, over all of its rows with an image, for every algorithm: they can be
    compared.

    Completion tables (`log_completions`) have three columns more: `dependency` (nats, mean over the response's tokens),
    `kept_fraction` and, where shaping takes the batch's statistics, `alpha`; NaN where a completion was not scored.

    Raises:
        TypeError: `args` is not a `VPPOConfig`.
        ValueError: Checkpoints would fall between two updates from the same rollouts, which they do not hold.
        InputError: No processor was given, and the model's own cannot be loaded.
        ValueError: The processor is a plain tokenizer: there is no image to look at.
    """

    args: VPPOConfig
    model: Any

    def __init__(self, model: Any, reward_funcs: Any = None, args: VPPOConfig | None = None, **kwargs: Any) -> None:
        if args is None:
            args = VPPOConfig()
        if not isinstance(args, VPPOConfig):
            raise TypeError(f"args: got {type(args).__name__}, takes a vppo.VPPOConfig")
        self._train_logprobs: Tensor | None = None
        self._train_inputs: dict[str, Any] | None = None  # while TRL computes the loss of a training step
        self._problems: list[int] | None = None  # while a batch is evaluated, the fingerprint of each row's problem
        self._pictures: list[Any] = []  # of each row of the batch at hand, as the processor was given them
        self._watch = ImageWatch(args.algorithm)
        self._warned_blind = False
        if kwargs.get("processing_class") is None:
            kwargs["processing_class"] = own_processor(model, args)
        super().__init__(model, reward_funcs, args, **kwargs)
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
            # it would round what a model returns to 16 bits, and here these are log-probabilities
            plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)
        for policy in (self.model, self.ref_model):
            if policy is not None:
                self.accelerator.unwrap_model(policy).register_forward_pre_hook(without_no_images, with_kwargs=True)
        self.reward_funcs = list(map(checked, self.reward_funcs, self.reward_func_names))
        if not self.use_vllm:
            self._suppress_placeholders()
        image_processor = getattr(self.processing_class, "image_processor", None)
        self._measures_evaluation = image_processor is not None and (
            args.scores_tokens or self.eval_dataset is not None
        )
        if args.scores_tokens or self._measures_evaluation:
            if image_processor is None:
                raise ValueError(
                    f"processing_class: got {type(self.processing_class).__name__}, takes a processor with an image "
                    f"processor for algorithm {args.algorithm!r}"
                )
            others = self.tools or self.environment_factories or self.rollout_func  # who may show images, too
            if args.scores_tokens and not others:
                self._watch.dataset(self.train_dataset)
            self._image_views = ImageViews.of(self.processing_class)
            self._perturbation = args.make_perturbation(self._image_views.layout.patch_size)
            self._passes = ResponsePasses(
                self.model, sharing=args.prefix_sharing, memory=int(args.scoring_memory * GIB), most=self._most
            )

    def _suppress_placeholders(self) -> None:
        """A sampled placeholder has no image: TRL leaves out one of them, and most families have several."""
        given = self.generation_kwargs.get("suppress_tokens") or []
        tokens = sorted({*given, *placeholder_tokens(self.model.config)})
        self.generation_kwargs["suppress_tokens"] = self.generation_config.suppress_tokens = tokens or None

    # -- before the rollouts -----------------------------------------------------------------------------------------

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        """TRL's, where a prompt without images has an empty list of them: processors refuse its None."""
        prompt_ids, images, fields = super()._tokenize_prompts(prompts)
        return prompt_ids, images and [group or [] for group in images], fields

    def _calculate_rewards(self, inputs: list[dict[str, Any]], *args: Any) -> Tensor:
        """TRL's; see `vppo.rewards.checks` for what a reward function may return."""
        rewards: Tensor = super()._calculate_rewards(inputs, *args)
        if rewards.isnan().all():
            names = ", ".join(self.reward_func_names)
            raise InputError(f"reward_funcs: {names}: gave None for all {len(rewards)} responses of a batch")
        return rewards

    # -- after the rollouts ------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        training = self.model.training
        scores = self.args.scores_tokens if training else self._measures_evaluation
        self._problems = None if training else [evaluation.fingerprint(row) for row in inputs]
        self._recorded = [] if scores else None
        columns: dict[str, list[Any]] = {}
        try:
            shown = [rgb_row(row) for row in inputs]
            self._pictures = [row["images"] or [] if "images" in row else [row.get("image")] for row in shown]
            output = super()._generate_and_score_completions(shown)
            output = with_entries(output, len(inputs))
            hidden_clean = self._take_recorded(output)
            if scores:
                output, columns = (self._fold if training else self._measure)(output, hidden_clean)
        finally:
            self._recorded, self._generated, self._problems = None, [], None
        self._keep_completions(columns)
        return output

    def _generate(self, prompts: list[Any]) -> Any:
        """TRL's, which also tells the images of messages, tools and environments."""
        generated = super()._generate(list(map(rgb_prompt, prompts)))  # an environment may have added pictures
        *_, images, _ = generated
        if images is not None:
            self._pictures = [group or [] for group in images]
        return generated

    def _tool_call_loop(self, *generated: Any) -> Any:
        """TRL's, whose tools show their pictures as a person sees them, and whose rows keep their own images."""
        for tools in (*self._sync_tool_dicts, *self._async_tool_dicts):
            tools.update({name: rgb_tool(tool) for name, tool in tools.items()})
        *others, fields = generated  # the first of them are the prompts
        if in_rows(fields):
            fields = {**fields, "num_images": [1] * len(others[0])}  # here TRL counts entries by this name
        return super()._tool_call_loop(*[*others, fields])

    @torch.no_grad()
    def _fold(self, output: dict[str, Any], hidden_clean: Tensor | None) -> tuple[dict[str, Any], dict[str, list[Any]]]:
        """Fold token mask and trajectory factor into the advantages of a generation batch; and its table's columns."""
        started = time.perf_counter()
        batch = Batch(output)
        seen = bool(self.accelerator.gather(batch.has_image).any())
        self._watch.step(self.state.global_step, seen, every=self.state.logging_steps)
        scored = batch.has_image & self._live_groups(output["advantages"])
        alike = batch.alike(self._prompts(batch))
        dependency = self._score(batch, scored, hidden_clean, alike)
        stats = trajectory_stats(dependency, batch.mask & scored.unsqueeze(1), stats_group=self._process_group())
        folded_later = self.args.tas_statistics == "micro-batch"
        compared = "old_per_token_logps" in output
        if self._may_pack(compared) and self._passes.packs_rows(batch, View(alike)):
            output["prompt"] = torch.tensor(alike, device=batch.prompt_ids.device)
        shaped = shape_advantages(
            output["advantages"],
            dependency,
            batch.mask,
            has_image=scored,  # groups without a signal have zero advantages: nothing to filter or to scale
            stats=TrajectoryStats(0.0, 0.0, 0.0, 0) if folded_later else stats,
            **self.args.shaping,
        )
        if folded_later:
            # NaN marks what enters no statistic; so 0 / 0 is right for a row without response tokens
            output["trajectory_dependency"] = torch.where(scored, dependency.sum(1) / batch.mask.sum(1), math.nan)
        measured = Measured.gather(self.accelerator, dependency, batch.mask, shaped.keep, scored)
        self._log_scoring(measured, started)
        columns = measured.columns()
        log = self._metrics["train"]
        for name, value in measured.metrics().items():
            log[name].append(value)
        if not folded_later:
            factors = self.accelerator.gather(torch.where(scored, shaped.alpha, math.nan))
            columns["alpha"] = factors.tolist()
            factors = factors[~factors.isnan()]
            if len(factors):
                log["vppo/alpha_min"].append(factors.min().item())
                log["vppo/alpha_mean"].append(factors.mean().item())
                log["vppo/alpha_max"].append(factors.max().item())
        return {**output, "advantages": shaped.advantages}, columns

    @torch.no_grad()
    def _measure(
        self, output: dict[str, Any], hidden_clean: Tensor | None
    ) -> tuple[dict[str, Any], dict[str, list[Any]]]:
        """Measure the dependency of an evaluation batch, whatever its rewards; its advantages stay as they are."""
        started = time.perf_counter()
        batch = Batch(output)
        tokens = batch.mask & batch.has_image.unsqueeze(1)
        dependency = self._score(batch, batch.has_image, hidden_clean, batch.alike(self._prompts(batch)))
        filtered = self.args.algorithm in ("vppo", "tgf")
        keep = topk_mask(dependency, tokens, self.args.keep_ratio) if filtered else tokens
        measured = Measured.gather(self.accelerator, dependency, batch.mask, keep, batch.has_image)
        self._measured.append(measured)
        self._log_scoring(measured, started)
        return output, measured.columns()

    def _score(self, batch: Batch, scored: Tensor, hidden_clean: Tensor | None, alike: Sequence[int]) -> Tensor:
        """`[B, T]` dependency of these rows' response tokens, in nats, 0 elsewhere; `alike` is of `Batch.alike`."""
        rows = scored.nonzero().flatten().tolist()
        with quiet(self.model), self.accelerator.autocast():
            return score(
                self._passes,
                batch,
                rows,
                *self._views(batch, rows, alike),
                kind=str(self.args.divergence),
                options=logit_options(self.accelerator.unwrap_model(self.model), self.temperature),
                hidden_clean=hidden_clean,
                check=self.args.check_kernels,
            )

    def _live_groups(self, advantages: Tensor) -> Tensor:
        """`[B]` bool: rows of prompts whose rollouts do not all have zero advantage, also across processes."""
        everyone = self.accelerator.gather(advantages)
        live = (everyone.view(-1, self.num_generations) != 0).any(1).repeat_interleave(self.num_generations)
        first = self.accelerator.process_index * len(advantages)
        return live[first : first + len(advantages)]

    def _most(self, count: int) -> int:
        """The largest count of all processes where the model is sharded and all must join each forward."""
        if not (self._dist.is_fsdp or self._dist.is_zero3):
            return count
        return int(self.accelerator.gather(torch.tensor([count], device=self.accelerator.device)).max())

    def _views(self, batch: Batch, rows: Sequence[int], alike: Sequence[int]) -> tuple[View, View]:
        """The clean view and the perturbed one, drawn by (seed, step, prompt) or (seed, step, prompt, rollout).

        Rollouts of a prompt that were shown other images, as by a tool, have a view of their own from the same draw.
        In evaluation the problem's own content takes the place of step and prompt, so that evaluations can be compared.
        """
        first, prompts = self.accelerator.process_index * len(batch), self._prompts(batch)
        each = self.args.perturbation_scope == "rollout"
        keys = list(range(len(batch))) if each else alike
        pixels: dict[int, Tensor] = {}
        pictures, self._pictures = self._pictures, []  # whole photographs: not longer than they are needed
        for row in rows:
            if keys[row] not in pixels:
                step, prompt = self.state.global_step, prompts[row]
                if self._problems is not None:
                    step, prompt = evaluation.KEY, self._problems[row]
                draw = (prompt, (first + row) % self._group_size) if each else (prompt,)
                generator = seeded(self.args.seed, step, *draw)
                pixels[keys[row]] = self._image_views.perturbed(
                    batch, row, pictures[row], self._perturbation, generator
                )
        return View(alike), View(keys, pixels)

    def _prompts(self, batch: Batch) -> list[int]:
        """Which prompt of the generation batch, of all processes, a row answers."""
        first = self.accelerator.process_index * len(batch)
        return [(first + row) // self._group_size for row in range(len(batch))]

    @property
    def _group_size(self) -> int:
        """Rollouts of a prompt in the batch at hand."""
        return self.num_generations if self._problems is None else self.num_generations_eval

    def _process_group(self) -> Any:
        return dist.group.WORLD if self.accelerator.num_processes > 1 else None

    def _log_scoring(self, measured: Measured, started: float) -> None:
        """The time it took; and a warning if the perturbed view changed nothing."""
        if measured.values.is_cuda:
            torch.cuda.synchronize(measured.values.device)
        log = self._metrics["train" if self.model.training else "eval"]
        log["vppo/seconds_scoring"].append(time.perf_counter() - started)
        values = measured.values
        if len(values) and values.mean() < BLIND and not self._warned_blind:
            self._warned_blind = True
            logger.warning(
                f"The perturbed view changes nothing: mean dependency {values.mean().item():.1e} nats over "
                f"{values.numel()} tokens. Likely causes: images are dropped on the way to the model, the projector "
                "between vision tower and language model is zero and frozen, or the perturbation is too weak."
            )

    # -- TRL's training pass -----------------------------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """TRL's; but rollouts that may share a prompt stay together, and are not shuffled over micro-batches.

        Which prompts meet in a micro-batch is random all the same: the sampler has shuffled them.
        """
        if not self._keeps_groups:
            return super()._prepare_inputs(generation_batch)
        with mock.patch.object(grpo_trainer, "shuffle_sequence_dict", lambda rows: rows):
            return super()._prepare_inputs(generation_batch)

    def _get_per_token_logps_and_entropies(
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
        """TRL's; in packs where they are the same to the last digits."""
        inputs = self._train_inputs
        images = {name: value for name, value in images.items() if value is not None}
        images = with_entries(images, len(input_ids))
        tokens = input_ids, attention_mask, logits_to_keep, batch_size
        passed: Tensor | None = None
        with fused_head(self.accelerator.unwrap_model(model), gathered=not self._dist.is_zero3):
            if inputs is not None and "prompt" in inputs:
                *found, passed = self._packed_training_pass(model, inputs)
                result: Any = (*found, None)
            elif (result := self._packed_old_pass(model, *tokens, images)) is None:
                with self._recording(lambda hidden: hidden[:, -(logits_to_keep + 1) : -1].clone()):
                    result = super()._get_per_token_logps_and_entropies(
                        model, *tokens, compute_entropy, compute_aux_loss, **images
                    )
        if torch.is_grad_enabled():  # NaN for rows that have not passed: there is nothing to compare the sampler's with
            self._train_logprobs = result[0] if passed is None else result[0].masked_fill(~passed, math.nan)
        return result

    def _packed_old_pass(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        length: int,
        batch_size: int | None,
        images: dict[str, Any],
    ) -> tuple[Tensor, None, None] | None:
        """Log-probabilities of a generation before its training passes, in the same packs; None if it does not pack."""
        if self._recorded is None or not self.model.training or not self._may_pack(compared=True):
            return None
        tokens = {"prompt_ids": input_ids[:, :-length], "completion_ids": input_ids[:, -length:]}
        masks = {"prompt_mask": attention_mask[:, :-length], "completion_mask": attention_mask[:, -length:]}
        batch = Batch({**tokens, **masks, **images})
        view = View(batch.alike(self._prompts(batch)))
        if not self._passes.packs_rows(batch, view):
            return None
        found: list[Tensor] = []
        with self._recording(lambda hidden: packed.spread(hidden)[part]), self.accelerator.autocast():
            for start in range(0, len(batch), batch_size or len(batch)):
                part = slice(start, start + (batch_size or len(batch)))
                packs = self._passes.packs(batch, range(len(batch))[part], view)
                packed = PackedRows(self._passes.model, batch, packs, view)
                found.append(packed_logprobs(model, packed)[0][part])
        return torch.cat(found), None, None

    # -- in the loss -------------------------------------------------------------------------------------------------

    @property
    def _keeps_groups(self) -> bool:
        """Whether a micro-batch has the rollouts of a prompt one after the other; the released code's statistics are of
        micro-batches as TRL shuffles them.
        """
        shares = self.args.scores_tokens and self.args.prefix_sharing != "off"
        return shares and self.args.tas_statistics != "micro-batch"

    def _may_pack(self, compared: bool) -> bool:
        """Whether nothing but the last digits tells a training pass with packed rows from TRL's.

        Args:
            compared: Whether its log-probabilities are compared with those of an earlier pass. In 16 bits their ratio
                is 1 only where both have the same packs.
        """
        exact = self.model.dtype == torch.float32 and self.accelerator.mixed_precision == "no"
        same = self._keeps_groups or exact or not compared
        return self.args.scores_tokens and same and not self._has_dropout and not self.aux_loss_enabled

    def _packed_training_pass(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities and entropies with gradients, and `[B, 1]` which rows have passed; packs whose loss is 0
        whatever they are do not.
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
        others = self.beta or self.args.nll_coef or self._entropy_bonus_enabled
        return not others and self.top_entropy_quantile == 1.0

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        mode = "train" if self.model.training else "eval"
        if mode == "train" and "trajectory_dependency" in inputs:
            alpha = self._micro_batch_scale(inputs["trajectory_dependency"])
            inputs = {**inputs, "advantages": inputs["advantages"] * alpha.unsqueeze(1)}
        self._train_inputs = inputs if mode == "train" else None
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self._train_inputs = None
        mask = inputs["completion_mask"].bool()
        if "tool_mask" in inputs:
            mask &= inputs["tool_mask"].bool()
        if mode == "train" and self.args.nll_coef and self._train_logprobs is not None:
            loss = loss - self.args.nll_coef * torch.where(mask, self._train_logprobs, 0).sum() / self._tokens(inputs)
        self._train_logprobs = None
        self._log_clip(inputs["advantages"], mask, mode)
        return loss

    def _tokens(self, inputs: dict[str, Any]) -> Tensor:
        """Response tokens that one optimizer step averages over, per process: the divisor of TRL's "dapo" loss."""
        share = self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes * share

    def _micro_batch_scale(self, means: Tensor) -> Tensor:
        """Factors of the released code: minimum and maximum of this device's mini-batch, mean of this micro-batch."""
        accumulation = self.args.gradient_accumulation_steps
        assert self.args.steps_per_generation and self._buffered_inputs
        start = self._step % self.args.steps_per_generation // accumulation * accumulation
        window = torch.cat([b["trajectory_dependency"] for b in self._buffered_inputs[start : start + accumulation]])
        window = window[~window.isnan()]
        present = ~means.isnan()
        if not len(window) or not present.any():
            return torch.ones_like(means)
        stats = TrajectoryStats(window.min(), window.max(), means[present].mean(), len(window))
        alpha = trajectory_scale(
            means.nan_to_num().unsqueeze(1),
            present.unsqueeze(1),
            scale_min=self.args.shaping["scale_min"],
            scale_max=self.args.shaping["scale_max"],
            stats=stats,
        )
        # a micro-batch of minima alone has mean u = 0, and the factor of maximal u is infinite: u = 0 does not need it
        alpha = torch.where(alpha.isnan() & (means == window.min()), self.args.shaping["scale_min"], alpha)
        for name, value in (("min", alpha.min()), ("mean", alpha.mean()), ("max", alpha.max())):
            self._metrics["train"][f"vppo/alpha_{name}"].append(value.item())
        return alpha

    def _log_clip(self, advantages: Tensor, mask: Tensor, mode: str) -> None:
        """Clipped tokens among those that carry gradient; TRL's own ratio counts all response tokens."""
        clipped = self._metrics[mode].get("clip_ratio/region_mean")
        if not self.args.scores_tokens or not clipped or advantages.dim() == 1:
            return
        counts = torch.stack([(mask & (advantages != 0)).sum(), mask.sum()]).float()
        active, total = self.accelerator.reduce(counts, reduction="sum").tolist()
        self._metrics[mode]["vppo/clip_ratio_kept"].append(clipped[-1] * total / max(active, 1.0))
