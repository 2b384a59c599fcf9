"""A folder that one run at a time may write to."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vppo.errors import InputError
from vppo.files import make_folder

LOCK_FILE = ".lock"
TRIES = 1000  # to make a file in a folder that others may be removing
logger = logging.getLogger(__name__)


@contextmanager
def claimed(folder: Path, name: str) -> Iterator[None]:
    """Holds a folder against other processes, which are refused; it is made if it is not there.

    The operating system lets go of the claim when the process ends, however it ends: what a crash leaves is a file
    `.lock` that the next claim takes over. A folder that was made here and in which nothing was written is removed.

    Args:
        folder: What is claimed.
        name: The option that named it, for messages.

    Raises:
        InputError: Another process has claimed it, or it, or what it would lie in, is a file or a broken link.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        found = "a file" if there.exists() else "a link to what is not there"
        raise InputError(f"{name}: {there} is {found}; takes a new or empty folder")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        descriptor = _lock(folder, name)
        try:
            yield
        finally:
            (folder / LOCK_FILE).unlink(missing_ok=True)  # before it is let go, so that nobody else's is removed
            os.close(descriptor)
    finally:
        with suppress(OSError):  # it is not empty: something was written, or another process came
            for path in made:
                path.rmdir()


def _lock(folder: Path, name: str) -> int:
    path = folder / LOCK_FILE
    for _ in range(TRIES):
        make_folder(folder)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # who had it has just removed the folder
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # who had it may have removed the file between our opening and our locking it
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                os.truncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return descriptor
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise InputError(
                f"{name}: {folder} is in use by {holder}; wait until it has ended, or choose another folder"
            ) from None
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                logger.warning(
                    f"{folder} cannot be locked ({error.strerror}): make sure that no other run writes to it"
                )
                return descriptor
            os.close(descriptor)
            raise
        os.close(descriptor)
    raise PermissionError(errno.EPERM, "no file can be made there", str(folder))
