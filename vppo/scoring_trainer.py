"""TRL's GRPO trainer that scores the tokens of its rollouts: by two views of the image, or as a control does."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vppo.batch import Batch, View
from vppo.heads import LogitOptions, logit_options
from vppo.loss_trainer import LossTrainer
from vppo.monitoring import evaluation
from vppo.perturbations import seeded
from vppo.prefix_sharing import GIB, ResponsePasses, quiet
from vppo.scoring import Scores, entropies, measure
from vppo.views import ImageViews

RANDOM_TOKENS = 1 << 31  # beside seed, step, prompt and rollout: the stream of random scores


class ScoringTrainer(LossTrainer):
    """`LossTrainer` that can score the tokens of a batch, where the algorithm does so or there are evaluations.

    While a batch is evaluated, a subclass sets `_problems`: by them the views are drawn then.

    Raises:
        ValueError: The processor is a plain tokenizer: there is no image to look at.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._problems: list[int] | None = None  # while a batch is evaluated, the fingerprint of each row's problem
        super().__init__(*args, **kwargs)
        image_processor = getattr(self.processing_class, "image_processor", None)
        self._measures_evaluation = image_processor is not None and (
            self.args.scores_tokens or self.eval_dataset is not None
        )
        if not (self.args.scores_tokens or self._measures_evaluation):
            return
        if image_processor is None:
            raise ValueError(
                f"processing_class: got {type(self.processing_class).__name__}, takes a processor with an image "
                f"processor for algorithm {self.args.algorithm!r}"
            )
        self._image_views = ImageViews.of(self.processing_class)
        self._perturbation = self.args.make_perturbation(self._image_views.layout.patch_size)
        self._passes = ResponsePasses(
            self.model,
            sharing=self.args.prefix_sharing,
            memory=int(self.args.scoring_memory * GIB),
            max_over_ranks=self.max_over_ranks,
        )

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
