"""The folders that our commands write: whose they are, what they hold, and their JSON files with errors that help."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vppo.errors import InputError
from vppo.files import write_atomic

ELSEWHERE = "choose another --out, or remove that folder"
# what only a folder of this kind has, the first match counts
_KINDS = (
    ("a comparison of analyses", ("comparison.json",)),
    ("a comparison of evaluations", ("eval_comparison.json",)),
    ("a study", ("study.json",)),
    ("an evaluation", ("questions.parquet", "answers.parquet")),
    ("the beginning of an evaluation", ("answers",)),
    ("an analysis", ("trajectories.parquet",)),
    ("a run of `vppo demo`", ("held_out.parquet",)),
    ("a run of `vppo demo`", ("warmup",)),
    ("the beginning of an analysis", ("parts",)),
    ("a training run", ("options.json", "config.yaml", "metrics.jsonl")),
    ("the beginning of a run", ("options.json",)),
    ("a checkpoint", ("trainer_state.json",)),
    ("a model", ("config.json",)),
)


def enter(folder: Path, identity: dict[str, Any], *, what: str, known_by: set[str]) -> dict[str, Any] | None:
    """Makes a folder a run's own, by an `options.json` that says what is run, or finds what was begun in it.

    Args:
        folder: New, empty, or of a run that began in it; held against other processes (see `vppo.locks`).
        identity: What a run that goes on must have in common with the one that began.
        what: A run of this kind, in words, for messages.
        known_by: Keys of `identity` that a run of another kind does not have.

    Returns:
        The identity of the run that began here; None where this one begins.

    Raises:
        InputError: The folder holds something else.
    """
    marker = folder / "options.json"
    if not marker.exists():
        # what is hidden is the claim, and what a crash leaves of the marker itself
        if folder.exists() and (not folder.is_dir() or any(path.name[0] != "." for path in folder.iterdir())):
            raise InputError(f"--out: {folder} holds other files; takes a new or empty folder")
        write_atomic(marker, json.dumps(identity, indent=2) + "\n")
        return None
    before = read_object(marker, remedy=ELSEWHERE)
    if not before.keys() >= known_by:
        raise InputError(f"--out: {folder} holds {kind_of(folder)}, no {what}; choose another --out")
    return before


def kind_of(folder: Path) -> str:
    """What a folder holds, in words: "an analysis", "a run of `vppo demo`", "nothing", "other files", ..."""
    if not folder.is_dir():
        return "no folder"
    for kind, names in _KINDS:
        if all((folder / name).exists() for name in names):
            return kind
    if any(folder.glob("checkpoint-*")):
        return "a training run"
    return "other files" if any(folder.iterdir()) else "nothing"


def read_object(file: Path, *, remedy: str = "") -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        file: What to read.
        remedy: What a user can do where it is broken, for the end of the message.

    Raises:
        InputError: The file is missing, unreadable, no JSON, or holds something else than an object; the message names
            it and ends with the remedy.
    """
    after = f"; {remedy}" if remedy else ""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file}: does not exist{after}") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}){after}") from None
    except RecursionError:
        raise InputError(f"{file}: is no JSON of ours (nested too deeply){after}") from None
    except ValueError as error:
        raise InputError(f"{file}: is no JSON ({error}){after}") from None
    if not isinstance(found, dict):
        raise InputError(f"{file}: got a {type(found).__name__}, takes an object{after}")
    return found
