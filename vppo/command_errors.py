"""How a command of ours ends when its user can put something right, or when it is told to end."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import typer

from vppo.errors import InputError
from vppo.extras import named_extras
from vppo.files import REFUSALS


@contextmanager
def clear_errors() -> Iterator[None]:
    """What a user can put right ends as one red line and exit code 2, SIGTERM with 143; the rest keeps a traceback."""
    before = signal.signal(signal.SIGTERM, _end)
    try:
        with named_extras():
            yield
    except InputError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno not in REFUSALS or error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}")
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(message: str) -> NoReturn:
    typer.secho(f"Error: {' '.join(message.split())}", fg=typer.colors.RED, err=True)
    raise typer.Exit(2) from None


def _end(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM as an interrupt of the program, so that it takes back what it has begun; training waits for its step."""
    os.write(2, b"\nError: ended by SIGTERM\n")
    raise SystemExit(128 + number)
