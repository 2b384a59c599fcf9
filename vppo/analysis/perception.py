"""What a model looks at, in numbers: from tables of tokens and responses to the numbers behind every figure.

A table of tokens has the columns of `tokens.parquet`, those of one response together and in order; one of responses has
those of `trajectories.parquet`. "Dependency" is the divergence that the analysis was asked for, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from vppo.analysis.token_types import TYPES, token_type
from vppo_kernels import topk_mask

FLOOR = 1e-8  # nats; what lies below is rounding
RESPONSE = ["model", "sample", "response"]  # what names a response
ESTIMATORS = {"kl": "exact KL", "reverse_kl": "reverse KL", "jsd": "JSD", "k3": "k3", "entropy": "entropy"}
COMPARED = ("kl", "k3", "jsd", "entropy")  # whose kept sets the overlaps are of
TOP_SHARES = (0.1, 0.2, 0.4)
RESAMPLES = 1000


@dataclass(frozen=True)
class Run:
    """One model's responses, analysed.

    Attributes:
        label: Its name in figures and tables.
        tokens: A row per token, ordered by sample, response and position.
        trajectories: A row per response, in the same order.
        keep_ratio: Fraction of each response that counts as kept.
        draws: Perturbations that each number is the mean of.
    """

    label: str
    tokens: pd.DataFrame
    trajectories: pd.DataFrame
    keep_ratio: float = 0.4
    draws: int = 1


@dataclass(frozen=True)
class Distribution:
    """Of non-negative values: their number, mean, quantiles, largest, and the share at or below `FLOOR`."""

    count: int
    mean: float
    median: float
    q90: float
    q99: float
    largest: float
    at_floor: float

    @classmethod
    def of(cls, values: np.ndarray) -> Distribution:
        values = np.asarray(values, dtype=np.float64)
        median, q90, q99 = np.quantile(values, [0.5, 0.9, 0.99]).tolist()
        return cls(
            values.size, float(values.mean()), median, q90, q99, float(values.max()), float((values <= FLOOR).mean())
        )


def log_density(values: np.ndarray, bandwidth: float = 0.12) -> tuple[np.ndarray, np.ndarray]:
    """Density of log10 of the values above `FLOOR`, smoothed by a Gaussian `bandwidth` decades wide.

    Returns:
        The grid in decades, and the share of all values per decade there: its integral is their share above `FLOOR`.
    """
    step = 0.02
    logs = np.log10(np.asarray(values, dtype=np.float64)[np.asarray(values) > FLOOR])
    margin = 4 * bandwidth
    last = max(1.0, float(logs.max())) if logs.size else 1.0
    edges = np.arange(math.log10(FLOOR) - margin, last + margin + step, step)
    counts = np.histogram(logs, edges)[0] / max(1, np.size(values)) / step
    reach = np.arange(-round(margin / step), round(margin / step) + 1) * step
    kernel = np.exp(-0.5 * (reach / bandwidth) ** 2)
    return edges[:-1] + step / 2, np.convolve(counts, kernel / kernel.sum(), mode="same")


def response_starts(tokens: pd.DataFrame) -> np.ndarray:
    """`[responses + 1]` int64: the row at which each response begins, and the number of rows."""
    keys = tokens[RESPONSE]
    new = (keys != keys.shift()).any(axis=1)  # the first row has none before it, which counts as different
    return np.append(np.flatnonzero(new), len(tokens)).astype(np.int64)


def kept_set(tokens: pd.DataFrame, column: str, keep_ratio: float) -> np.ndarray:
    """`[tokens]` bool: the tokens of each response with the highest values of a column, as VPPO keeps them (Eq. 4)."""
    scores = torch.from_numpy(tokens[column].to_numpy(dtype=np.float32).copy())
    starts = torch.from_numpy(response_starts(tokens))
    return topk_mask(scores, torch.ones_like(scores, dtype=torch.bool), keep_ratio, cu_seqlens=starts).numpy()


def overlap(first: np.ndarray, second: np.ndarray, starts: np.ndarray) -> float:
    """Share of a response's first kept set that its second holds too, averaged over the responses."""
    both, kept = (np.add.reduceat(mask.astype(np.int64), starts[:-1]) for mask in (first & second, first))
    return float((both / kept).mean())


def overlaps(tokens: pd.DataFrame, keep_ratio: float, columns: Sequence[str] = COMPARED) -> pd.DataFrame:
    """Overlap of the kept sets by each pair of columns; symmetric, because the sets of a response have one size."""
    starts = response_starts(tokens)
    kept = {column: kept_set(tokens, column, keep_ratio) for column in columns}
    return pd.DataFrame({b: {a: overlap(kept[a], kept[b], starts) for a in columns} for b in columns})


