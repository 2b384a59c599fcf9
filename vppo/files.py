"""Files that are either whole or not there, and what a disk says when it takes no more."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from vppo.errors import InputError

# what a disk or its owner refuses; a file that is not there where it should be is a defect, and none of these
REFUSALS = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM),
        *(errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EMFILE, errno.ENFILE),
    }
)


def make_folder(path: Path) -> None:
    """Makes a folder and its parents where they are missing.

    Raises:
        OSError: With one of `REFUSALS` and the path, also where a file is in the way, and in a file system as /proc.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, "is a file, takes a folder", str(path)) from error
    except FileNotFoundError as error:
        raise PermissionError(errno.EPERM, "no folder can be made there", str(path)) from error


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when all of it is on the disk; an error leaves `path` as it was.

    Args:
        path: What is replaced, or made with its parent folders.

    Yields:
        The file, open for bytes.

    Raises:
        OSError: The folder cannot be made or the file not be written; it names `path`.
    """
    path = Path(path)
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:  # x: fails on whatever stands there, a planted link too
            yield file
            file.flush()
            os.fsync(file.fileno())  # without it the rename can reach the disk before the bytes do
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None and str(error.filename) in ("None", str(temporary)):
            error.filename = str(path)
        raise
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


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
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
    return Path(path)


def sync(path: Path) -> None:
    """Brings what was written to a file, or the names in a folder, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(what: Path, remedy: str = "") -> Iterator[None]:
    """Turns what a disk refuses while a library writes `what` into an `InputError` of one line.

    torch and safetensors have errors of their own for it, and torch's does not say why.

    Args:
        what: The file or folder that is written.
        remedy: What a user can do about it, for the end of the message.
    """
    try:
        yield
    except Exception as error:
        reason = refusal(error)
        if reason is None:
            raise
        raise InputError(f"{what}: cannot be written: {reason}{_room(what)}{remedy and '; ' + remedy}") from error


def refusal(error: BaseException) -> str | None:
    """What the disk said, where an error is that of a disk; else None."""
    if isinstance(error, OSError) and error.errno in REFUSALS:
        return str(error.strerror)
    # torch's file writer, and the Rust libraries of safetensors and tokenizers
    if "inline_container.cc" in str(error) or "(os error " in str(error):
        return str(error).splitlines()[0]
    return None


def _room(path: Path) -> str:
    """How much the disk of a path has left, where that is little."""
    with suppress(OSError):
        free = shutil.disk_usage(next(folder for folder in path.absolute().parents if folder.is_dir())).free
        if free < 1 << 30:
            return f" ({free >> 20} MiB are left on the disk)"
    return ""
