"""Seams: what of another package's inside is overridden or called, and what of it the installed version lacks."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from functools import reduce
from importlib import import_module
from types import CodeType
from typing import Any

from vppo.errors import InputError


class MovedSeamError(InputError, ImportError):
    """The installed version of a package is not one that this library knows how to extend."""


def lacking(target: str, parameters: Sequence[str] = (), uses: Sequence[str] = ()) -> list[str]:
    """What an object of another package lacks; nothing of it is run.

    Args:
        target: Where the object is, as "module:name" or "module:class.name".
        parameters: That it must take.
        uses: Names, attributes and texts that its code must mention, such as a method that it calls or a key that it
            reads.

    Returns:
        In words, for a message; empty where everything is there.

    Raises:
        ModuleNotFoundError: Something other than a module of that package is not installed.
    """
    module, _, path = target.partition(":")
    try:
        found: Any = reduce(getattr, path.split("."), import_module(module))
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith(f"{module.split('.')[0]}."):
            raise
        return [module]
    except AttributeError:
        return [target]
    missing: list[str] = []
    taken = inspect.signature(found).parameters if parameters else {}
    if names := [name for name in parameters if name not in taken]:
        missing.append(f"parameter {', '.join(map(repr, names))} of {target}")
    mentioned = set(_mentioned(inspect.unwrap(found).__code__)) if uses else set()
    if names := [name for name in uses if name not in mentioned]:
        missing.append(f"{', '.join(map(repr, names))} in {target}")
    return missing


def _mentioned(code: CodeType) -> Iterator[str]:
    """Names and texts in the code of a function and of those inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _mentioned(constant)
        for text in constant if isinstance(constant, (tuple, frozenset)) else (constant,):
            if isinstance(text, str):
                yield text
