"""The reward functions that a config names."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import math
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from vppo.errors import InputError
from vppo.rewards.accuracy import accuracy_reward
from vppo.rewards.format import format_reward

Reward = Callable[..., Any]

BUILT_IN: dict[str, Reward] = {"accuracy": accuracy_reward, "format": format_reward}
TAKES = f"{', '.join(map(repr, BUILT_IN))}, 'module:function' or 'file.py:function'"


def load_rewards(names: str | Sequence[str], weights: Sequence[float] | None = None) -> list[Reward]:
    """The reward functions of a run.

    Args:
        names: One, or several; each as `load_reward` takes it.
        weights: `reward_weights`, one for each of them; None weighs all alike.

    Raises:
        InputError: There is no such function, two of them have the same name, or there are not as many finite weights.
    """
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise InputError(f"reward: got an empty list, takes one or several of {TAKES}")
    if weights is not None and len(weights) != len(names):
        raise InputError(f"reward_weights: got {len(weights)} weights for {len(names)} rewards ({', '.join(names)})")
    if weights is not None and not all(math.isfinite(weight) for weight in weights):
        raise InputError(f"reward_weights: got {list(weights)}, takes finite numbers")
    rewards = [load_reward(name) for name in names]
    titles: list[str] = [reward.__name__ for reward in rewards]
    for number, title in enumerate(titles):
        if title in titles[:number]:
            first = names[titles.index(title)]
            raise InputError(
                f"reward: {first!r} and {names[number]!r} are both called {title!r}, and their metrics would mix; "
                "takes functions of different names"
            )
    return rewards


def load_reward(name: str) -> Reward:
    """The reward function that a config names; TRL calls it.

    Args:
        name: "accuracy", "format", `module:function` of a module that can be imported, from the working folder too, or
            `file.py:function` of a file.

    Raises:
        InputError: There is no such module, file or function.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    module_name, _, function_name = name.rpartition(":")
    if not module_name or not function_name:
        close = difflib.get_close_matches(name, BUILT_IN, n=1)
        meant = f"; did you mean {close[0]!r}?" if close else ""
        raise InputError(f"reward: got {name!r}, takes {TAKES}{meant}")
    by_path = module_name.endswith(".py")
    module = _from_file(Path(module_name).expanduser(), name) if by_path else _imported(module_name, name)
    where = module.__file__ or module_name
    if not hasattr(module, function_name):
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        close = difflib.get_close_matches(function_name, own, n=1)
        meant = f"; did you mean {close[0]!r}?" if close else ""
        raise InputError(f"reward: {where} has no function {function_name!r}{meant}")
    function = getattr(module, function_name)
    if not callable(function):
        kind = type(function).__name__
        raise InputError(f"reward: {where} has no function {function_name!r}: it is of type {kind}, not callable")
    if not hasattr(function, "__name__"):  # such as functools.partial; TRL names the metrics after it
        function.__name__ = function_name
    return function


def beside(folders: Sequence[Path], names: str | list[str]) -> str | list[str]:
    """Rewards as a config names them; those whose file lies in one of these folders get its whole path.

    So a copy of the config, such as the one in the folder of a run, finds them too.
    """
    if isinstance(names, list):
        return [str(beside(folders, name)) for name in names]
    module_name, _, function_name = names.rpartition(":")
    if names in BUILT_IN or not module_name:
        return names
    file = Path(module_name if module_name.endswith(".py") else f"{module_name}.py").expanduser()
    found = next((folder / file for folder in folders if (folder / file).is_file()), None)
    return names if found is None else f"{found.absolute()}:{function_name}"


def _imported(module_name: str, name: str) -> ModuleType:
    _search(Path.cwd())  # a console script does not look in the working folder
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InputError(f"reward: cannot import {error.name!r} for {name!r}") from error


def _from_file(path: Path, name: str) -> ModuleType:
    if not path.is_file():
        raise InputError(f"reward: no file {path} for {name!r}, beside the config or from {Path.cwd()}")
    spec = importlib.util.spec_from_file_location(f"vppo_reward_{zlib.crc32(str(path.absolute()).encode()):08x}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and pickle look for it
    _search(path.parent.absolute())  # what it imports may lie beside it
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise InputError(f"reward: cannot import {error.name!r} for {name!r}") from error
    return module


def _search(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
