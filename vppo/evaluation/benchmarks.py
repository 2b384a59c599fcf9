"""The paper's eight benchmarks as their authors publish them on the hub, and any file of problems besides."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from vppo.contents import digest, digest_file
from vppo.data import DataOptions, Problem, Problems, read_file
from vppo.data.answers import reference_answer
from vppo.data.bad_rows import Where
from vppo.data.conversations import conversation
from vppo.data.pictures import decode
from vppo.errors import InputError

PAPO, VPPO = "PAPO-Galaxy/PAPO_eval", "chamber111/VPPO-Eval"
SUBJECTS = ("subject", "category", "topic", "problem_version")  # columns that say what a question is about
# the sentence that the published questions end with; the run's own instruction takes its place
_INSTRUCTED = re.compile(
    r"\s*You first think through the reasoning process as an internal monologue, enclosed within <think> </think> "
    r"tags\.\s*Then, provide your final answer enclosed within \\boxed\{\}\.?\s*$"
)


@dataclass(frozen=True)
class PublishedSet:
    """A benchmark on the hub.

    Attributes:
        name: How it is asked for.
        label: How the paper calls it.
        repo: A dataset repository on the hub.
        rows: Its files of questions in there, as a pattern.
        pictures: A zip of its images, or a folder of them that ends with a slash.
        questions: How many it has as published.
    """

    name: str
    label: str
    repo: str
    rows: str
    pictures: str
    questions: int


def _papo(name: str, label: str, split: str, archive: str, questions: int) -> PublishedSet:
    return PublishedSet(name, label, PAPO, f"data/{split}-*.parquet", f"{archive}_images.zip", questions)


def _vppo(name: str, label: str, stem: str, questions: int) -> PublishedSet:
    return PublishedSet(name, label, VPPO, f"data/vppo/{stem}.json", f"data/images/{stem}/", questions)


PUBLISHED_SETS = {
    entry.name: entry
    for entry in (
        _papo("mathverse", "MathVerse", "AI4Math_MathVerse", "AI4Math_MathVerse", 2180),
        _vppo("dynamath", "DynaMath", "DynaMath_DynaMath_Sample", 3666),
        _papo("mmk12", "MMK12", "PAPO_MMK12", "PAPO_MMK12_test", 2000),
        _papo("geo3k", "Geo3k", "hiyouga_geometry3k", "hiyouga_geometry3k", 601),
        _vppo("mathvision", "MathVision", "MathLLMs_MathVision", 2907),
        _papo("wemath", "We-Math", "We_Math", "We-Math_We-Math", 1740),
        _papo("logicvista", "LogicVista", "lscpku_LogicVista", "lscpku_LogicVista", 447),
        _papo("mmmu_pro", "MMMU-Pro", "MMMU_MMMU_Pro", "MMMU_MMMU_Pro", 1730),
    )
}


class Readable(Protocol):
    """Problems that are read one by one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Problem: ...

    def without_images(self, index: int, /) -> Problem: ...


