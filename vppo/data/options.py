"""What can be said about problems wherever they are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vppo.errors import InputError

SYSTEM_PROMPT = "You are a helpful assistant."
INSTRUCTION = (
    "You first think through the reasoning process as an internal monologue, enclosed within <think> </think> tags. "
    r"Then, provide your final answer enclosed within \boxed{}."
)


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """How a row becomes a problem; training, its evaluations and analyses share these.

    Attributes:
        system_prompt: First message before a problem that is a text; empty for none.
        instruction: What follows a problem that is a text; may be empty.
        problem_key: The column of the problem, where `a.b` is field `b` of column `a`; None finds it, see
            `vppo.data.columns`.
        answer_key: The column of the reference answer; None finds it.
        image_key: The column of the images; None finds it.
        image_dir: What image paths are relative to, and must not leave; None for the folder of the data file.
        trust_image_paths: Let image paths lead anywhere: by `..`, by links, or from the root.
        image_pixel_limit: The largest image in pixels, for the whole process; None for Pillow's own bound, about 179
            million.

    Raises:
        InputError: `image_dir` is not a folder, or `image_pixel_limit` not a positive number.
    """

    system_prompt: str = SYSTEM_PROMPT
    instruction: str = INSTRUCTION
    problem_key: str | None = None
    answer_key: str | None = None
    image_key: str | None = None
    image_dir: str | Path | None = None
    trust_image_paths: bool = False
    image_pixel_limit: int | None = None

    def __post_init__(self) -> None:
        if self.image_dir is not None and not Path(self.image_dir).expanduser().is_dir():
            raise InputError(f"image_dir: {self.image_dir}: no such folder")
        if self.image_pixel_limit is not None and self.image_pixel_limit < 1:
            raise InputError(f"image_pixel_limit: got {self.image_pixel_limit}, takes a number of pixels from 1")


@dataclass(frozen=True, kw_only=True)
class DataOptions(RowOptions):
    """How problems are read: which of them, and how a row becomes one (the fields of `RowOptions`).

    Attributes:
        split: A split of a hub dataset; in a folder, the files whose name starts with it, or all if none does. A single
            file is taken whole.
    """

    split: str = "train"
