"""The list of what a checkpoint holds, written when all of it is there: how a whole one is told from half of one."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from vppo.errors import InputError
from vppo.files import sync, write_atomic
from vppo.folders import read_object

MANIFEST_FILE = "manifest.json"
END = 1 << 29  # bytes: of a file above 1 GiB its first and its last half GiB are digested, of others all


class Entry(NamedTuple):
    """A file in the manifest: its size in bytes, and a digest of its content, or of both ends of a large one."""

    size: int
    digest: str


def begin(folder: Path) -> None:
    """Says that a folder is being written: until `finish` it is not whole, whatever it holds of an earlier time."""
    write_atomic(folder / MANIFEST_FILE, json.dumps({"files": None}))


def finish(folder: Path) -> None:
    """Brings all files of a folder onto the disk, and then the list of them."""
    files = _files(folder)
    with ThreadPoolExecutor() as pool:
        list(pool.map(sync, files))
    entries = {path.relative_to(folder).as_posix(): entry._asdict() for path, entry in _entries(files).items()}
    for inner in {path.parent for path in files} | {folder.parent}:
        sync(inner)
    write_atomic(folder / MANIFEST_FILE, json.dumps({"files": entries}, indent=1) + "\n")
    sync(folder)


def is_begun(folder: Path) -> bool:
    """Whether the saving of a folder began and did not come to its end, as far as its manifest says."""
    try:
        return (folder / MANIFEST_FILE).exists() and read_object(folder / MANIFEST_FILE).get("files") is None
    except InputError:
        return True


def fault(folder: Path) -> str | None:
    """Why a folder with a manifest is not whole, or None if it is."""
    try:
        found = read_object(folder / MANIFEST_FILE)["files"]
        if found is None:
            return "its saving was cut short"
        expected = {folder / name: Entry(entry["size"], entry["digest"]) for name, entry in found.items()}
    except (InputError, LookupError, TypeError, AttributeError):
        return f"its {MANIFEST_FILE} cannot be read"
    for path, entry in expected.items():
        name = path.relative_to(folder)
        if not path.is_file():
            return f"it has no {name}"
        size = path.stat().st_size
        if size != entry.size:
            return f"its {name} has {size} bytes instead of {entry.size}"
    try:
        entries = _entries(list(expected))
    except OSError as error:
        return f"its {Path(error.filename or '').name} cannot be read ({error.strerror})"
    changed = next((path for path, entry in entries.items() if entry != expected[path]), None)
    return f"its {changed.relative_to(folder)} has other contents than were saved" if changed else None


def _files(folder: Path) -> list[Path]:
    return sorted(
        p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST_FILE and not p.name.startswith(".")
    )


def _entries(files: list[Path]) -> dict[Path, Entry]:
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter's lock
        return dict(zip(files, pool.map(_entry, files), strict=True))


def _entry(path: Path) -> Entry:
    size, found = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        _feed(found, file, min(size, END if size > 2 * END else size))
        if size > 2 * END:
            file.seek(size - END)
            _feed(found, file, END)
    return Entry(size, found.hexdigest())


def _feed(found: Any, file: Any, count: int) -> None:
    while count and (block := file.read(min(count, 1 << 20))):
        found.update(block)
        count -= len(block)