@dataclass(frozen=True)
class Benchmark:
    """A set of questions.

    Attributes:
        name: Of files and columns.
        label: For people.
        problems: Its questions, each with a reference answer; a broken picture raises when its question is read.
        subjects: What each question is about; None where the set does not say.
        fingerprint: Of the questions, answers and pictures.
        published: How many questions it has as published; None for a set of one's own.
    """

    name: str
    label: str
    problems: Readable
    subjects: Sequence[str] | None
    fingerprint: str
    published: int | None = None

    def chosen(self, limit: int | None) -> list[int]:
        """The questions that are asked: all of them, or `limit` spread evenly over the set."""
        count = len(self.problems)
        return list(range(count)) if limit is None or limit >= count else [i * count // limit for i in range(limit)]


def load_benchmarks(
    names: Sequence[str], data: Sequence[str | Path], options: DataOptions, mirror: str | Path | None = None
) -> list[Benchmark]:
    """The published sets that are named, then one's own.

    Args:
        names: Of `PUBLISHED_SETS`.
        data: Files, folders or datasets on the hub, as `vppo.data.Problems` takes them; each needs an answer in every
            row.
        options: How rows become problems.
        mirror: A folder with copies of the hub's repositories, `FOLDER/OWNER/NAME` or `FOLDER/NAME`; None asks the hub.

    Raises:
        InputError: There is no such set, it cannot be fetched, or a row of it cannot be used; the message names the
            file and the row.
    """
    for name in names:
        if name not in PUBLISHED_SETS:
            raise InputError(
                f"benchmarks: got {name!r}, takes {', '.join(PUBLISHED_SETS)}; --data takes files of your own"
            )
    found = [_published(PUBLISHED_SETS[name], options, mirror) for name in names]
    for source in data:
        found.append(_own(source, options, [benchmark.name for benchmark in found]))
    if not found:
        raise InputError("benchmarks: got none; name published ones, or give --data")
    twice = [name for name in names if list(names).count(name) > 1]
    if twice:
        raise InputError(f"benchmarks: got {twice[0]!r} twice, takes each once")
    return found


# -- as published ------------------------------------------------------------------------------------------------------


def _published(entry: PublishedSet, options: DataOptions, mirror: str | Path | None) -> Benchmark:
    folder = _copy(entry, Path(mirror).expanduser()) if mirror is not None else _download(entry)
    files = sorted(folder.glob(entry.rows))
    if not files:
        raise InputError(f"{entry.name}: {folder / entry.rows}: no such file")
    problems = PublishedProblems(files, Pictures(folder / entry.pictures), options)
    fingerprint = digest([*(digest_file(file) for file in files), problems.pictures.fingerprint])
    return Benchmark(entry.name, entry.label, problems, problems.subjects, fingerprint, entry.questions)


def _copy(entry: PublishedSet, mirror: Path) -> Path:
    candidates = [mirror / entry.repo, mirror / entry.repo.split("/")[1]]
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise InputError(f"mirror: {mirror} has neither {entry.repo} nor {entry.repo.split('/')[1]}, where {entry.name} is")


def _download(entry: PublishedSet) -> Path:
    from huggingface_hub import snapshot_download

    pictures = f"{entry.pictures}*" if entry.pictures.endswith("/") else entry.pictures
    try:
        return Path(snapshot_download(entry.repo, repo_type="dataset", allow_patterns=[entry.rows, pictures]))
    except Exception as error:  # the hub's client raises its own kinds, those of its transport, and OSError
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"benchmarks: {entry.name}: {entry.repo} cannot be fetched from the hub ({type(error).__name__}: {reason})"
            "; --mirror FOLDER takes a copy of it"
        ) from error


@dataclass(frozen=True)
class Pictures:
    """The images of a published set, in a zip or in a folder; the rows call them `./data/images/FOLDER/FILE`."""

    path: Path

    def __post_init__(self) -> None:
        if not self.path.exists():
            raise InputError(f"{self.path}: no such file or folder; it holds the images")

    @cached_property
    def _archive(self) -> zipfile.ZipFile | None:
        if self.path.is_dir():
            return None
        try:
            return zipfile.ZipFile(self.path)
        except (OSError, zipfile.BadZipFile) as error:
            raise InputError(
                f"{self.path}: is no whole zip file ({error}); remove it, and it is fetched anew"
            ) from error

    @cached_property
    def _names(self) -> dict[tuple[str, ...], str]:
        """Each image by the last two parts of its path; archives differ in what stands before these."""
        if self._archive is not None:
            names = [name for name in self._archive.namelist() if not name.endswith("/")]
        else:
            names = [str(path.relative_to(self.path)) for path in self.path.rglob("*") if path.is_file()]
        # the archive's own folder is missing in its paths where it was packed from inside of it
        return {self._key(f"{self._folder}/{name}"): name for name in names}

    @property
    def _folder(self) -> str:
        return self.path.stem.removesuffix("_images")

    @staticmethod
    def _key(path: str) -> tuple[str, ...]:
        return PurePosixPath(path.replace("\\", "/")).parts[-2:]

    @property
    def fingerprint(self) -> str:
        if self._archive is not None:
            return digest([[info.filename, info.CRC] for info in self._archive.infolist()])
        return digest([[name, (self.path / name).stat().st_size] for name in sorted(self._names.values())])

    def has(self, path: str) -> bool:
        return self._key(path) in self._names

    def read(self, path: str) -> bytes:
        name = self._names[self._key(path)]
        return self._archive.read(name) if self._archive is not None else (self.path / name).read_bytes()


