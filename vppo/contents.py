"""What tells one analysis or run from another: the contents of model, data and responses, and not their names alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from vppo.data import Problems
from vppo.errors import InputError

# of a model's folder: what is loaded of it, and not what training leaves beside it
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
PROCESSOR = ("*config.json", "*token*.json", "vocab.*", "merges.txt", "*.model", "chat_template*", "*.jinja", "*.py")


def digest(value: Any) -> str:
    """A fingerprint of rows by what they hold, numbers, texts, bytes, arrays and pictures; 16 hexadecimal digits."""
    found = hashlib.sha256()
    _feed(found, value)
    return found.hexdigest()[:16]


def digest_file(path: str | Path) -> str:
    """A fingerprint of a file's content.

    Raises:
        InputError: There is no such file.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"responses: {path}: no such file")
    return _sha256(path)[:16]


def digest_folder(folder: Path, patterns: Iterable[str]) -> str:
    """A fingerprint of the names and contents of the files of a folder that one of the patterns fits.

    All bytes are read: a step of training in 16 bits moves few weights, and neither sizes nor a sample need show it.
    The files are those that the model is loaded from next, so the disk reads them once.
    """
    files = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter's lock
        return digest([(path.name, content) for path, content in zip(files, pool.map(_sha256, files), strict=True)])


def digest_problems(problems: Problems, count: int) -> str:
    """A fingerprint of the first problems as the model gets them: messages, pixels and answers, and what is broken."""
    found = hashlib.sha256()
    for index in range(count):
        try:
            problem = problems[index]
            _feed(found, [problem.prompt, problem.images, problem.answer])
        except InputError as error:
            _feed(found, str(error))
    return found.hexdigest()[:16]


def digest_model(model: torch.nn.Module) -> str:
    """A fingerprint of the weights of a model in memory."""
    return digest({name: tensor for name, tensor in model.state_dict().items()})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _feed(found: Any, value: Any) -> None:
    """Type and length go first, so that no two values feed the same bytes."""
    if isinstance(value, torch.Tensor):
        _feed(found, ["tensor", str(value.dtype), list(value.shape)])
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        found.update(f"mapping {len(value)} ".encode())
        for key in sorted(value, key=str):
            _feed(found, str(key))
            _feed(found, value[key])
    elif isinstance(value, str | bytes):
        content = value.encode(errors="surrogatepass") if isinstance(value, str) else value
        found.update(f"{type(value).__name__} {len(content)} ".encode() + content)
    elif hasattr(value, "tobytes"):  # NumPy's arrays and numbers, and pictures
        about = [str(getattr(value, name, "")) for name in ("dtype", "shape", "mode", "size")]
        _feed(found, [*about, value.tobytes()])
    elif isinstance(value, Sequence):
        found.update(f"sequence {len(value)} ".encode())
        for item in value:
            _feed(found, item)
    elif isinstance(value, float) and math.isnan(value):
        found.update(b"nan ")
    else:
        found.update(f"{type(value).__name__} {value!r} ".encode())
