"""What a person sees while a model works, and the lines that are kept of it."""

from __future__ import annotations

import atexit
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vppo.errors import InputError
from vppo.files import make_folder, write_atomic

logger = logging.getLogger(__name__)

# what the bar shows: a title, and the first of these keys that was logged
SHOWN = {
    "reward": ("reward",),
    "accuracy": ("rewards/accuracy_reward/mean",),
    "dependency": ("vppo/dependency_mean",),
    "kept": ("vppo/kept_fraction",),
}


def _is_timing(key: str) -> bool:
    return "seconds" in key or "per_second" in key or key.endswith(("_time", "_runtime"))


def keep_lines(path: Path, last_step: int) -> None:
    """Drop the lines after `last_step` from a file of one JSON object a step, and what a crash left of a line.

    The latter is said, since nobody asked for it.
    """
    if not path.exists():
        return
    content = path.read_bytes()
    lines = list(_lines(path, content, cut_short=True))
    rest = content[sum(len(line) for line, _ in lines) :]
    if rest:
        logger.warning(f"{path}, line {len(lines) + 1}: was cut short and is dropped: {_start(rest)}")
    write_atomic(path, b"".join(line.rstrip(b"\n") + b"\n" for line, row in lines if row["step"] <= last_step))


def read_lines(path: Path, *, cut_short: bool = False) -> list[dict[str, Any]]:
    """The JSON objects of a file that `TrainingProgress` wrote; none if there is no file.

    Args:
        path: The file.
        cut_short: Whether the last line may be half of one, as a crash leaves it, and is left out then.

    Raises:
        InputError: A line is no such object; the message names file and line.
    """
    return [row for _, row in _lines(path, path.read_bytes(), cut_short=cut_short)] if path.exists() else []


def _lines(path: Path, content: bytes, *, cut_short: bool) -> Iterator[tuple[bytes, dict[str, Any]]]:
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield line, row
        elif not cut_short or line.endswith(b"\n"):
            raise InputError(f"{path}, line {number}: is no step of a run: {_start(line)}; remove that line")


def _start(line: bytes) -> str:
    return repr(line[:60].decode(errors="replace").rstrip("\n"))


def columns() -> list[ProgressColumn]:
    """What every bar shows: what is done, how much of it, and the time left."""
    return [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    ]


def say(console: Console, text: str) -> None:
    """Prints text as it is: a folder may be called `[red]` or `:smile:`, and a path is one word to copy."""
    console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)


def quieten() -> None:
    """Hide what a user cannot act on: progress bars of loading and saving, advice on configuration."""
    import logging
    import warnings

    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(torch|transformers|trl|accelerate)\b")


class _Bar(Progress):
    """A bar with a line of numbers below it, so that both fit a terminal of 80 columns."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        yield from (Text(task.fields["numbers"], style="cyan") for task in self.tasks if task.fields["numbers"])


class TrainingProgress(TrainerCallback):
    """A live progress bar, a line a logged step in `metrics.jsonl`, and its timings in `timings.jsonl` beside it.

    Times are kept apart so that two runs of the same seed write the same `metrics.jsonl`, byte for byte. A resumed run
    first drops the lines after the step that it resumes from.

    Args:
        metrics_path: Where the lines go.
        console: Where the bar goes; a new one on standard output if None.
    """

    def __init__(self, metrics_path: Path, console: Console | None = None) -> None:
        self.metrics_path = metrics_path
        self.timings_path = metrics_path.with_name("timings.jsonl")
        self._progress = _Bar(*columns(), console=console or Console())
        self._task: TaskID | None = None
        self._evaluating: TaskID | None = None
        self._numbers = {"train": "", "eval": ""}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        make_folder(self.metrics_path.parent)
        for path in (self.metrics_path, self.timings_path):
            keep_lines(path, state.global_step)
        self._task = self._progress.add_task("training", total=state.max_steps, completed=state.global_step, numbers="")
        self._progress.start()
        atexit.register(self._progress.stop)  # gives the terminal its cursor back if training fails

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or self._task is None or not logs or "train_runtime" in logs:
            return
        values = {key: _plain(value) for key, value in logs.items()}
        timings = {key: value for key, value in values.items() if _is_timing(key)}
        metrics = {key: value for key, value in values.items() if key not in timings}
        _append(self.metrics_path, {"step": state.global_step, **metrics})
        _append(self.timings_path, {"step": state.global_step, **timings})
        evaluated = any(key.startswith("eval_") for key in values)
        self._numbers["eval" if evaluated else "train"] = (
            f"evaluated at step {state.global_step}: {_numbers(values, 'eval_')}" if evaluated else _numbers(values)
        )
        numbers = "\n".join(filter(None, self._numbers.values()))
        self._progress.update(self._task, completed=state.global_step, numbers=numbers)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or self._task is None:
            return
        if self._evaluating is None:
            batches: Any = kwargs.get("eval_dataloader")
            total = len(batches) if hasattr(batches, "__len__") else None
            self._evaluating = self._progress.add_task("evaluating", total=total, numbers="")
        self._progress.advance(self._evaluating)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._evaluating is not None:
            self._progress.remove_task(self._evaluating)
            self._evaluating = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._progress.stop()


def _numbers(values: dict[str, Any], prefix: str = "") -> str:
    parts = []
    for title, keys in SHOWN.items():
        value = next((values[prefix + key] for key in keys if values.get(prefix + key) is not None), None)
        parts.append(f"{title} {'-' if value is None else format(value, '.3f')}")
    return "  ".join(parts)


def _plain(value: Any) -> Any:
    """Numbers as JSON has them: NaN and infinity become null."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _append(path: Path, row: dict[str, Any]) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        error.filename = str(path)  # a full disk does not say of what
        raise
