"""VPPO as a thin subclass of TRL's GRPO trainer.

TRL generates, scores and optimises. This class steps in when the rollouts have their advantages: it measures how much
every response token depends on the image, and folds filtering and shaping into per-token advantages, which TRL's
clipped losses take as they are. The released recipe also adds its penalty to the loss.

Everything else is in the classes below, one concern each: `trl_seams.TRLTrainer` (TRL's private names), `LoggedTrainer`
(metrics and completions), `SavedTrainer` (checkpoints), `ListeningTrainer` (hidden states from TRL's own passes),
`SampledTrainer` (vLLM), `RolloutTrainer` (images and rewards), `PackedTrainer` (prompts shared in training passes),
`TwoViewTrainer` (training passes over both views).
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vppo.batch import Batch, View
from vppo.config import VPPOConfig
from vppo.heads import LogitOptions, logit_options
from vppo.loading import own_processor
from vppo.monitoring import evaluation
from vppo.monitoring.measured import Measured, spread
from vppo.perturbations import seeded
from vppo.prefix_sharing import GIB, ResponsePasses, quiet
from vppo.scoring import Scores, entropies, measure
from vppo.sight import ImageWatch
from vppo.two_view_trainer import TwoViewTrainer
from vppo.views import ImageViews
from vppo_kernels import TrajectoryStats, topk_mask, trajectory_scale, trajectory_stats
from vppo_kernels.shaping import Shaped, shape_advantages
from vppo_kernels.statistics import DivergenceOutput

RANDOM_TOKENS = 1 << 31  # beside seed, step, prompt and rollout: the stream of random scores


class VPPOTrainer(TwoViewTrainer):
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
        self._problems: list[int] | None = None  # while a batch is evaluated, the fingerprint of each row's problem
        self._watch = ImageWatch(args.algorithm)
        self._sampled_at = 0  # optimizer steps done when the batch at hand was sampled
        if args.method.score == "given" and type(self).token_scores is VPPOTrainer.token_scores:
            raise ValueError(
                f"args: got algorithm {args.algorithm!r}, takes it of a subclass whose token_scores says which tokens "
                "carry gradient"
            )
        if kwargs.get("processing_class") is None:
            kwargs["processing_class"] = own_processor(model, args)
        super().__init__(model, reward_funcs, args, **kwargs)
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
                self.model,
                sharing=args.prefix_sharing,
                memory=int(args.scoring_memory * GIB),
                max_over_ranks=self.max_over_ranks,
            )

    # -- after the rollouts ------------------------------------------------------------------------------------------

    def generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's; then dependency is measured and, in training, folded into the advantages."""
        training = self.model.training
        if training:
            self._sampled_at = self.state.global_step
        scores = self.args.scores_tokens if training else self._measures_evaluation
        self._problems = None if training else [evaluation.fingerprint(row) for row in inputs]
        self._recorded = [] if scores else None
        columns: dict[str, list[Any]] = {}
        try:
            output = super().generate_and_score_completions(inputs)
            hidden_clean = self._take_recorded(output)
            if scores:
                output, columns = (self._fold if training else self._measure)(output, hidden_clean)
        finally:
            self._recorded, self._generated, self._problems = None, [], None
        self._keep_completions(columns)
        return output

    @torch.no_grad()
    def _fold(self, output: dict[str, Any], hidden_clean: Tensor | None) -> tuple[dict[str, Any], dict[str, list[Any]]]:
        """Fold token mask and trajectory factor into the advantages of a generation batch; and its table's columns."""
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
        folded_later = self.args.tas_statistics == "micro-batch"
        if self._packs(batch, View(alike), compared="old_per_token_logps" in output):
            output["prompt"] = torch.tensor(alike, device=batch.prompt_ids.device)
        if self.args.method.penalizes:
            output["view"] = torch.tensor(self.shown.keys, device=batch.prompt_ids.device)
        shaped = shape_advantages(
            output["advantages"],
            scores,
            batch.mask,
            has_image=scored,  # groups without a signal have zero advantages: nothing to filter or to scale
            stats=TrajectoryStats(0.0, 0.0, 0.0, 0) if folded_later else stats,
            **self.args.shaping,
        )
        if found is not None and self.args.method.token_weights:
            shaped = self._weighed(shaped, found.outputs, batch.mask & scored.unsqueeze(1))
        if folded_later:
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
        if not folded_later:
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

    def token_scores(self, batch: Batch, scored: Tensor) -> Tensor:
        """What an algorithm filters tokens by whose score is "given", as "oracle": a subclass overrides it.

        Args:
            batch: The rows that were sampled, of this process.
            scored: `[B]` bool, the rows that are to be scored.

        Returns:
            `[B, T]` floating; the response tokens whose score is above 0 carry gradient.
        """
        raise NotImplementedError(
            f"algorithm {self.args.algorithm!r} takes its scores from token_scores of a subclass of the trainer"
        )

    def _token_scores(self, batch: Batch, scored: Tensor, found: Scores | None, alike: Sequence[int]) -> Tensor:
        """`[B, T]` what tokens are filtered and trajectories shaped by; `found` is what the two views have said."""
        kind = self.args.method.score
        if kind == "given":
            return self.token_scores(batch, scored)
        if kind == "random":
            return self._random_scores(batch)
        if kind == "entropy":
            return self._entropies(batch, scored, alike) if found is None else found.outputs.entropy
        assert found is not None
        return found.outputs.divergence

    def _random_scores(self, batch: Batch) -> Tensor:
        """`[B, T]` in [0, 1), drawn by (seed, step, prompt, rollout) and one number more, which no view is drawn by."""
        width, keys = batch.mask.shape[1], self._keys(batch)
        rows = [torch.rand(width, generator=seeded(self.args.seed, *key, RANDOM_TOKENS)) for key in keys]
        return torch.stack(rows).to(batch.mask.device)

    def _entropies(self, batch: Batch, scored: Tensor, alike: Sequence[int]) -> Tensor:
        """`[B, T]` of the policy in nats, by a pass of the clean view."""
        with quiet(self.model), self.accelerator.autocast():
            rows, check = scored.nonzero().flatten().tolist(), self.args.check_kernels
            return entropies(self._passes, batch, rows, View(alike), options=self._logit_options, check=check)

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

    def _measure_tokens(
        self, batch: Batch, scored: Tensor, hidden_clean: Tensor | None, alike: Sequence[int]
    ) -> Scores:
        """What both views say of these rows' response tokens; `alike` is of `Batch.alike`."""
        rows = scored.nonzero().flatten().tolist()
        with quiet(self.model), self.accelerator.autocast():
            return measure(
                self._passes,
                batch,
                rows,
                *self._views(batch, rows, alike),
                kind=str(self.args.divergence),
                options=self._logit_options,
                hidden_clean=hidden_clean,
                check=self.args.check_kernels,
            )

    @property
    def _logit_options(self) -> LogitOptions:
        return logit_options(self.accelerator.unwrap_model(self.model), self.temperature)

    def _live_groups(self, advantages: Tensor) -> Tensor:
        """`[B]` bool: rows of prompts whose rollouts do not all have zero advantage, also across processes."""
        everyone = self.accelerator.gather(advantages)
        live = (everyone.view(-1, self.num_generations) != 0).any(1).repeat_interleave(self.num_generations)
        first = self.accelerator.process_index * len(advantages)
        return live[first : first + len(advantages)]

    def _views(self, batch: Batch, rows: Sequence[int], alike: Sequence[int]) -> tuple[View, View]:
        """The clean view and the perturbed one, drawn by (seed, step, prompt) or (seed, step, prompt, rollout).

        Of several draws the others have their number behind that; see `measure` for how they lie in the view. Rollouts
        of a prompt that were shown other images, as by a tool, have a view of their own from the same draw. In
        evaluation the problem's own content takes the place of step and prompt, so that evaluations can be compared.
        """
        each, drawn_by = self.args.perturbation_scope == "rollout", self._keys(batch)
        one = list(range(len(batch))) if each else alike
        keys = [draw * len(batch) + key for draw in range(self.args.draws) for key in one]
        pixels: dict[int, Tensor] = {}
        pictures, self._pictures = self._pictures, []  # whole photographs are kept no longer than they are needed
        for draw, row in itertools.product(range(self.args.draws), rows):
            key = keys[draw * len(batch) + row]
            if key not in pixels:
                *which, rollout = drawn_by[row]
                which += [rollout] * each + [draw] * (draw > 0)
                generator = seeded(self.args.seed, *which)
                pixels[key] = self._image_views.perturbed(batch, row, pictures[row], self._perturbation, generator)
        perturbed = View(keys, pixels)
        if self.args.method.penalizes and self._problems is None:
            self.show_in_training(batch, perturbed)
        return View(alike), perturbed

    def _keys(self, batch: Batch) -> list[tuple[int, int, int]]:
        """Of each row: step, prompt and rollout. In evaluation the problem takes the place of step and prompt."""
        first, step = self.accelerator.process_index * len(batch), self.state.global_step
        prompts = [(step, prompt) for prompt in self._prompts(batch)]
        if self._problems is not None:
            prompts = [(evaluation.KEY, problem) for problem in self._problems]
        return [(*prompt, (first + row) % self._group_size) for row, prompt in enumerate(prompts)]

    def _log_scoring(self, measured: Measured, started: float) -> None:
        """The time it took; and a warning if the perturbed view changed nothing."""
        if measured.kept.is_cuda:
            torch.cuda.synchronize(measured.kept.device)
        self.metrics_of()["vppo/seconds_scoring"].append(time.perf_counter() - started)
        if measured.values is not None:
            self._watch.dependency(measured.values)

    def _log_factors(self, factors: Tensor) -> None:
        """Of the trajectories that were scored."""
        log = self.metrics_of("train")
        for name, value in spread(factors).items():
            log[f"vppo/alpha_{name}"].append(value)

    # -- in the loss -------------------------------------------------------------------------------------------------

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
        """Factors of the released code: minimum and maximum of this device's mini-batch, mean of this micro-batch."""
        window = torch.cat([micro_batch["trajectory_dependency"] for micro_batch in self.accumulated()])
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
