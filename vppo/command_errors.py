"""How a command of ours ends when its user can put something right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from vppo.errors import InputError
from vppo.extras import named_extras


@contextmanager
def clear_errors() -> Iterator[None]:
    """What a user can put right ends as one red line and exit code 2; anything else keeps its traceback."""
    try:
        with named_extras():
            yield
    except InputError as error:
        typer.secho(f"Error: {' '.join(str(error).split())}", fg=typer.colors.RED, err=True)
        raise typer.Exit(2) from None
