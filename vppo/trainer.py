"""VPPO as a thin subclass of TRL's GRPO trainer.

TRL generates, scores and optimises. This class steps in when the rollouts have their advantages: it measures how much
every response token depends on the image, and multiplies filtering and shaping into per-token advantages, which TRL's
clipped losses take as they are.

Everything else is in the classes below, one concern each: `trl_seams.TRLTrainer` (TRL's private names), `LoggedTrainer`
(metrics and completions), `SavedTrainer` (checkpoints), `ListeningTrainer` (hidden states from TRL's own passes),
`SampledTrainer` (vLLM), `RolloutTrainer` (images and rewards), `PackedTrainer` (prompts shared in training passes),
`TwoViewTrainer` (training passes over both views), `LossTrainer` (what a recipe adds to the loss), `ScoringTrainer`
(what both views say of each token).
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vppo.batch import Batch, View
from vppo.config import VPPOConfig
from vppo.loading import own_processor
from vppo.monitoring import evaluation
from vppo.monitoring.measured import Measured
from vppo.scoring_trainer import ScoringTrainer
from vppo.sight import ImageWatch
from vppo_kernels import TrajectoryStats, topk_mask, trajectory_stats
from vppo_kernels.shaping import Shaped, shape_advantages
from vppo_kernels.statistics import DivergenceOutput


class VPPOTrainer(ScoringTrainer):
    """`trl.GRPOTrainer` that rewards looking. Takes the same arguments, with a `VPPOConfig` as `args`.

    Example:

        trainer = VPPOTrainer(
            model="Qwen/Qwen2.5-VL-7B-Instruct",
            reward_funcs=accuracy_reward,
            args=VPPOConfig(output_dir="runs/7b"),
            train_dataset=dataset,  # conversational "prompt", "images", and what the reward needs
        )
        trainer.train()

    Beside TRL's metrics it logs, under `vppo/`: dependency_mean, dependency_q50, dependency_q90, dependency_q99 and, of
    several draws, dependency_stderr (nats); kept_fraction, kept_dependency_fraction (of all dependency),
    kept_unseen_fraction (kept tokens below 0.01 nats), responses_without_kept; alpha_min, alpha_mean, alpha_max,
    alpha_std; scored_fraction (rows that were scored), clip_ratio_kept (clipped among the tokens that carry gradient),
    from the second update of the same rollouts on drift_kept and drift_filtered (nats), seconds_scoring and, where the
    sampler tells its log-probabilities, sampler_gap_mean and sampler_gap_max (nats a token, see `vppo.sampler_guard`).
    An algorithm that scores by something else than dependency logs none of it in training. An evaluation logs those of
    the dependency as `eval_vppo/...`, over all of its rows with an image, for every algorithm: they can be compared.

    Completion tables (`log_completions`) have three columns more: `dependency` (nats, mean over the response's tokens),
    `kept_fraction` and, where shaping takes the batch's statistics, `alpha`; NaN where a completion was not scored.

    Raises:
        TypeError: `args` is not a `VPPOConfig`.
        ValueError: Checkpoints would fall between two updates from the same rollouts, which they do not hold.
        InputError: No processor was given, and the model's own cannot be loaded.
        ValueError: The algorithm's scores are given, and `token_scores` is not overridden.
        ValueError: The processor is a plain tokenizer: there is no image to look at.
    """

    args: VPPOConfig
    model: Any

    def __init__(self, model: Any, reward_funcs: Any = None, args: VPPOConfig | None = None, **kwargs: Any) -> None:
        if args is None:
            args = VPPOConfig()
        if not isinstance(args, VPPOConfig):
            raise TypeError(f"args: got {type(args).__name__}, takes a vppo.VPPOConfig")
        self._watch = ImageWatch(args.algorithm)
        if args.method.score == "given" and type(self).token_scores is VPPOTrainer.token_scores:
            raise ValueError(
                f"args: got algorithm {args.algorithm!r}, takes it of a subclass whose token_scores says which tokens "
                "carry gradient"
            )
        if kwargs.get("processing_class") is None:
            kwargs["processing_class"] = own_processor(model, args)
        super().__init__(model, reward_funcs, args, **kwargs)
        others = self.tools or self.environment_factories or self.rollout_func  # who may show images, too
        if args.scores_tokens and not others:
            self._watch.dataset(self.train_dataset)

    # -- after the rollouts ------------------------------------------------------------------------------------------

    def generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's; then dependency is measured and, in training, multiplied into the advantages."""
        training = self.model.training
        scores = self.args.scores_tokens if training else self._measures_evaluation
        self._problems = None if training else [evaluation.fingerprint(row) for row in inputs]
        self._recorded = [] if scores else None
        columns: dict[str, list[Any]] = {}
        try:
            output = super().generate_and_score_completions(inputs)
            hidden_clean = self._take_recorded(output)
            if scores:
                output, columns = (self._shape if training else self._measure)(output, hidden_clean)
        finally:
            self._recorded, self._generated, self._problems = None, [], None
        self._keep_completions(columns)
        return output

    @torch.no_grad()
    def _shape(
        self, output: dict[str, Any], hidden_clean: Tensor | None
    ) -> tuple[dict[str, Any], dict[str, list[Any]]]:
        """A generation batch with token mask and trajectory factor in its advantages; and its table's columns."""
        started = time.perf_counter()
        batch = Batch(output)
        seen = bool(self.accelerator.gather(batch.has_image).any())
        self._watch.step(self.state.global_step, seen, every=self.state.logging_steps)
        scored = batch.has_image & (self._live_groups(output["advantages"]) | self.args.method.penalizes)
        alike = batch.alike(self._prompts(batch))
        found = self._measure_tokens(batch, scored, hidden_clean, alike) if self.args.perturbs else None
        scores = self._token_scores(batch, scored, found, alike)
        group = dist.group.WORLD if self.accelerator.num_processes > 1 else None
        stats = trajectory_stats(scores, batch.mask & scored.unsqueeze(1), stats_group=group)
        scaled_later = self.args.tas_statistics == "micro-batch"
        if self._packs(batch, View(alike), compared="old_per_token_logps" in output):
            output["prompt"] = torch.tensor(alike, device=batch.prompt_ids.device)
        if self.args.method.penalizes:
            output["view"] = torch.tensor(self.shown.keys, device=batch.prompt_ids.device)
        shaped = shape_advantages(
            output["advantages"],
            scores,
            batch.mask,
            has_image=scored,  # groups without a signal have zero advantages: nothing to filter or to scale
            stats=TrajectoryStats(0.0, 0.0, 0.0, 0) if scaled_later else stats,
            **self.args.shaping,
        )
        if found is not None and self.args.method.token_weights:
            shaped = self._weighed(shaped, found.outputs, batch.mask & scored.unsqueeze(1))
        if scaled_later:
            # NaN marks what enters no statistic; so 0 / 0 is right for a row without response tokens
            output["trajectory_dependency"] = torch.where(scored, scores.sum(1) / batch.mask.sum(1), math.nan)
        dependency, stderr = (None, None) if found is None else (found.outputs.divergence, found.stderr)
        measured = Measured.gather(self.accelerator, dependency, batch.mask, shaped.keep, scored, stderr)
        self._log_scoring(measured, started)
        if self.args.method.filters and found is not None:
            self._watch.kept(measured, self.args.keep_ratio)
        columns = measured.columns()
        for name, value in measured.metrics().items():
            self.metrics_of("train")[name].append(value)
        if not scaled_later:
            factors = self.accelerator.gather(torch.where(scored, shaped.alpha, math.nan))
            columns["alpha"] = factors.tolist()
            factors = factors[~factors.isnan()]
            if len(factors):
                self._log_factors(factors)
        return {**output, "advantages": shaped.advantages}, columns

    @torch.no_grad()
    def _measure(
        self, output: dict[str, Any], hidden_clean: Tensor | None
    ) -> tuple[dict[str, Any], dict[str, list[Any]]]:
        """Measure the dependency of an evaluation batch, whatever its rewards; its advantages stay as they are."""
        started = time.perf_counter()
        batch = Batch(output)
        tokens = batch.mask & batch.has_image.unsqueeze(1)
        alike, keep = batch.alike(self._prompts(batch)), tokens
        found = self._measure_tokens(batch, batch.has_image, hidden_clean, alike)
        dependency, method, gate = found.outputs.divergence, self.args.method, self.args.shaping
        if method.filters:
            scores = self._token_scores(batch, batch.has_image, found, alike)
            keep = topk_mask(scores, tokens, gate["keep_ratio"], keep_threshold=gate["keep_threshold"])
        elif method.token_weights:
            keep = tokens & (method.load_token_weights()(found.outputs, tokens) != 0)
        measured = Measured.gather(self.accelerator, dependency, batch.mask, keep, batch.has_image, found.stderr)
        self._measured.append(measured)
        self._log_scoring(measured, started)
        return output, measured.columns()

    def _weighed(self, shaped: Shaped, outputs: DivergenceOutput, tokens: Tensor) -> Shaped:
        """With the algorithm's own weights multiplied into the advantages of the scored tokens."""
        weights = self.args.method.load_token_weights()(outputs, tokens)
        if weights.shape != tokens.shape:
            raise ValueError(
                f"token_weights: got shape {list(weights.shape)} of {self.args.method.token_weights!r}, takes "
                f"{list(tokens.shape)}"
            )
        weights = torch.where(tokens, weights.to(shaped.advantages), 1)
        return shaped._replace(advantages=shaped.advantages * weights, keep=shaped.keep & (weights != 0))

    def _live_groups(self, advantages: Tensor) -> Tensor:
        """`[B]` bool: rows of prompts whose rollouts do not all have zero advantage, also across processes."""
        everyone = self.accelerator.gather(advantages)
        live = (everyone.view(-1, self.num_generations) != 0).any(1).repeat_interleave(self.num_generations)
        first = self.accelerator.process_index * len(advantages)
        return live[first : first + len(advantages)]

    def _log_scoring(self, measured: Measured, started: float) -> None:
        """The time it took; and a warning if the perturbed view changed nothing."""
        if measured.kept.is_cuda:
            torch.cuda.synchronize(measured.kept.device)
        self.metrics_of()["vppo/seconds_scoring"].append(time.perf_counter() - started)
        if measured.values is not None:
            self._watch.dependency(measured.values)