class PublishedProblems:
    """The questions of a published set: rows of `messages` (a user's and the assistant's, which is the answer) and
    `images` (paths).

    Args:
        files: Parquet or JSON; all rows are checked, though no image is decoded.
        pictures: Where the images are.
        options: System prompt and instruction; the latter takes the place of the one that the questions end with.

    Raises:
        BadRowError: A row is not of that form; the message names file, row and column.
    """

    def __init__(self, files: Sequence[Path], pictures: Pictures, options: DataOptions) -> None:
        self.pictures, self._options = pictures, options
        self._rows: list[tuple[Where, dict[str, Any]]] = []
        for file in files:
            table = read_file(file)
            for column in ("messages", "images"):
                if column not in table.column_names:
                    raise InputError(f"{file}: no column {column!r}, it has {table.column_names}")
            self._rows += [(Where(str(file), number), row) for number, row in enumerate(table, 1)]
        for where, row in self._rows:
            self._read(where, row)

    @property
    def subjects(self) -> list[str] | None:
        column = next((name for name in SUBJECTS if all(row.get(name) for _, row in self._rows)), None)
        return None if column is None else [str(row[column]) for _, row in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Problem:
        where, row = self._rows[index]
        prompt, answer, paths = self._read(where, row)
        images = []
        for path in paths:
            try:
                images.append(
                    decode({"bytes": self.pictures.read(path), "path": None}, self._options.image_pixel_limit)
                )
            except (InputError, OSError, zipfile.BadZipFile) as error:
                raise where.bad("images", f"{path}: {error}") from error
        return Problem(prompt, images, answer)

    def without_images(self, index: int) -> Problem:
        """The same, its pictures left out and undecoded."""
        prompt, answer, _ = self._read(*self._rows[index])
        return Problem(prompt, [], answer)

    def _read(self, where: Where, row: dict[str, Any]) -> tuple[list[dict[str, Any]], str, list[str]]:
        """The conversation, the answer, and the paths of the images."""
        messages = row["messages"]
        turns = messages if isinstance(messages, list) else []
        roles = [turn.get("role") if isinstance(turn, dict) else None for turn in turns]
        if [role for role in roles if role != "system"] != ["user", "assistant"]:
            raise where.bad("messages", f"takes a user's and an assistant's message, got {messages!r:.80}")
        question, given = (turn["content"] for turn in turns if turn["role"] != "system")
        answer = reference_answer(given, "messages", where)
        if answer is None:
            raise where.bad("messages", "the assistant's message, which is the answer, is empty")
        images = row["images"] if isinstance(row["images"], list) else []
        for path in images:
            if not isinstance(path, str) or not self.pictures.has(path):
                raise where.bad("images", f"{path!r:.200} is not in {self.pictures.path}")
        text = _INSTRUCTED.sub("", question) if isinstance(question, str) else question
        return conversation(text, len(images), "messages", where, self._options), answer, images


# -- one's own ---------------------------------------------------------------------------------------------------------


def _own(source: str | Path, options: DataOptions, taken: Sequence[str]) -> Benchmark:
    problems = Problems(source, options)
    fingerprint = problems.check_answered()
    stem = Path(str(source)).expanduser().resolve().stem if Path(str(source)).expanduser().exists() else str(source)
    name = re.sub(r"[^\w-]+", "_", stem).strip("_") or "data"
    if name in taken:
        raise InputError(f"data: {source} would be called {name!r}, as another set is; rename the file")
    subjects = next(
        (found for column in SUBJECTS if (found := problems.column(column)) is not None and all(found)), None
    )
    return Benchmark(name, name, problems, None if subjects is None else list(map(str, subjects)), fingerprint)
