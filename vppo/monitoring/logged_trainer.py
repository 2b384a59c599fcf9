"""TRL's GRPO trainer with completions and metrics of training and of evaluation kept apart."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console

from vppo.monitoring import loggers
from vppo.monitoring.completion_view import FEW, chosen, show
from vppo.monitoring.completions import CompletionLog, plain_text
from vppo.monitoring.evaluation import random_numbers
from vppo.monitoring.measured import Measured
from vppo.trl_seams import TRLTrainer


class LoggedTrainer(TRLTrainer):
    """`TRLTrainer` whose evaluations change nothing in training, and whose completion tables are of one kind each.

    TRL keeps the completions of training and evaluation in one list of the size of a generation, writes both to the
    same file, and averages an evaluation's metrics over its batches, the last and smaller one like the others. Here an
    evaluation draws from random numbers of its own, always the same; its rewards and what `_measured` holds are taken
    over all of its rows; and its completions have a table of their own.

    A subclass calls `_keep_completions` after each generation.
    """

    num_generations: int
    num_generations_eval: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._generated_rows: dict[str, Any] = {  # of the last generation; taken over at once
            **{name: [] for name in ("images", "prompt", "completion", "advantages")},
            **{name: defaultdict(list) for name in ("rewards", "extra")},
        }
        self.take_logs(self._generated_rows)
        size = int(self.args.generation_batch_size)
        pictured = self.log_completions and self.log_multimodal and self.accelerator.is_main_process
        # prompts hold their images; TRL would gather them once more, and wait for ever for a process that has none
        self.log_multimodal = False
        images = size if pictured and set(loggers.WITH_IMAGES) & set(self.args.report_to) else 0
        names = self.reward_func_names
        self._completions = {
            "train": CompletionLog(names, rows=size, images=images),
            "eval": CompletionLog(names, rows=None, images=images),
        }
        self._measured: list[Measured] = []  # of each batch of an evaluation
        self._evaluation = "eval"  # how the latest one is called

    def _keep_completions(self, columns: dict[str, list[Any]]) -> None:
        """Takes a generation's completions over, with further columns of one value per completion of all processes."""
        self._completions["train" if self.model.training else "eval"].add(self._generated_rows, columns)

    def evaluation_loop(  # as transformers has it
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """TRL's, with random numbers of its own; then the metrics that are taken over all rows."""
        completions, metrics = self._completions["eval"], self.metrics_of("eval")
        completions.keep(0)
        metrics.clear()
        self._measured, self._evaluation = [], metric_key_prefix
        with random_numbers(self.args.seed, self.accelerator.device):
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        # accelerate fills the last batches of all processes up with the first problems
        rows = len(dataloader.dataset) * self.num_generations_eval if hasattr(dataloader.dataset, "__len__") else None
        completions.keep(len(completions.rows) if rows is None else rows)
        whole = {
            **completions.reward_metrics(self.reward_weights.tolist()),
            **Measured.join(self._measured, rows).metrics(),
        }
        metrics.update({name: [value] for name, value in whole.items()})
        if name := metric_key_prefix.removeprefix("eval").strip("_"):  # of several sets; TRL puts "eval_" before it
            for key in list(metrics):
                metrics[f"{name}_{key}"] = metrics.pop(key)
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, with completion tables of our own: see `vppo.monitoring.completions` and `vppo.monitoring.loggers`."""
        wanted, self.log_completions = self.log_completions, False
        try:
            super().log(logs, start_time)
        finally:
            self.log_completions = wanted
        if wanted and self.accelerator.is_main_process and "train_runtime" not in logs:
            self._log_completions("train" if self.model.training else "eval")

    def _log_completions(self, mode: str) -> None:
        """To the terminal, to a parquet file, and to the loggers."""
        completions, step = self._completions[mode], int(self.state.global_step)
        rows, args = completions.rows, self.args
        if not rows:
            return
        training = mode == "train"
        name = "completions" if training else f"{self._evaluation}_completions"
        completions.write(Path(str(args.output_dir)) / "completions" / f"{name}_{step:05d}.parquet", step)

        if training:
            printed = chosen(rows, self.num_completions_to_print, step)
        else:  # the same ones at every evaluation
            printed = rows[: FEW if self.num_completions_to_print is None else self.num_completions_to_print]
        some = "" if len(printed) == len(rows) else f", {len(printed)} of {len(rows)} completions"
        show(Console(), printed, f"Step {step}{'' if training else f', {self._evaluation}'}{some}")

        shown, pictures = rows[: int(args.generation_batch_size)], completions.pictures()
        if self.log_unique_prompts:
            first = {str(plain_text(row["prompt"])): index for index, row in reversed(list(enumerate(shown)))}
            kept = sorted(first.values())
            shown, pictures = [shown[i] for i in kept], [pictures[i] for i in kept] if pictures else []
        key = name if training else f"{self._evaluation}/completions"
        loggers.log_completions(args.report_to, self.callback_handler.callbacks, key, step, shown, pictures)
