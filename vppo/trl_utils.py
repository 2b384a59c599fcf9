"""Functions of TRL's that it does not export. Where one of them has moved, an error says so when they are imported."""

from __future__ import annotations

from importlib import metadata

from vppo.seams import MovedSeamError

TESTED = "trl>=1.15,<1.17"  # the range of pyproject.toml; both ends are tested

try:
    from trl.data_utils import prepare_multimodal_messages
    from trl.trainer.utils import (
        RepeatSampler,
        is_async_callable,
        pad,
        split_pixel_values_by_grid,
        strip_images_from_messages,
        unsplit_pixel_values_by_grid,
    )
except ModuleNotFoundError:  # of TRL itself, or of something that it needs
    raise
except ImportError as error:
    raise MovedSeamError(f"trl: got version {metadata.version('trl')}: {error}; takes {TESTED}") from error

__all__ = [
    "RepeatSampler",
    "is_async_callable",
    "pad",
    "prepare_multimodal_messages",
    "split_pixel_values_by_grid",
    "strip_images_from_messages",
    "unsplit_pixel_values_by_grid",
]
