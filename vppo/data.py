"""Problems with images, in the form that TRL trains on."""

from __future__ import annotations

import glob
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vppo.errors import InputError

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset, Features
    from PIL import Image

SYSTEM_PROMPT = "You are a helpful assistant."
INSTRUCTION = (
    "You first think through the reasoning process as an internal monologue, enclosed within <think> </think> tags. "
    r"Then, provide your final answer enclosed within \boxed{}."
)
FORMATS = (".jsonl", ".json", ".parquet")
IMAGE_MARK = "<image>"


def load_training_data(
    name_or_path: str | Path,
    *,
    split: str = "train",
    system_prompt: str = SYSTEM_PROMPT,
    instruction: str = INSTRUCTION,
) -> Dataset:
    """Loads problems, checks every row and opens every image, and writes them as conversations.

    A row has a `problem`, an `answer`, and `images`: a list, empty for a text-only problem, of paths (relative to the
    data file) or of embedded pictures; one `image` will do. Where the problem says `<image>`, once for each of its
    images, they stand there; otherwise they stand before it.

    Args:
        name_or_path: A JSONL, JSON (a list of rows) or parquet file, a folder of such files, or a dataset on the hub.
        split: A split of a hub dataset; in a folder, the files whose name starts with it, or all if none does. A single
            file is taken whole.
        system_prompt: The first message; empty for none.
        instruction: What follows each problem; may be empty.

    Returns:
        Columns `prompt` (messages as TRL and chat templates take them), `answer` (text), `images` (decoded when a row
        is read), and whatever else the rows had, for rewards of one's own.

    Raises:
        InputError: A missing file or column, an empty problem or answer, an image that cannot be read, or no image in
            any row. The message names file, row and column; rows count from 1.
    """
    from datasets import concatenate_datasets

    raw = _read(name_or_path, split)
    parts = [_to_conversations(part, source, folder, system_prompt, instruction) for part, source, folder in raw]
    _check_images(parts, [source for _, source, _ in raw])
    try:
        return concatenate_datasets(parts)
    except ValueError as error:
        raise InputError(f"{name_or_path}: its files do not have the same columns: {error}") from error


@dataclass(frozen=True)
class Problem:
    """A question about images.

    Attributes:
        prompt: Messages as TRL and chat templates take them.
        images: Its pictures, RGB; none for a text-only problem.
        answer: The reference answer, or None where the data has none.
    """

    prompt: list[dict[str, Any]]
    images: list[Image.Image]
    answer: str | None

    @property
    def question(self) -> str:
        """The user's text, as a person reads it."""
        texts = []
        for message in self.prompt:
            if message["role"] == "user":
                content = message["content"]
                texts += [content] if isinstance(content, str) else [p["text"] for p in content if p["type"] == "text"]
        return "\n".join(texts)


