"""TRL's GRPO trainer whose checkpoints can be gone on from, and whose model card tells what was run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vppo.card import METHODS, corrected
from vppo.checkpoints import check_resuming, check_saving, restore_weights
from vppo.config import VPPOConfig
from vppo.files import write_atomic
from vppo.monitoring.logged_trainer import LoggedTrainer
from vppo.sampler import EpochSampler


class SavedTrainer(LoggedTrainer):
    """`LoggedTrainer` that resumes as if it had not been stopped; see `vppo.checkpoints` and `vppo.card`.

    Raises:
        ValueError: Checkpoints would fall between two updates from the same rollouts, which they do not hold.
    """

    args: VPPOConfig

    def __init__(self, model: Any, reward_funcs: Any, args: VPPOConfig, **kwargs: Any) -> None:
        check_saving(args)
        method = METHODS[args.algorithm]
        self._name, self._paper = method.name, method.paper or super()._paper
        self._tag_names = ["trl", "vppo" if args.scores_tokens else args.algorithm]
        super().__init__(model, reward_funcs, args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """transformers' own restores next to nothing of a vision-language model: see `restore_weights`."""
        if self.is_fsdp_enabled or not restore_weights(self.model, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _get_train_sampler(self, dataset: Any = None) -> EpochSampler:
        return EpochSampler(super()._get_train_sampler(dataset))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and not self.is_deepspeed_enabled:
            check_resuming(checkpoint, self.args)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        """transformers' own would leave most of the last weights in place, as it does on resuming."""
        in_pieces = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if in_pieces or not restore_weights(self.model, str(self.state.best_model_checkpoint)):
            super()._load_best_model()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's, corrected: see `vppo.card`."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            card = Path(str(self.args.output_dir)) / "README.md"
            text = card.read_text(encoding="utf-8")
            write_atomic(card, corrected(text, self.model.config, self.args, self.hub_model_id))
