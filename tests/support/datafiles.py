"""Small dataset files and pictures for the tests of reading them."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

from PIL import Image

Row = dict[str, Any]


def picture(path: Path, shade: int = 100, size: tuple[int, int] = (20, 10)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, shade).save(path)
    return path


def png(shade: int, size: tuple[int, int] = (20, 10)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, shade, shade)).save(buffer, "PNG")
    return buffer.getvalue()


def broken_stream() -> bytes:
    """A PNG whose checksums all hold, and whose pixels cannot be inflated."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 20, 10, 8, 2, 0, 0, 0)
    pixels = b"\x78\x9c" + b"\xff" * 30
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def jsonl(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def parquet(path: Path, rows: list[Row], features: Any = None) -> Path:
    from datasets import Dataset

    Dataset.from_list(rows, features=features).to_parquet(str(path))
    return path


def shades(row: Row) -> list[int]:
    """The grey of each image of a row that was loaded."""
    assert all(image.mode == "RGB" for image in row["images"])
    return [image.getpixel((0, 0))[0] for image in row["images"]]