def overlap_by_chance(tokens: pd.DataFrame, keep_ratio: float) -> float:
    """The overlap of a kept set with a random one of the same size."""
    starts = response_starts(tokens)
    kept = np.add.reduceat(kept_set(tokens, "kl", keep_ratio).astype(np.int64), starts[:-1])
    return float((kept / np.diff(starts)).mean())


def lorenz(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`[n + 1]` each: shares of the tokens, most dependent first, and the share of all dependency that they hold."""
    ordered = np.sort(np.asarray(values, dtype=np.float64))[::-1]
    total = float(ordered.sum())
    held = np.cumsum(ordered) / total if total > 0 else np.arange(1, ordered.size + 1) / ordered.size
    return np.arange(ordered.size + 1) / ordered.size, np.append(0.0, held)


def share_of_top(values: np.ndarray, share: float) -> float:
    """Share of all dependency that the `ceil(share * n)` most dependent tokens hold."""
    return float(lorenz(values)[1][math.ceil(share * np.size(values) * (1 - 2**-40))])


def gini(values: np.ndarray) -> float:
    """0 where every token holds the same, towards 1 where one holds everything."""
    tokens, held = lorenz(values)
    return float(2 * np.trapezoid(held, tokens) - 1)


def by_relative_position(tokens: pd.DataFrame, bins: int = 20) -> pd.DataFrame:
    """Mean, median and 90 % quantile of the dependency in each twentieth of the responses, and how many tokens.

    Index: the middle of the bin, from 0 (first token) to 1 (last).
    """
    lengths = np.diff(response_starts(tokens))
    place = (tokens["position"].to_numpy() + 0.5) / np.repeat(lengths, lengths)
    return _spread(tokens, (np.minimum(place * bins, bins - 1).astype(np.int64) + 0.5) / bins)


def by_position(tokens: pd.DataFrame) -> pd.DataFrame:
    """The same by the token's number from the start: 1, 2, 3 and 4, 5 to 8, 9 to 16, ...; index: the bin's first."""
    number = tokens["position"].to_numpy() + 1
    return _spread(tokens, np.where(number == 1, 1, 2 ** np.ceil(np.log2(number) - 1).clip(0).astype(np.int64) + 1))


def _spread(tokens: pd.DataFrame, groups: np.ndarray) -> pd.DataFrame:
    grouped = tokens["dependency"].astype(np.float64).groupby(groups)
    return pd.DataFrame(
        {
            "mean": grouped.mean(),
            "median": grouped.median(),
            "q90": grouped.quantile(0.9),
            "tokens": grouped.size(),
        }
    )


@dataclass(frozen=True)
class Correctness:
    """How the mean dependency of correct responses differs from that of wrong ones.

    Attributes:
        correct, wrong: How many there are of each.
        mean_correct, mean_wrong: Means over responses of their mean dependency.
        low, high: 95 % interval of the difference of the two, from a bootstrap over questions.
        auc: Chance that a random correct response has the higher mean than a random wrong one; ties count half.
        questions: How many have correct and wrong responses.
        within: Mean over those questions of the difference between their correct and their wrong responses; NaN
            without any.
        tokens_correct, tokens_wrong: Mean lengths.
    """

    correct: int
    wrong: int
    mean_correct: float
    mean_wrong: float
    low: float
    high: float
    auc: float
    questions: int
    within: float
    tokens_correct: float
    tokens_wrong: float

    @property
    def difference(self) -> float:
        return self.mean_correct - self.mean_wrong


def correctness(trajectories: pd.DataFrame) -> Correctness | None:
    """Correct against wrong responses; None unless there are both. Responses that were not judged are left out."""
    judged = trajectories[trajectories["correct"].notna()]
    right = judged["correct"].to_numpy(dtype=bool)
    if right.all() or not right.any():
        return None
    means = judged["mean_dependency"].to_numpy(dtype=np.float64)
    ranks = pd.Series(means).rank().to_numpy()
    hits, misses = int(right.sum()), int((~right).sum())
    auc = (ranks[right].sum() - hits * (hits + 1) / 2) / (hits * misses)
    per_question = (
        pd.DataFrame({"n1": right, "s1": means * right, "n0": ~right, "s0": means * ~right})
        .groupby(judged["sample"].to_numpy())
        .sum()
    )
    n1, s1, n0, s0 = (per_question[name].to_numpy(dtype=np.float64) for name in ("n1", "s1", "n0", "s0"))
    both = (n1 > 0) & (n0 > 0)
    weights = resampling_weights(len(per_question))
    with np.errstate(invalid="ignore"):  # a resample without a wrong response says nothing
        differences = (weights @ s1) / (weights @ n1) - (weights @ s0) / (weights @ n0)
    low, high = np.nanquantile(differences, [0.025, 0.975]).tolist()
    lengths = judged["tokens"].to_numpy(dtype=np.float64)
    return Correctness(
        correct=hits,
        wrong=misses,
        mean_correct=float(means[right].mean()),
        mean_wrong=float(means[~right].mean()),
        low=low,
        high=high,
        auc=float(auc),
        questions=int(both.sum()),
        within=float((s1[both] / n1[both] - s0[both] / n0[both]).mean()) if both.any() else math.nan,
        tokens_correct=float(lengths[right].mean()),
        tokens_wrong=float(lengths[~right].mean()),
    )


def resampling_weights(count: int) -> np.ndarray:
    """`[RESAMPLES, count]`: how often each of `count` things is drawn in a bootstrap; the same in every process."""
    return np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), RESAMPLES).astype(np.float64)


def rank_correlation(first: np.ndarray | pd.Series, second: np.ndarray | pd.Series) -> float:
    """Spearman's: of the ranks, ties sharing theirs; NaN where one is constant."""
    ranks = [pd.Series(np.asarray(values)).rank().to_numpy() for values in (first, second)]
    if any(np.ptp(rank) == 0 for rank in ranks):
        return math.nan
    return float(np.corrcoef(ranks)[0, 1])


def held_by_entropy(tokens: pd.DataFrame, keep_ratio: float) -> float:
    """Share of all dependency at the tokens that filtering by entropy would keep."""
    values = tokens["dependency"].to_numpy(dtype=np.float64)
    total = values.sum()
    return float(values[kept_set(tokens, "entropy", keep_ratio)].sum() / total) if total > 0 else math.nan


def by_entropy(tokens: pd.DataFrame, bins: int = 10) -> pd.DataFrame:
    """The dependency's mean, median and 90 % quantile in tenths of the tokens by entropy; index: the tenth's middle."""
    rank = tokens["entropy"].rank(method="first").to_numpy() - 1
    return _spread(tokens, (np.floor(rank * bins / len(tokens)) + 0.5) / bins)


def token_types(tokens: pd.DataFrame) -> pd.DataFrame:
    """For each kind of token that occurs, in the order of `TYPES`, over all responses.

    Columns: tokens (their number), share (of all tokens), mean (dependency), held (share of all dependency), kept (the
    share of them that is kept).
    """
    kinds = tokens["text"].map({text: token_type(text) for text in tokens["text"].unique()})
    values = tokens["dependency"].astype(np.float64)
    table = pd.DataFrame(
        {
            "tokens": values.groupby(kinds).size(),
            "mean": values.groupby(kinds).mean(),
            "held": values.groupby(kinds).sum() / (float(values.sum()) or 1.0),
            "kept": tokens["kept"].groupby(kinds).mean(),
        }
    )
    table.insert(1, "share", table["tokens"] / len(tokens))
    return table.loc[[kind for kind in TYPES if kind in table.index]]


def top_tokens(tokens: pd.DataFrame, count: int = 12, at_least: int = 10) -> pd.DataFrame:
    """The token texts of highest mean dependency among those that occur often enough to have a mean worth the name.

    Args:
        tokens: The table.
        count: How many.
        at_least: Occurrences; blanks around a text do not count, so "3" and " 3" are one.

    Returns:
        Index: the text. Columns: tokens, mean, kept. Highest mean first, the more frequent first among equals.
    """
    text = tokens["text"].str.strip().where(tokens["text"].str.strip() != "", tokens["text"])
    values = tokens["dependency"].astype(np.float64).groupby(text)
    table = pd.DataFrame({"tokens": values.size(), "mean": values.mean(), "kept": tokens["kept"].groupby(text).mean()})
    often = table[table["tokens"] >= at_least]
    return often.sort_values(["mean", "tokens"], ascending=False, kind="stable").head(count)


@dataclass(frozen=True)
class OneDraw:
    """What one perturbation tells, against the mean of all draws.

    Attributes:
        relative_kept, relative_other: `[n]` standard deviation of one draw over the mean, for the tokens above `FLOOR`
            that are kept, and for the others.
        overlap_kl: Of the first draw's kept set by exact KL with that of the mean.
        overlap_k3: The same by k3, first draw and mean.
        overlap_k3_kl: Of the first draw's kept set by k3 with that of the mean exact KL.
    """

    relative_kept: np.ndarray
    relative_other: np.ndarray
    overlap_kl: float
    overlap_k3: float
    overlap_k3_kl: float


def one_draw(tokens: pd.DataFrame, keep_ratio: float, draws: int) -> OneDraw | None:
    """How far one draw can be trusted; None with a single draw, which says nothing of its own error.

    The mean holds the first draw too, so two independent draws agree less than the overlaps say.
    """
    error = tokens["dependency_se"].to_numpy(dtype=np.float64)
    if draws < 2 or np.isnan(error).all():
        return None
    mean, kept = tokens["dependency"].to_numpy(dtype=np.float64), tokens["kept"].to_numpy(dtype=bool)
    usable = (mean > FLOOR) & ~np.isnan(error)
    relative = error[usable] * math.sqrt(draws) / mean[usable]
    starts = response_starts(tokens)
    sets = {name: kept_set(tokens, name, keep_ratio) for name in ("kl", "k3", "kl_first", "k3_first")}
    return OneDraw(
        relative_kept=relative[kept[usable]],
        relative_other=relative[~kept[usable]],
        overlap_kl=overlap(sets["kl_first"], sets["kl"], starts),
        overlap_k3=overlap(sets["k3_first"], sets["k3"], starts),
        overlap_k3_kl=overlap(sets["k3_first"], sets["kl"], starts),
    )


def summarise(
    tokens: pd.DataFrame, trajectories: pd.DataFrame, keep_ratio: float = 0.4, draws: int = 1
) -> dict[str, Any]:
    """The numbers of every figure, for each model; they can be written as JSON.

    Args:
        tokens: A row per token; rows may stand in any order.
        trajectories: A row per response.
        keep_ratio: Fraction of each response that counts as kept, in (0, 1].
        draws: Perturbations that each number is the mean of.

    Returns:
        Model label to its numbers. What cannot be told, for want of draws or of wrong answers, is None.
    """
    return {run.label: summarise_run(run) for run in runs_of(tokens, trajectories, keep_ratio, draws)}


def runs_of(tokens: pd.DataFrame, trajectories: pd.DataFrame, keep_ratio: float = 0.4, draws: int = 1) -> list[Run]:
    """A run for each model of the tables, in the order of their first response; rows may stand in any order."""
    return [
        Run(
            str(model),
            _ordered(tokens[tokens["model"] == model]),
            _ordered(trajectories[trajectories["model"] == model]),
            keep_ratio,
            draws,
        )
        for model in trajectories["model"].unique()
    ]


def _ordered(table: pd.DataFrame) -> pd.DataFrame:
    by = [*RESPONSE[1:], *(["position"] if "position" in table else [])]
    return table.sort_values(by, kind="stable").reset_index(drop=True)


def summarise_run(run: Run) -> dict[str, Any]:
    """The numbers of one run's figures."""
    tokens, trajectories, ratio = run.tokens, run.trajectories, run.keep_ratio
    values = tokens["dependency"].to_numpy(dtype=np.float64)
    means = trajectories["mean_dependency"].to_numpy(dtype=np.float64)
    judged = trajectories["correct"].dropna()
    outcome, draw, sets = correctness(trajectories), one_draw(tokens, ratio, run.draws), overlaps(tokens, ratio)
    pairs = [(a, b) for i, a in enumerate(COMPARED) for b in COMPARED[i + 1 :]]
    numbers = {
        "responses": len(trajectories),
        "questions": int(trajectories["sample"].nunique()),
        "truncated": float(trajectories["truncated"].mean()),
        "accuracy": float(judged.mean()) if len(judged) else None,
        "token_dependency": vars(Distribution.of(values)),
        "trajectory_dependency": vars(Distribution.of(means)),
        "share_of_top": {f"{share:g}": share_of_top(values, share) for share in TOP_SHARES},
        "gini": gini(values),
        "by_relative_position": {f"{place:g}": mean for place, mean in by_relative_position(tokens)["mean"].items()},
        "by_position": {str(first): mean for first, mean in by_position(tokens)["mean"].items()},
        "correct_against_wrong": None if outcome is None else {**vars(outcome), "difference": outcome.difference},
        "entropy": {
            "rank_correlation": rank_correlation(tokens["entropy"], tokens["dependency"]),
            "dependency_held": held_by_entropy(tokens, ratio),
        },
        "overlap": {f"{a}, {b}": float(sets.loc[a, b]) for a, b in pairs}
        | {"by chance": overlap_by_chance(tokens, ratio)},
        "token_types": token_types(tokens).to_dict("index"),
        "top_tokens": top_tokens(tokens).reset_index(names="text").to_dict("records"),
        "one_draw": None
        if draw is None
        else {
            "median_relative_error_kept": _median(draw.relative_kept),
            "median_relative_error_other": _median(draw.relative_other),
            "overlap_kl": draw.overlap_kl,
            "overlap_k3": draw.overlap_k3,
            "overlap_k3_kl": draw.overlap_k3_kl,
        },
    }
    return json_ready(numbers)


def _median(values: np.ndarray) -> float:
    return float(np.median(values)) if values.size else math.nan


def json_ready(value: Any) -> Any:
    """For JSON: NumPy's numbers as Python's, NaN as None."""
    if isinstance(value, dict):
        return {key: json_ready(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [json_ready(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
