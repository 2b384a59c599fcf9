"""The two tables of an analysis: a row a response token, and a row a response."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vppo.analysis.responses import Response
from vppo.analysis.token_scores import TokenScores
from vppo.data import Problem
from vppo.errors import InputError
from vppo.files import replacing, write_atomic

FLOATS = [field.name for field in fields(TokenScores) if field.name != "kept"]
TOKENS = pa.schema(
    [
        ("model", pa.string()),
        ("sample", pa.int32()),
        ("response", pa.int32()),
        ("position", pa.int32()),
        ("token_id", pa.int32()),
        ("text", pa.string()),
        ("kept", pa.bool_()),
        *((name, pa.float32()) for name in FLOATS),
    ]
)
TRAJECTORIES = pa.schema(
    [
        ("model", pa.string()),
        ("sample", pa.int32()),
        ("response", pa.int32()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("text", pa.string()),
        ("correct", pa.bool_()),
        ("tokens", pa.int32()),
        ("mean_dependency", pa.float32()),
        ("mean_kl", pa.float32()),
        ("mean_k3", pa.float32()),
        ("kept_overlap_k3", pa.float32()),
        ("image", pa.string()),
        ("perturbed_image", pa.string()),
        ("truncated", pa.bool_()),
    ]
)


def token_rows(response: Response, texts: Sequence[str], scores: TokenScores) -> pa.Table:
    """The rows of one response in the table of tokens; `texts` are those of its tokens."""
    count = len(texts)
    values: dict[str, Any] = {"model": response.model, "sample": response.sample, "response": response.number}
    values = {name: [value] * count for name, value in values.items()}
    values |= {"position": range(count), "token_id": response.ids, "text": texts}
    values |= {field.name: getattr(scores, field.name) for field in fields(scores)}
    return pa.table([pa.array(values[column.name], column.type) for column in TOKENS], schema=TOKENS)


def trajectory_row(
    response: Response,
    texts: Sequence[str],
    scores: TokenScores,
    problem: Problem,
    *,
    correct: bool | None,
    pictures: tuple[str, str],
    keep_ratio: float,
) -> dict[str, Any]:
    """The row of one response in the table of trajectories; `pictures` are the paths of the two views."""
    return {
        "model": response.model,
        "sample": response.sample,
        "response": response.number,
        "question": problem.question,
        "answer": problem.answer,
        "text": "".join(texts),
        "correct": correct,
        "tokens": len(texts),
        "mean_dependency": scores.dependency.mean(dtype=np.float64),
        "mean_kl": scores.kl.mean(dtype=np.float64),
        "mean_k3": scores.k3.mean(dtype=np.float64),
        "kept_overlap_k3": scores.overlap("kl", "k3", keep_ratio),
        "image": pictures[0],
        "perturbed_image": pictures[1],
        "truncated": response.truncated,
    }


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Each token's part of the decoded text; of a character that several tokens make up, the last one has it.

    Args:
        tokenizer: Of the model.
        ids: `n` token ids; special ones are shown.

    Returns:
        `n` texts, which joined are the text of all.
    """

    def decode(start: int, end: int) -> str:
        return tokenizer.decode(ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    texts, start, read = [], 0, 0  # decoding needs the token before: some tokenizers drop a text's first space
    for end in range(1, len(ids) + 1):
        before, text = decode(start, read), decode(start, end)
        if text.endswith("\ufffd") and end < len(ids):
            texts.append("")
            continue
        texts.append(text[len(before) :])
        start, read = read, end
    return texts


def write_table(path: Path, table: pa.Table) -> None:
    """Writes a whole parquet file or none."""
    content = io.BytesIO()
    pq.write_table(table, content)
    write_atomic(path, content.getvalue())


def read_table(path: Path, schema: pa.Schema, remedy: str) -> pa.Table:
    """The rows of one of our files.

    Raises:
        InputError: It is missing, broken, or of other columns; the message ends with what a user can do about it.
    """
    if not path.is_file():
        raise InputError(f"{path}: does not exist; {remedy}")
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: is no whole parquet file ({error}); {remedy}") from None
    if not table.schema.equals(schema):
        raise InputError(f"{path}: has other columns than an analysis writes; {remedy}")
    return table


def join_tables(
    path: Path, parts: Sequence[Path], schema: pa.Schema, remedy: Callable[[Path], str] = lambda part: "remove it"
) -> None:
    """Writes the rows of several files as one, a row group each, without holding them all in memory.

    Raises:
        InputError: A part is missing or broken; the message ends with what `remedy` says about it.
    """
    with replacing(path) as file, pq.ParquetWriter(file, schema) as writer:
        for part in parts:
            writer.write_table(read_table(part, schema, remedy(part)))
