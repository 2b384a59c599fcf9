"""Reading what `vppo analyze` wrote: its tables and its summary, checked before anything is made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from vppo.analysis.perception import ESTIMATORS, RESPONSE, Run, runs_of
from vppo.errors import InputError
from vppo.folders import kind_of, read_object

_NUMBERS = ("dependency", *ESTIMATORS, "kl_first", "k3_first", "logprob", "logprob_perturbed", "entropy_perturbed")
TOKEN_COLUMNS = (*RESPONSE, "position", "token_id", "text", "kept", *_NUMBERS, "dependency_se")
_MEANS = ("mean_dependency", "mean_kl", "mean_k3", "kept_overlap_k3")
_TEXTS = ("model", "question", "text", "image", "perturbed_image")
_INTEGERS = (pd.api.types.is_integer_dtype, "whole numbers")
_FLAGS = (pd.api.types.is_bool_dtype, "true and false")
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("sample", "response", "position", "token_id", "tokens"), _INTEGERS),
    **dict.fromkeys(("kept", "truncated"), _FLAGS),
    "dependency_se": (pd.api.types.is_numeric_dtype, "numbers"),
}
FILES = ("summary.json", "tokens.parquet", "trajectories.parquet")
TRAJECTORY_COLUMNS = ("sample", "response", *_TEXTS, "answer", "correct", "tokens", *_MEANS, "truncated")


@dataclass(frozen=True)
class AnalysisFolder:
    """A finished analysis.

    Attributes:
        path: The folder.
        summary: What `summary.json` holds.
        runs: A run for each model, with its rows of the two tables in order; "correct" is pandas' nullable boolean.
    """

    path: Path
    summary: dict[str, Any]
    runs: list[Run]


def read_analysis(path: Path) -> AnalysisFolder:
    """Reads and checks a folder that `vppo analyze` has finished.

    Raises:
        InputError: A file is missing, unreadable or empty, lacks a column, or the two tables do not belong together;
            the message names the file and what it lacks.
    """
    if not path.is_dir():
        raise InputError(f"{path}: is no folder; takes one that `vppo analyze` wrote")
    missing = [name for name in FILES if not (path / name).is_file()]
    if missing:
        what = f"{path / missing[0]}: does not exist" if len(missing) == 1 else f"{path}: has no {', '.join(missing)}"
        raise InputError(f"{what}; takes a folder that `vppo analyze` has finished{_instead(path)}")
    summary = _read_summary(path / "summary.json")
    tokens = _read_table(
        path / "tokens.parquet", TOKEN_COLUMNS, numbers=("position", *_NUMBERS), texts=("model", "text")
    )
    trajectories = _read_table(
        path / "trajectories.parquet", TRAJECTORY_COLUMNS, numbers=("tokens", *_MEANS), texts=_TEXTS
    )
    try:
        trajectories["correct"] = trajectories["correct"].astype("boolean")
    except (TypeError, ValueError):
        kind = trajectories["correct"].dtype
        raise InputError(
            f"{path / 'trajectories.parquet'}: column correct: got {kind}, takes true, false and nothing"
        ) from None
    _check_match(path, tokens, trajectories)
    runs = runs_of(tokens, trajectories, float(summary["keep_ratio"]), int(summary.get("draws", 1)))
    return AnalysisFolder(path, summary, runs)


def _instead(path: Path) -> str:
    """What the folder is, and what to do with it, where it is no analysis."""
    kind = kind_of(path)
    if kind == "a run of `vppo demo`":
        return (
            f"; this is {kind}: vppo analyze --model {path / 'model'} --data {path / 'held_out.parquet'} "
            "--max-tokens 20 --out FOLDER analyses its model"
        )
    if kind == "the beginning of an analysis":
        return f"; this is {kind}: the command that began it goes on with it"
    return "" if kind == "an analysis" else f"; this holds {kind}"


def _read_summary(file: Path) -> dict[str, Any]:
    summary = read_object(file)
    for name in ("keep_ratio", "divergence"):
        if name not in summary:
            raise InputError(f"{file}: has no {name}; takes one that `vppo analyze` wrote")
    ratio, divergence, draws = summary["keep_ratio"], summary["divergence"], summary.get("draws", 1)
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
        raise InputError(f"{file}: keep_ratio: got {ratio!r}, takes a number above 0 and at most 1")
    if not isinstance(divergence, str) or divergence not in ESTIMATORS:
        divergences = ", ".join(name for name in ESTIMATORS if name != "entropy")
        raise InputError(f"{file}: divergence: got {divergence!r}, takes one of {divergences}")
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise InputError(f"{file}: draws: got {draws!r}, takes a whole number from 1")
    skipped = summary.get("skipped", [])
    if not isinstance(skipped, list) or not all(isinstance(row, dict) for row in skipped):
        raise InputError(f"{file}: skipped: takes a list of objects")
    return summary


def _read_table(file: Path, columns: Sequence[str], *, numbers: Sequence[str], texts: Sequence[str]) -> pd.DataFrame:
    try:
        table = pd.read_parquet(file)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(f"{file}: is no parquet file ({error})") from None
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise InputError(f"{file}: has no column {', '.join(missing)}; takes all of {', '.join(columns)}")
    if table.empty:
        raise InputError(f"{file}: has no rows; nothing was analysed")
    for column, (check, kind) in _KINDS.items():
        if column in columns and not check(table[column]):
            raise InputError(f"{file}: column {column}: got {table[column].dtype}, takes {kind}")
    for column in numbers:
        if not pd.api.types.is_numeric_dtype(table[column]):
            raise InputError(f"{file}: column {column}: got {table[column].dtype}, takes numbers")
        bad = ~np.isfinite(table[column].to_numpy(dtype=np.float64, na_value=math.nan))
        if bad.any():
            raise InputError(f"{file}: column {column}: {bad.sum()} of {len(table)} rows are not finite")
    for column in texts:
        wrong = table[column].map(lambda value: not isinstance(value, str))
        if wrong.any():
            raise InputError(f"{file}: column {column}: row {int(wrong.argmax())} is no text")
    return table


def _check_match(path: Path, tokens: pd.DataFrame, trajectories: pd.DataFrame) -> None:
    """Every response stands once among the responses and has as many tokens as it says, numbered from 0."""
    found = tokens.groupby(RESPONSE)["position"].agg(rows="size", distinct="nunique", last="max").reset_index()
    both = trajectories[[*RESPONSE, "tokens"]].merge(found, how="outer", on=RESPONSE).fillna(0)
    for row in both.itertuples():
        name = f"{path}: response {row.response} of sample {row.sample} of model {row.model!r}"
        if row.tokens != row.rows or not row.rows:
            raise InputError(
                f"{name} has {int(row.tokens)} tokens by trajectories.parquet, {int(row.rows)} rows in tokens.parquet"
            )
        if row.distinct != row.rows or row.last != row.rows - 1:
            raise InputError(f"{name} has positions in tokens.parquet that are not 0 to {int(row.rows) - 1}")
    twice = trajectories.duplicated(RESPONSE)
    if twice.any():
        raise InputError(f"{path / 'trajectories.parquet'}: row {int(twice.argmax())} repeats a response")
