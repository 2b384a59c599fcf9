"""Answers on the disk, a line each, written as soon as they are there: a run that was killed goes on behind them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from vppo.errors import InputError
from vppo.files import make_folder

SEEN = "seen"  # the view with the question's own images; a blind view is called by what it shows instead
DEPENDENCY, SKIPPED = "dependency", "skipped"
Key = tuple[int, int]  # question, sample


@dataclass(frozen=True)
class Answer:
    """What the model wrote.

    Attributes:
        question: Its number in the set.
        sample: It is the `sample`-th answer to this question, from 0.
        text: Without special tokens.
        ids: The tokens, the one that ended it included.
        ended: It came to its end; else it was cut off where it became too long.
    """

    question: int
    sample: int
    text: str
    ids: list[int]
    ended: bool


_ANSWER = {field.name for field in fields(Answer)}
_FIELDS = {DEPENDENCY: {"question", "sample", "dependency"}, SKIPPED: {"question", "reason"}}


class Store:
    """The answers of one evaluation and what was measured of them, in `FOLDER/answers/SET.VIEW.WORKER.jsonl`.

    Every process appends to files of its own; all are read together. Of a line that a crash cut short nothing is read.

    Args:
        folder: Of the evaluation.
        worker: Number of the process that writes.
    """

    def __init__(self, folder: Path, worker: int = 0) -> None:
        self.folder, self._worker = folder / "answers", worker
        self._opened: set[Path] = set()

    def answers(self, benchmark: str, view: str) -> Iterator[Answer]:
        """What is there; an answer may come twice, the later one as good as the first."""
        for row in self._rows(benchmark, view):
            yield Answer(**row)

    def keys(self, benchmark: str, view: str) -> set[Key]:
        """Which answers are there."""
        return {(answer.question, answer.sample) for answer in self.answers(benchmark, view)}

    def skipped(self, benchmark: str) -> dict[int, str]:
        """The questions that could not be asked, and why."""
        return {row["question"]: row["reason"] for row in self._rows(benchmark, SKIPPED)}

    def dependencies(self, benchmark: str) -> dict[Key, float | None]:
        """The mean dependency of answers, in nats a token; None where there is nothing to measure."""
        return {(row["question"], row["sample"]): row["dependency"] for row in self._rows(benchmark, DEPENDENCY)}

    def add(self, benchmark: str, view: str, answers: Iterable[Answer]) -> None:
        self._append(benchmark, view, [asdict(answer) for answer in answers])

    def skip(self, benchmark: str, reasons: Mapping[int, str]) -> None:
        self._append(benchmark, SKIPPED, [{"question": key, "reason": reason} for key, reason in reasons.items()])

    def measure(self, benchmark: str, found: Mapping[Key, float | None]) -> None:
        rows = [{"question": key[0], "sample": key[1], "dependency": value} for key, value in found.items()]
        self._append(benchmark, DEPENDENCY, rows)

    def lines(self, kind: str | None = None) -> int:
        """How many rows there are of a kind, or of all views: quickly, for a progress bar."""
        found = 0
        for path in self.folder.glob("*.jsonl"):
            own = path.name.split(".")[1]
            if own == kind or (kind is None and own not in (DEPENDENCY, SKIPPED)):
                found += path.read_bytes().count(b"\n")
        return found

    def _rows(self, benchmark: str, kind: str) -> Iterator[dict[str, Any]]:
        for path in sorted(self.folder.glob(f"{benchmark}.{kind}.*.jsonl")):
            yield from _read(path, _FIELDS.get(kind, _ANSWER))

    def _append(self, benchmark: str, kind: str, rows: list[dict[str, Any]]) -> None:
        if not rows:
            return
        path = self.folder / f"{benchmark}.{kind}.{self._worker}.jsonl"
        if path not in self._opened:
            make_folder(path.parent)
            _cut(path)
            self._opened.add(path)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with path.open("ab") as file:
            file.write(lines.encode(errors="surrogatepass"))
            file.flush()
            os.fsync(file.fileno())


def _cut(path: Path) -> None:
    """Drops what a crash left of a last line."""
    if path.exists():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)


def _read(path: Path, wanted: set[str]) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
                whole = isinstance(row["question"], int) and set(row) == wanted
            except (ValueError, TypeError, KeyError, RecursionError):
                whole = False
            if not whole:
                shown = repr(line[:60].decode(errors="replace"))
                raise InputError(f"{path}, line {number}: is no answer of ours: {shown}; remove that line")
            yield row
