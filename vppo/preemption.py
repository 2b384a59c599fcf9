"""What a run does when it is told to end, as a cluster does before it takes a machine away."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from vppo.checkpoints import updates_per_rollouts

EXIT_CODE = 128 + signal.SIGTERM  # 143: how shells and schedulers write that a process was ended by SIGTERM


class StopOnSigterm(TrainerCallback):
    """Ends training at SIGTERM as if it had been killed right after a checkpoint: it saves one, and stops.

    The checkpoint is made after the optimizer step at hand, or, where several use the same rollouts, after
    the last of those. One process that was told is enough: all agree on the step. Without it, and before and after
    training, SIGTERM does what it did before.

    Example:

        stop = StopOnSigterm()
        trainer = VPPOTrainer(..., callbacks=[stop])
        trainer.train()
        if stop.stopped:
            sys.exit(EXIT_CODE)  # go on with trainer.train(resume_from_checkpoint=True)

    Attributes:
        stopped: Whether the latest training ended by SIGTERM.
        saved: Whether it then saved a checkpoint: not with save_strategy "no".
    """

    def __init__(self) -> None:
        self.stopped = self.saved = False
        self._told = False
        self._before: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.stopped = self.saved = self._told = False
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            self._before = signal.signal(signal.SIGTERM, self._tell)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        between = state.global_step % updates_per_rollouts(args) and state.global_step < state.max_steps
        if not self._anyone_told(args.device) or between:
            return
        self.stopped, self.saved = True, args.save_strategy != "no"
        control.should_training_stop, control.should_save = True, self.saved
        if self.saved:
            args.save_strategy = SaveStrategy.STEPS  # "best" would leave it to an evaluation of this step
        args.load_best_model_at_end = False  # this is not the end of the run,
        if args.save_total_limit == 1:  # where transformers would keep the best checkpoint alone
            args.save_total_limit = 2

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.release()

    def release(self) -> None:
        """Gives SIGTERM back to whoever had it before training."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _tell(self, number: int, frame: FrameType | None) -> None:
        if not self._told:
            with suppress(OSError):  # not print: the signal may have come in the middle of one
                os.write(2, b"\nSIGTERM: ending after this step\n")
        self._told = True

    def _anyone_told(self, device: torch.device) -> bool:
        if not dist.is_initialized():
            return self._told
        told = torch.tensor(int(self._told), device=device)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        return bool(told)
