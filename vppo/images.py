"""Pictures of any kind as a person sees them: first frame, upright, over white, eight bits, RGB.

Every picture that enters training or an analysis comes through `to_rgb`. Pillow's own conversion drops transparency,
which turns black lines on nothing into a black picture, and clips what has more than eight bits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Image as ImageFeature
from PIL import Image, ImageCms, ImageOps

SIXTEEN_BIT_FORMATS = ("PNG", "PPM")  # of which Pillow reads 16 bits into 32


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture as a person sees it.

    Transparent parts show white. 16-bit levels are scaled to 8. 32-bit integers are scaled where the file format says
    that they hold 16 bits. Floating-point levels are taken as 0..1 where none exceeds 1, and as 0..255 where the
    largest is between 2 and 255. Colours of CMYK, YCbCr, HSV and LAB become RGB; colour profiles are not applied, as
    the processors of models do not apply them. A picture that was turned by its EXIF orientation is turned back.

    Args:
        image: In any of Pillow's modes; of an animation, the frame that it stands at, which is the first of a file.

    Returns:
        An upright RGB picture; the same object where there was nothing to do.

    Raises:
        ValueError: The level of white is not known: of 32-bit integers, or of floating-point levels out of range.
    """
    image.load()  # TIFF turns itself here, and GIF finds out here what is transparent
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I") or upright.mode == "F":
        return _from_levels(np.asarray(upright), upright.info.get("transparency"), image)
    if upright.mode == "LAB":
        return _from_lab(upright)
    if upright.has_transparency_data:
        return _over_white(upright)
    if upright.mode == "RGB":
        return image if upright.size == image.size and not _is_turned(image) else upright
    return upright.convert("RGB")


def read_picture(item: Any) -> Image.Image:
    """A picture from wherever it is.

    Args:
        item: A PIL image, a path or address, encoded bytes, or what the `datasets.Image` feature stores: a dict of
            "bytes" and "path".

    Raises:
        OSError: It cannot be read.
        ValueError: See `to_rgb`.
    """
    if isinstance(item, Image.Image):
        return to_rgb(item)  # older versions of datasets decode no picture twice
    if isinstance(item, str | Path):
        item = {"path": str(item), "bytes": None}
    elif isinstance(item, bytes):
        item = {"path": None, "bytes": item}
    return to_rgb(ImageFeature().decode_example(item))


def rgb_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a dataset, as TRL takes it, with its pictures as `to_rgb` makes them.

    Args:
        row: Pictures are in `images`, `image`, and in the parts of the messages of a conversational `prompt`. What is
            neither a PIL image, nor a path, nor a dict of "bytes" and "path" is left to the model's processor.
    """
    changed = dict(row)
    if row.get("image") is not None:
        changed["image"] = _known(row["image"])
    if row.get("images") is not None:
        changed["images"] = [_known(item) for item in row["images"]]
    if row.get("prompt") is not None:
        changed["prompt"] = rgb_prompt(row["prompt"])
    return changed


def rgb_prompt(prompt: Any) -> Any:
    """A conversational prompt with the pictures of its messages as `to_rgb` makes them; another one as it is."""
    return list(map(_rgb_message, prompt)) if isinstance(prompt, list) else prompt


def rgb_content(content: Any) -> Any:
    """What a message holds or a tool returns, with its pictures as `to_rgb` makes them.

    Args:
        content: Pictures are in the parts of a list, each as in `rgb_row`; anything else is returned as it is.
    """
    if not isinstance(content, list):
        return content
    return [
        {**part, "image": _known(part["image"])} if isinstance(part, dict) and part.get("image") is not None else part
        for part in content
    ]


def rgb_tool(tool: Callable[..., Any]) -> Callable[..., Any]:
    """A tool, plain or async, that returns its pictures as `to_rgb` makes them."""
    if inspect.iscoroutinefunction(tool):

        @wraps(tool)
        async def call_async(*args: Any, **kwargs: Any) -> Any:
            return rgb_content(await tool(*args, **kwargs))

        return call_async

    @wraps(tool)
    def call(*args: Any, **kwargs: Any) -> Any:
        return rgb_content(tool(*args, **kwargs))

    return call


def _rgb_message(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": rgb_content(content)} if isinstance(content, list) else message


def _known(item: Any) -> Any:
    stored = isinstance(item, dict) and (item.get("bytes") or item.get("path"))
    return read_picture(item) if stored or isinstance(item, Image.Image | str | Path) else item


def _is_turned(image: Image.Image) -> bool:
    return image.getexif().get(Image.ExifTags.Base.Orientation, 1) != 1


def _over_white(image: Image.Image) -> Image.Image:
    straight = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode))
    opaque = straight.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", opaque.size, "white"), opaque).convert("RGB")


def _from_levels(values: np.ndarray, transparent: Any, image: Image.Image) -> Image.Image:
    """Grey levels of more than eight bits."""
    white = _white(values, image)
    levels = np.rint(np.clip(values.astype(np.float64), 0, white) * (255 / white)).astype(np.uint8)
    if isinstance(transparent, int):
        levels[values == transparent] = 255
    return Image.fromarray(levels).convert("RGB")


def _white(values: np.ndarray, image: Image.Image) -> float:
    """The level of white."""
    if values.dtype.itemsize == 2 or (image.mode == "I" and image.format in SIXTEEN_BIT_FORMATS):
        return 65535.0
    low, high = values.min(), values.max()  # NaN if any is
    if image.mode == "F":
        if low >= 0 and high <= 1:
            return 1.0
        if low >= 0 and 2 <= high <= 255:
            return 255.0
    takes = "0..1, or 0..255 with a level of 2 at least" if image.mode == "F" else "8 or 16 bits"
    kind = "floating-point" if image.mode == "F" else "32-bit"
    raise ValueError(f"image: got {kind} levels from {low:g} to {high:g}, takes {takes}: which level is white?")


def _from_lab(image: Image.Image) -> Image.Image:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    if converted is None:
        raise ValueError("image: its LAB colours cannot be converted")
    return converted
