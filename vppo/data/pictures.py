"""Images as they are stored, and as they are decoded."""

from __future__ import annotations

import base64
import binascii
import io
import os
import stat
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import PIL.Image
from PIL import Image

from vppo.data.bad_rows import Where
from vppo.data.options import DataOptions
from vppo.errors import InputError
from vppo.images import to_rgb

Stored = dict[str, Any]  # "bytes" of a picture, or the "path" of one
# of pictures alone: some of Pillow's other readers start programs, or read documents
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")
# how pictures begin in base64, in the same order: PNG, JPEG, GIF, WebP, TIFF of either byte order
BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "SUkqA", "TU0AK")
SHORTEST_BASE64 = 64  # characters: no picture is shorter, and no path that looks like base64 is longer


@dataclass(frozen=True)
class ImagePaths:
    """What image paths are relative to, and whether they may leave it."""

    root: Path
    anywhere: bool = False

    @classmethod
    def of(cls, options: DataOptions, folder: Path) -> ImagePaths:
        """As the options say; by default relative to `folder`."""
        root = folder if options.image_dir is None else Path(options.image_dir).expanduser()
        return cls(root.absolute(), options.trust_image_paths)

    def find(self, text: str, column: str, where: Where) -> str:
        """The absolute path of an image.

        Raises:
            BadRowError: It leads out of the folder, or to the network.
        """
        if text.startswith(("http://", "https://")):
            raise where.bad(column, f"{text:.200} is on the network; takes pictures that are here")
        path = os.path.abspath(self.root / text.removeprefix("file://"))
        if not self.anywhere and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.root)):
            raise where.bad(
                column,
                f"{text:.200} is outside of {self.root}; image_dir: names another folder (image_dir: / allows every "
                "absolute path), trust_image_paths: true follows paths anywhere",
            )
        return path


def stored_pictures(value: Any, column: str, where: Where, paths: ImagePaths) -> list[Stored | Image.Image]:
    """Each image of a row: nothing, one, or a list of them.

    An image is a path, bytes, an object with `bytes` or `path`, base64, a data URI or, in memory, a PIL image.

    Raises:
        BadRowError: Something there is no image.
    """
    if value is None:
        return []
    return [_stored(item, column, where, paths) for item in (value if isinstance(value, list) else [value])]


def _stored(item: Any, column: str, where: Where, paths: ImagePaths) -> Stored | Image.Image:
    if isinstance(item, Image.Image):
        return item
    inner = item
    if isinstance(item, dict):
        inner = item.get("bytes") or item.get("path") or item.get("image")
        if item.get("bytes") and isinstance(inner, str):
            return {"bytes": _from_base64(inner, column, where), "path": None}
    if isinstance(inner, os.PathLike):
        inner = os.fspath(inner)
    if inner and isinstance(inner, bytes | bytearray):
        return {"bytes": bytes(inner), "path": None}
    if not isinstance(inner, str) or not inner.strip():
        raise where.bad(column, f"an image is a path or an embedded picture, got {item!r:.80}")
    if inner.startswith("data:"):
        head, _, content = inner.partition(",")
        if not head.endswith(";base64"):
            raise where.bad(column, f"takes data URIs in base64, got {inner[:60]!r}")
        return {"bytes": _from_base64(content, column, where), "path": None}
    if len(inner) >= SHORTEST_BASE64 and inner.startswith(BASE64_STARTS) and "." not in inner:
        return {"bytes": _from_base64(inner, column, where), "path": None}
    if "\0" in inner:
        raise where.bad(column, f"an image is a path or an embedded picture, got {inner[:60]!r}")
    return {"bytes": None, "path": paths.find(inner, column, where)}


def _from_base64(text: str, column: str, where: Where) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise where.bad(column, f"cannot read the embedded picture: not valid base64: {error}") from error


def decode(stored: Stored | Image.Image, pixel_limit: int | None = None) -> Image.Image:
    """One image, decoded whole: the only place where pictures are decoded, for training, analysis and checks alike.

    Args:
        stored: What `stored_pictures` returned.
        pixel_limit: The largest image in pixels; None for Pillow's own bound.

    Raises:
        InputError: It is no picture, it is broken or too large, or its path is not that of a regular file.
    """
    if isinstance(stored, Image.Image):
        try:
            return to_rgb(stored)
        except ValueError as error:
            raise InputError(f"cannot read the embedded picture: {type(error).__name__}: {error}") from error
    if pixel_limit is not None:
        # Pillow refuses what is more than twice as large; half a pixel is fine with it, though not with its types
        PIL.Image.MAX_IMAGE_PIXELS = pixel_limit / 2  # type: ignore[assignment]
    try:
        if stored["bytes"] is None and not stat.S_ISREG(os.stat(stored["path"]).st_mode):
            raise OSError("not a regular file")  # reading a pipe or a device may never end
        source = stored["path"] if stored["bytes"] is None else io.BytesIO(stored["bytes"])
        with Image.open(source, formats=_formats()) as image:
            image.load()
            return to_rgb(image)
    except Exception as error:  # Pillow's readers raise many kinds
        what = stored["path"] or "the embedded picture"
        raise InputError(f"cannot read {what}: {type(error).__name__}: {error}") from error


@cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # a build of Pillow may lack some