class Problems:
    """Problems that are read when they are asked for, so that a broken one spares the others.

    The rows are those of `load_training_data`, with three liberties: the `answer` may be missing, a row may have no
    image, and instead of a `problem` it may have a `prompt` (messages, as TRL takes them), which is used as it is,
    without system prompt and instruction.

    Args:
        data: As `load_training_data` takes it, or rows in memory, whose images may be PIL images.
        split, system_prompt, instruction: As in `load_training_data`.

    Raises:
        InputError: A missing file, or one that lacks a column; the message names those it has.
    """

    def __init__(
        self,
        data: str | Path | Sequence[dict[str, Any]],
        *,
        split: str = "train",
        system_prompt: str = SYSTEM_PROMPT,
        instruction: str = INSTRUCTION,
    ) -> None:
        self.system_prompt, self.instruction = system_prompt, instruction
        self._parts: list[tuple[Any, str, Path, set[str]]] = []
        if isinstance(data, str | Path):
            for part, source, folder in _read(data, split):
                self._parts.append((part.with_format("arrow"), source, folder, set(part.column_names)))
        else:
            columns = {name for row in data for name in row}
            self._parts.append((data, "data", Path(), columns))
        for part, source, _, columns in self._parts:
            if not len(part):
                raise InputError(f"{source}: it has no rows")
            for wanted in (("problem", "prompt"), ("images", "image")):
                if not columns & set(wanted):
                    raise InputError(f"{source}: no column {wanted[0]!r}, it has {sorted(columns)}")
        self._ends = list(accumulate(len(part) for part, *_ in self._parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Problem:
        """Reads one row.

        Raises:
            InputError: It has no question, or an image that cannot be read; the message names file, row and column.
            IndexError: There is no such row.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row, columns, where, folder = self._row(index)
        column = "images" if "images" in columns else "image"
        answer = row.get("answer")
        answer = None if answer is None or not str(answer).strip() else str(answer).strip()
        value = row.get(column)
        items = value if isinstance(value, list) else [] if value is None else [value]
        images = [_picture(item, column, where, folder) for item in items]
        if "problem" in columns:
            prompt = _conversation(row.get("problem"), len(images), where, self.system_prompt, self.instruction)
        elif row.get("prompt"):
            prompt = list(row["prompt"])
        else:
            raise InputError(f"{where}, column 'prompt': it is empty")
        return Problem(prompt, images, answer)

    @cached_property
    def ids(self) -> dict[str, int] | None:
        """The row of each value of the column `id`, as text; None where the data has no such column.

        Raises:
            InputError: Two rows have the same.
        """
        found: list[str] = []
        for part, _, _, columns in self._parts:
            if "id" not in columns:
                return None
            stored = isinstance(part, Sequence)
            values = [row.get("id") for row in part] if stored else part.select_columns("id")[:]["id"].to_pylist()
            found += map(str, values)
        rows = {value: row for row, value in reversed(list(enumerate(found)))}
        if len(rows) < len(found):
            twice = next(value for row, value in enumerate(found) if rows[value] != row)
            raise InputError(f"{self._parts[0][1]}: column 'id': {twice!r} is there twice, takes one row of each")
        return rows

    def _row(self, index: int) -> tuple[dict[str, Any], set[str], str, Path]:
        number = next(number for number, end in enumerate(self._ends) if index < end)
        part, source, folder, columns = self._parts[number]
        inside = index - self._ends[number] + len(part)
        row = part[inside] if isinstance(part[inside], dict) else part[inside].to_pylist()[0]
        return row, columns, f"{source}, row {inside + 1}", folder


def _picture(item: Any, column: str, where: str, folder: Path) -> Image.Image:
    """One image, decoded as training decodes it."""
    from datasets import Image as ImageFeature
    from PIL import Image

    if isinstance(item, Image.Image):
        return item.convert("RGB")
    (stored,) = _images(item, column, where, folder)
    try:
        return ImageFeature(mode="RGB").decode_example(stored)
    except Exception as error:  # Pillow's readers raise many kinds
        what = stored["path"] or "the embedded picture"
        raise InputError(f"{where}, column {column!r}: cannot read {what}: {type(error).__name__}: {error}") from error


def _read(name_or_path: str | Path, split: str) -> list[tuple[Dataset, str, Path]]:
    """Each file of a dataset as it is stored, how to call it, and what its paths are relative to."""
    files = _local_files(name_or_path, split)
    if files:
        return [(read_file(file), str(file), file.parent) for file in files]
    return [(_read_hub(str(name_or_path), split), str(name_or_path), Path())]


def _local_files(name_or_path: str | Path, split: str) -> list[Path]:
    """The data files of a local path; none if it can only be the name of a hub dataset."""
    path = Path(name_or_path).expanduser()
    if path.is_file():
        if path.suffix not in FORMATS:
            raise InputError(f"{path}: dataset files are {', '.join(FORMATS)}, got {path.suffix or 'no suffix'!r}")
        return [path]
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix in FORMATS and file.is_file())
        files = [file for file in found if file.name.startswith(split)] or found
        if not files:
            raise InputError(f"{path}: no {', '.join(FORMATS)} file in this folder")
        return files
    if path.suffix in FORMATS or path.is_absolute() or str(name_or_path).startswith((".", "~")):
        raise InputError(f"{path}: no such dataset file or folder")
    return []


def _read_hub(name: str, split: str) -> Dataset:
    from datasets import load_dataset

    try:
        return load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: neither a local file or folder nor a readable hub dataset: {error}") from error


def read_file(file: Path) -> Dataset:
    """The rows of a JSONL, JSON or parquet file as they are stored.

    Raises:
        InputError: It cannot be read, or a row is not an object.
    """
    import pyarrow
    from datasets import Dataset

    if file.suffix == ".parquet":
        try:
            return Dataset.from_parquet(glob.escape(str(file)))  # it takes patterns
        except Exception as error:  # datasets wraps whatever its reader met
            raise InputError(f"{file}: not a readable parquet file: {error.__cause__ or error}") from error
    rows = list(_json_rows(file))
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise InputError(f"{file}, row {number}: must be an object of columns and values; got {row!r:.80}")
        if isinstance(row.get("answer"), int | float):
            row["answer"] = str(row["answer"])  # 7 and "1/2" in one column: fine in JSON, not in Arrow
    columns = dict.fromkeys(name for row in rows for name in row)
    try:
        return Dataset.from_dict({name: [row.get(name) for row in rows] for name in columns})
    except pyarrow.ArrowException as error:
        raise InputError(f"{file}: a column has values of different types: {error}") from error


def _json_rows(file: Path) -> Iterator[Any]:
    try:
        text = file.read_text(encoding="utf-8")
        rows = json.loads(text) if file.suffix == ".json" else text.rstrip().split("\n")
    except ValueError as error:
        raise InputError(f"{file}: not valid JSON in UTF-8: {error}") from error
    if file.suffix == ".json":
        if not isinstance(rows, list):
            raise InputError(f"{file}: must be a list of rows, got {type(rows).__name__} (one object a line is .jsonl)")
        yield from rows
        return
    for number, line in enumerate(rows, 1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise InputError(f"{file}, row {number}: not valid JSON: {error}") from error


def _to_conversations(part: Dataset, source: str, folder: Path, system_prompt: str, instruction: str) -> Dataset:
    if not len(part):
        raise InputError(f"{source}: it has no rows")
    column = "images" if "images" in part.column_names else "image"
    for wanted in ("problem", "answer", column):
        if wanted not in part.column_names:
            name = "images" if wanted == "image" else wanted
            raise InputError(f"{source}: no column {name!r}, it has {part.column_names}")

    def convert(table: pyarrow.Table, indices: list[int]) -> dict[str, list[Any]]:
        rows = []
        for index, row in zip(indices, table.to_pylist(), strict=True):
            where = f"{source}, row {index + 1}"
            answer = _text(row["answer"], "answer", where)
            images = _images(row[column], column, where, folder)
            rows.append((_conversation(row["problem"], len(images), where, system_prompt, instruction), answer, images))
        prompts, answers, pictures = map(list, zip(*rows, strict=True))
        others = {name: table[name].to_pylist() for name in part.column_names if name in features}
        return {**others, "prompt": prompts, "answer": answers, "images": pictures}

    features = _features(part)
    return (
        part.with_format("arrow")  # pictures stay encoded
        .map(
            convert,
            batched=True,
            batch_size=256,
            with_indices=True,
            remove_columns=[name for name in ("problem", "image") if name in part.column_names],
            features=features,
            desc="Reading rows",
        )
        .with_format(None)
    )


def _features(part: Dataset) -> Features:
    from datasets import Features, Image, List, Value

    content = List({"type": Value("string"), "text": Value("string")})
    others = {name: kind for name, kind in part.features.items() if name not in ("problem", "image")}
    prompt = List({"role": Value("string"), "content": content})
    return Features({**others, "prompt": prompt, "answer": Value("string"), "images": List(Image(mode="RGB"))})


def _text(value: Any, column: str, where: str) -> str:
    text = "" if value is None else str(value).strip()
    if not text:
        raise InputError(f"{where}, column {column!r}: it is empty")
    return text


def _images(value: Any, column: str, where: str, folder: Path) -> list[dict[str, Any]]:
    """Each image as the `datasets.Image` feature stores it."""
    if value is None:
        return []
    images: list[dict[str, Any]] = []
    for item in value if isinstance(value, list) else [value]:
        stored = item if isinstance(item, dict) else {"path": item}
        if stored.get("bytes"):
            images.append({"bytes": stored["bytes"], "path": None})
        elif stored.get("path") and isinstance(stored["path"], str):
            images.append({"bytes": None, "path": str((folder / stored["path"]).absolute())})
        else:
            raise InputError(f"{where}, column {column!r}: an image is a path or an embedded picture, got {item!r:.80}")
    return images


def _conversation(problem: Any, images: int, where: str, system_prompt: str, instruction: str) -> list[dict[str, Any]]:
    messages = [_message("system", [_part(system_prompt)])] if system_prompt else []
    return [*messages, _message("user", _user_parts(_text(problem, "problem", where), instruction, images, where))]


def _user_parts(problem: str, instruction: str, images: int, where: str) -> list[dict[str, str | None]]:
    marks = problem.count(IMAGE_MARK)
    if not marks:
        return [_part(None)] * images + [_part(f"{problem} {instruction}".strip())]
    if marks != images:
        raise InputError(
            f"{where}, column 'problem': it says {IMAGE_MARK} {marks} times for {images} images; once for each, or not "
            "at all"
        )
    first, *rest = f"{problem} {instruction}".strip().split(IMAGE_MARK)
    parts = [_part(first)]
    for text in rest:
        parts += [_part(None), _part(text)]
    return [part for part in parts if part["text"] != ""]


def _part(text: str | None) -> dict[str, str | None]:
    return {"type": "image" if text is None else "text", "text": text}


def _message(role: str, parts: list[dict[str, str | None]]) -> dict[str, Any]:
    return {"role": role, "content": parts}


def _check_images(parts: list[Dataset], sources: list[str]) -> None:
    """Opens every image once: a broken one must not end a run at its thousandth step."""
    from PIL import Image
    from rich.progress import track

    def rows() -> Iterator[tuple[str, list[dict[str, Any]]]]:
        for part, source in zip(parts, sources, strict=True):
            number = 0
            for table in part.select_columns("images").with_format("arrow").iter(batch_size=64):
                for images in table["images"].to_pylist():
                    number += 1
                    yield f"{source}, row {number}, column 'images'", images

    seen = 0
    for where, images in track(rows(), "Checking images", sum(map(len, parts)), transient=True):
        for stored in images:
            try:
                with Image.open(io.BytesIO(stored["bytes"]) if stored["bytes"] else stored["path"]) as image:
                    if image.format == "PNG":
                        image.verify()  # checksums tell all, at a tenth of the time
                    else:
                        image.draft("RGB", (1, 1))  # JPEG decodes at an eighth of its size
                        image.load()
            except Exception as error:  # Pillow's readers raise many kinds
                what = stored["path"] or "the embedded picture"
                raise InputError(f"{where}: cannot read {what}: {type(error).__name__}: {error}") from error
            seen += 1
    if not seen:
        raise InputError(f"{', '.join(sources)}: no row has an image; training on images needs at least one")
