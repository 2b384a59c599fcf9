"""Whether a run has any image to look at, and whether its model sees when the image changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from accelerate.logging import get_logger
from datasets import Dataset
from torch import Tensor

from vppo.monitoring.measured import UNSEEN, Measured

logger = get_logger(__name__)
COLUMNS = ("images", "image")  # where TRL looks, in this order
BLIND = 1e-8  # nats: below this mean dependency the perturbed view has changed nothing
PATIENCE = 10  # generation batches: what the first of them say of a run is luck
MOST = 0.5  # of the kept tokens: if more of them do not look at the image, too many are kept


def missing_images(dataset: Any) -> str:
    """Why no row of a data set shows an image; "" where one does, or where that cannot be known without reading it.

    Args:
        dataset: With a column `images` (lists of them) or `image`, or with images among the parts of its `prompt`.
    """
    if not isinstance(dataset, Dataset):
        return ""
    name = next((name for name in COLUMNS if name in dataset.column_names), None)
    if (name is not None and _in_column(dataset, name)) or _in_prompts(dataset):
        return ""
    if name is not None:
        return f"its column {name!r} is empty in all of its {len(dataset)} rows"
    return f"it has neither of the columns 'images' and 'image', only {dataset.column_names}"


def _in_column(dataset: Dataset, name: str) -> bool:
    """Reads no picture, and no further than the first row that has one."""
    for table in dataset.select_columns([name]).with_format("arrow").iter(batch_size=1000):
        column = table[name]
        if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            found = pc.any(pc.greater(pc.list_value_length(column), 0)).as_py()
        else:
            found = column.null_count < len(column)
        if found:
            return True
    return False


def _in_prompts(dataset: Dataset) -> bool:
    if "prompt" not in dataset.column_names:
        return False
    for row in dataset.select_columns(["prompt"]):
        if isinstance(row["prompt"], str):
            return False
        contents = [message["content"] for message in row["prompt"] if isinstance(message.get("content"), list)]
        if any(part.get("type") == "image" for content in contents for part in content):
            return True
    return False


class ImageWatch:
    """Warns once if a run shows its model no image, and once if perturbing the image changes nothing.

    Args:
        algorithm: Of the run.
        warn: Takes a warning; None for accelerate's logger, which speaks once of all processes.
    """

    def __init__(self, algorithm: str, warn: Callable[[str], None] | None = None) -> None:
        self._warn = logger.warning if warn is None else warn
        self._warned = self._warned_blind = self._warned_kept = False
        self._batches = self._tokens = self._kept = self._unseen = 0  # with an image, of the run as yet
        self._last: int | None = None  # the step at which a batch has last shown one
        self._consequence = (
            f"No token can depend on an image then: algorithm {algorithm!r} filters and shapes nothing, and trains as "
            "'dapo' does."
        )

    def dataset(self, dataset: Any) -> None:
        """Looks at what a run is trained on; see `missing_images`."""
        if reason := missing_images(dataset):
            self._warned = True
            self._warn(f"train_dataset: no row shows an image: {reason}. {self._consequence}")

    def step(self, step: int, shown: bool, every: float) -> None:
        """Looks at one generation batch of all processes.

        Args:
            step: Optimizer steps done.
            shown: Whether a process was shown an image.
            every: After how many steps without one it warns: those that a line of the log covers.
        """
        if self._last is None or shown:
            self._last = step
        elif step - self._last >= every and not self._warned:
            self._warned = True
            self._warn(f"No prompt of steps {self._last} to {step} has shown the model an image. {self._consequence}")

    def dependency(self, values: Tensor) -> None:
        """Looks at what was measured of a generation batch of all processes.

        Args:
            values: `[N]` dependency of its tokens, in nats.
        """
        if len(values) and values.abs().mean() < BLIND and not self._warned_blind:
            self._warned_blind = True
            self._warn(
                f"The perturbed view changes nothing: mean dependency {values.mean().item():.1e} nats over "
                f"{values.numel()} tokens. Likely causes: images are dropped on the way to the model, the projector "
                "between vision tower and language model is zero and frozen, or the perturbation is too weak."
            )

    def kept(self, measured: Measured, keep_ratio: float) -> None:
        """Looks at which tokens of a generation batch of all processes carry gradient."""
        if not measured.kept_count or self._warned_kept:
            return
        self._batches += 1
        self._tokens += len(measured.kept)
        self._kept += measured.kept_count
        self._unseen += measured.unseen_count
        share = self._unseen / self._kept
        if self._batches >= PATIENCE and share > MOST:
            self._warned_kept = True
            self._warn(
                f"keep_ratio: got {keep_ratio}, which is above the share of visual tokens: {share:.0%} of the tokens "
                f"that carry gradient depend on the image by less than {UNSEEN} nats, over {self._batches} generation "
                f"batches. To train on those alone that look, set keep_threshold to {UNSEEN} or more, or keep_ratio to "
                f"about {max((self._kept - self._unseen) / self._tokens, 0.01):.2f}."
            )
