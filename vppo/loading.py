"""A model's processor, also where its video half cannot be built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vppo.errors import InputError
from vppo.processors import without_video


def load_processor(
    model: str,
    *,
    revision: str = "main",
    trust_remote_code: bool = False,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> Any:
    """Loads the processor of a vision-language model, padding on the left as generation needs.

    Qwen's processors hold one for videos, which needs torchvision. Without it `AutoProcessor` fails, or hands back a
    bare tokenizer; training on images needs no videos, so the same class is then built without that half.

    Args:
        model: A model on the hub, or a folder as `save_pretrained` writes it.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether the model's own code may run.
        min_pixels: Smaller images are enlarged to this many pixels; None keeps the processor's limit.
        max_pixels: Larger images are reduced to this many pixels; None keeps the processor's limit.

    Returns:
        A processor with a tokenizer and an image processor.

    Raises:
        InputError: There is no such model, it takes no images, or its image processor has no pixel limits to set.
    """
    from transformers import AutoConfig, AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    if model.startswith(("/", ".")) and not Path(model).is_dir():
        raise InputError(f"model: {model}: no such folder")
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    sides = {"padding_side": "left", "truncation_side": "left"}
    try:
        config = AutoConfig.from_pretrained(model, **options)
    except (OSError, ValueError) as error:
        raise InputError(f"model: {model}: cannot be loaded: {error}") from error
    reason: Exception | str = "it has no image processor"
    processor: Any = None
    try:
        processor = AutoProcessor.from_pretrained(model, **options, **sides)
    except (ImportError, OSError, ValueError) as error:
        reason = error
    if not hasattr(processor, "image_processor"):
        whole: Any = PROCESSOR_MAPPING.get(type(config), None)
        if whole is None or "video_processor" not in whole.get_attributes():
            raise InputError(f"model: {model}: no processor for images could be loaded: {reason}")
        try:
            image_only: Any = without_video(whole)
            processor = image_only.from_pretrained(model, **options, **sides)
        except (ImportError, OSError, ValueError) as error:
            raise InputError(f"model: {model}: no processor for images could be loaded: {error}") from error
    _limit_pixels(processor.image_processor, shortest_edge=min_pixels, longest_edge=max_pixels)
    return processor


def _limit_pixels(image_processor: Any, **limits: int | None) -> None:
    for edge, name in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
        if limits[edge] is None:
            continue
        if not hasattr(image_processor, "merge_size"):  # Qwen's, whose two edges are counts of pixels
            raise InputError(f"{name}: {type(image_processor).__name__} has no limits on pixels to set")
        image_processor.size[edge] = limits[edge]
