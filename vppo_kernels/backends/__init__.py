"""The tile operations, once per kind of machine. A backend folds tiles and writes gradients; it knows nothing else."""

from __future__ import annotations

from types import ModuleType

from vppo_kernels.backends import torch as torch_backend

BACKENDS: dict[str, ModuleType] = {"torch": torch_backend}


def resolve(name: str) -> ModuleType:
    """The backend module of that name; "auto" takes the best one present.

    Raises:
        ValueError: `name` is no backend of this installation.
    """
    if name == "auto":
        return torch_backend
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, takes one of {['auto', *BACKENDS]}")
    return BACKENDS[name]
