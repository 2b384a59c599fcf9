"""Attributes of modules, classes and objects, exchanged for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def exchanged(owner: Any, **attributes: Any) -> Iterator[None]:
    """Within the block, attributes of `owner` have other values; after it, also after an error, those from before.

    Args:
        owner: A module, a class or an object.
        attributes: By name. `owner` has them already, by itself or from its class.

    Raises:
        AttributeError: `owner` has no such attribute: what was to be exchanged has been renamed.
    """
    for name in attributes:
        getattr(owner, name)
    before = {name: value for name, value in vars(owner).items() if name in attributes}
    try:
        for name, value in attributes.items():
            setattr(owner, name, value)
        yield
    finally:
        for name in attributes:
            if name in before:
                setattr(owner, name, before[name])
            elif name in vars(owner):
                delattr(owner, name)
