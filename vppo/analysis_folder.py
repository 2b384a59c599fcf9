"""Reading what `vppo analyze` wrote: its tables and its summary, checked before anything is made of them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vppo.errors import InputError
from vppo.perception import ESTIMATORS, RESPONSE, Run, response_starts, runs_of

_NUMBERS = ("dependency", *ESTIMATORS, "kl_first", "k3_first", "logprob", "logprob_perturbed", "entropy_perturbed")
TOKEN_COLUMNS = (*RESPONSE, "position", "token_id", "text", "kept", *_NUMBERS, "dependency_se")
_MEANS = ("mean_dependency", "mean_kl", "mean_k3", "kept_overlap_k3")
_TEXTS = ("model", "question", "text", "image", "perturbed_image")
TRAJECTORY_COLUMNS = ("sample", "response", *_TEXTS, "answer", "correct", "tokens", *_MEANS, "truncated")


@dataclass(frozen=True)
class AnalysisFolder:
    """A finished analysis.

    Attributes:
        path: The folder.
        summary: What `summary.json` holds.
        tokens: `tokens.parquet`, ordered by model (as they first occur), sample, response and position.
        trajectories: `trajectories.parquet`, in the same order; "correct" is pandas' nullable boolean.
    """

    path: Path
    summary: dict[str, Any]
    tokens: pd.DataFrame
    trajectories: pd.DataFrame

    @property
    def keep_ratio(self) -> float:
        return float(self.summary["keep_ratio"])

    @property
    def draws(self) -> int:
        return int(self.summary.get("draws", 1))

    def runs(self) -> list[Run]:
        """A run for each model."""
        return runs_of(self.tokens, self.trajectories, self.keep_ratio, self.draws)


def read_analysis(path: Path) -> AnalysisFolder:
    """Reads and checks a folder that `vppo analyze` has finished.

    Raises:
        InputError: A file is missing, unreadable or empty, lacks a column, or the two tables do not belong together;
            the message names the file and what it lacks.
    """
    if not path.is_dir():
        raise InputError(f"{path}: is no folder; takes one that `vppo analyze` wrote")
    summary = _read_summary(path / "summary.json")
    tokens = _read_table(
        path / "tokens.parquet", TOKEN_COLUMNS, numbers=("position", *_NUMBERS), texts=("model", "text")
    )
    trajectories = _read_table(
        path / "trajectories.parquet", TRAJECTORY_COLUMNS, numbers=("tokens", *_MEANS), texts=_TEXTS
    )
    trajectories["correct"] = trajectories["correct"].astype("boolean")
    models = {model: place for place, model in enumerate(trajectories["model"].unique())}
    tokens, trajectories = _ordered(tokens, models, [*RESPONSE, "position"]), _ordered(trajectories, models, RESPONSE)
    _check_match(path, tokens, trajectories)
    return AnalysisFolder(path, summary, tokens, trajectories)


def _ordered(table: pd.DataFrame, models: dict[str, int], by: Sequence[str]) -> pd.DataFrame:
    return table.sort_values(
        list(by), kind="stable", key=lambda column: column.map(models) if column.name == "model" else column
    ).reset_index(drop=True)


def _read_summary(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise InputError(f"{file}: does not exist; takes a folder that `vppo analyze` has finished")
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: is no JSON ({error})") from None
    if not isinstance(summary, dict):
        raise InputError(f"{file}: got a {type(summary).__name__}, takes an object")
    ratio = summary.get("keep_ratio")
    if not isinstance(ratio, int | float) or not 0 < ratio <= 1:
        raise InputError(f"{file}: keep_ratio: got {ratio!r}, takes a number above 0 and at most 1")
    if summary.get("divergence") not in ESTIMATORS:
        divergences = ", ".join(name for name in ESTIMATORS if name != "entropy")
        raise InputError(f"{file}: divergence: got {summary.get('divergence')!r}, takes one of {divergences}")
    return summary


def _read_table(file: Path, columns: Sequence[str], *, numbers: Sequence[str], texts: Sequence[str]) -> pd.DataFrame:
    if not file.is_file():
        raise InputError(f"{file}: does not exist; takes a folder that `vppo analyze` has finished")
    try:
        table = pd.read_parquet(file)
    except (OSError, ValueError) as error:  # pyarrow's errors are both
        raise InputError(f"{file}: is no parquet file ({error})") from None
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise InputError(f"{file}: has no column {', '.join(missing)}; takes all of {', '.join(columns)}")
    if table.empty:
        raise InputError(f"{file}: has no rows; nothing was analysed")
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
    """Every response has as many rows of tokens as it says, numbered from 0."""
    starts = response_starts(tokens)
    found = tokens[RESPONSE].iloc[starts[:-1]].assign(rows=np.diff(starts))
    both = trajectories[[*RESPONSE, "tokens"]].merge(found, how="outer", on=RESPONSE, validate=None)
    for row in both[both["tokens"].fillna(-1) != both["rows"].fillna(0)].itertuples():
        counts = [0 if math.isnan(count) else int(count) for count in (row.tokens, row.rows)]
        raise InputError(
            f"{path}: response {row.response} of sample {row.sample} has {counts[0]} tokens by trajectories.parquet "
            f"and {counts[1]} rows in tokens.parquet"
        )
    position = np.arange(len(tokens)) - np.repeat(starts[:-1], np.diff(starts))
    wrong = tokens["position"].to_numpy() != position
    if wrong.any():
        row = int(wrong.argmax())
        raise InputError(
            f"{path / 'tokens.parquet'}: column position: row {row} of the ordered table has "
            f"{tokens['position'].iloc[row]}, takes {position[row]}"
        )
