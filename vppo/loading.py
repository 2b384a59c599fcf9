"""A vision-language model, and its processor, also where the video half of that cannot be built."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vppo.errors import InputError
from vppo.processors import without_video

if TYPE_CHECKING:
    from vppo.config import VPPOConfig


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


def own_processor(model: Any, args: VPPOConfig) -> Any:
    """The processor that belongs to a model; None leaves a text model's, where nothing is scored, to TRL.

    Args:
        model: What a trainer was given: a name, or the model itself.
        args: Of the run.

    Raises:
        InputError: Tokens are scored, and no processor for images can be loaded.
    """
    given = isinstance(model, str)
    name = model if given else getattr(model.config, "_name_or_path", "")
    options: Any = args.model_init_kwargs or {}
    revision = options.get("revision") if given else None
    try:
        if not name:
            raise InputError(
                "processing_class: got None, takes a processor: the model has no name_or_path to load it from"
            )
        return load_processor(name, revision=revision or "main", trust_remote_code=args.trust_remote_code)
    except InputError:
        if args.scores_tokens:
            raise
        return None


def load_model(
    model: str,
    *,
    device: str,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    revision: str = "main",
    trust_remote_code: bool = False,
) -> Any:
    """Loads a vision-language model for evaluation.

    Args:
        model: A model on the hub, or a folder as `save_pretrained` writes it.
        device: "cpu", "cuda", ..., or "auto" to spread it over all GPUs.
        dtype: "auto" for the checkpoint's own, or "float32", "bfloat16", "float16".
        attn_implementation: "sdpa", "eager", "flash_attention_2", ...; None for the model's own choice.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether the model's own code may run.

    Raises:
        InputError: There is no such model, or it does not take images.
    """
    from transformers import AutoModelForImageTextToText

    try:
        loaded = AutoModelForImageTextToText.from_pretrained(
            model,
            device_map=device,
            dtype=dtype,
            attn_implementation=attn_implementation,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
    except (ImportError, OSError, ValueError) as error:
        raise InputError(f"model: {model}: cannot be loaded: {error}") from error
    return loaded.eval()


def check_device(device: str) -> None:
    """Raises an `InputError` where a device cannot be used."""
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device: {device!r} cannot be used: {str(error).splitlines()[0]}") from error
