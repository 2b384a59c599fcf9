"""TRL's GRPO trainer whose checkpoints can be gone on from, and whose model card tells what was run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from vppo import manifest
from vppo.card import PAPERS, corrected
from vppo.checkpoints import (
    check_resuming,
    check_saving,
    drop_older,
    last_complete_checkpoint,
    named_checkpoint,
    restore_weights,
)
from vppo.config import VPPOConfig
from vppo.errors import InputError
from vppo.files import write_atomic, writing
from vppo.monitoring.logged_trainer import LoggedTrainer
from vppo.preemption import StopOnSigterm
from vppo.processes import on_first
from vppo.sampler import EpochSampler

logger = get_logger(__name__)


class SavedTrainer(LoggedTrainer):
    """`LoggedTrainer` that resumes as if it had not been stopped; see `vppo.checkpoints` and `vppo.card`.

    Raises:
        ValueError: Checkpoints would fall between two updates from the same rollouts, which they do not hold.
    """

    args: VPPOConfig

    def __init__(self, model: Any, reward_funcs: Any, args: VPPOConfig, **kwargs: Any) -> None:
        check_saving(args)
        method = args.method
        paper = None if method.paper is None else PAPERS[method.paper]
        self.describe_method(method.title, paper, ["trl", method.paper or method.name])
        super().__init__(model, reward_funcs, args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """transformers', where True is the newest checkpoint that is whole: the same on every process."""
        asked = resume_from_checkpoint
        checkpoint = on_first(lambda: self._whole(asked)) if asked else None
        try:
            return super().train(checkpoint, *args, **kwargs)
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, StopOnSigterm):
                    callback.release()

    def init_training_state(self, max_steps: int, steps_per_epoch: int, epochs: int, *resumed: Any) -> tuple[int, int]:
        """transformers', which makes one step more of a run that has made all of them."""
        done = super().init_training_state(max_steps, steps_per_epoch, epochs, *resumed)
        return (epochs, 0) if self.state.global_step >= max_steps else done

    def _whole(self, asked: str | bool) -> str:
        if asked is True:
            newest = last_complete_checkpoint(str(self.args.output_dir))
            if newest is None:
                raise InputError(f"resume_from_checkpoint: no checkpoint in {self.args.output_dir} is whole")
            return str(newest)
        return str(named_checkpoint(str(asked)))

    def save_checkpoint(self, model: Any, trial: Any) -> None:
        """TRL's; then, when every process is done, the list of what was saved. Older ones go only after that."""
        folder = self.run_folder(trial) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with writing(folder, "make room, and go on with resume from the checkpoint before it"):
                if self.args.should_save:
                    manifest.begin(folder)
                super().save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    manifest.finish(folder)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            drop_older(folder, limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()  # a process that ends early has a launcher end the others

    def load_rng_state(self, checkpoint: str | None) -> None:
        """transformers' passes over a random state that is not there."""
        world = self.args.world_size
        if checkpoint is not None and not self.args.save_on_each_node:
            saved = len(list(Path(checkpoint).glob("rng_state*.pth")))
            if saved != world:
                logger.warning(
                    f"{checkpoint} was saved by {saved} processes, and {world} go on from it: with other random "
                    "numbers, and so with other rollouts"
                )
        super().load_rng_state(checkpoint)

    def load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """transformers' own restores next to nothing of a vision-language model: see `restore_weights`."""
        if self.is_fsdp_enabled or not restore_weights(self.model, resume_from_checkpoint):
            super().load_from_checkpoint(resume_from_checkpoint, model)

    def get_train_sampler(self, dataset: Any = None) -> EpochSampler:
        return EpochSampler(super().get_train_sampler(dataset))

    def load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and not self.is_deepspeed_enabled:
            check_resuming(checkpoint, self.args)
        given = self._initial_rate()
        super().load_optimizer_and_scheduler(checkpoint)
        if given != (kept := self._initial_rate()):
            logger.warning(
                f"learning_rate: got {given}, which has no effect: the run goes on with the optimizer of {checkpoint}, "
                f"whose learning rate is {kept}; give the folder as model to begin with its weights alone"
            )

    def _initial_rate(self) -> float | None:
        """Of the optimizer, before its schedule; None where there is none to ask."""
        groups = getattr(self.optimizer, "param_groups", None) or [{}]
        rate: float | None = groups[0].get("initial_lr")
        return rate

    def load_best_model(self) -> None:
        """transformers' own would leave most of the last weights in place, as it does on resuming."""
        in_pieces = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if in_pieces or not restore_weights(self.model, str(self.state.best_model_checkpoint)):
            super().load_best_model()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's, corrected: see `vppo.card`."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            card = Path(str(self.args.output_dir)) / "README.md"
            text = card.read_text(encoding="utf-8")
            write_atomic(card, corrected(text, self.model.config, self.args, self.hub_model_id))
