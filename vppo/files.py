"""Files that are either whole or not there."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomic(path: str | Path, content: str | bytes) -> Path:
    """Writes a file so that a reader, or a crash, never sees half of it.

    Args:
        path: Where to write. Missing parent folders are made.
        content: Text (written as UTF-8) or bytes.

    Returns:
        The path written.

    Raises:
        TypeError: `content` is neither text nor bytes.
        OSError: The folder cannot be made or the file not be written; an older file at `path` is then untouched.
    """
    if not isinstance(content, str | bytes):
        raise TypeError(f"content must be str or bytes, got {type(content).__name__}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # without it the rename can reach the disk before the bytes do
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
