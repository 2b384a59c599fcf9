"""What verdicts say: accuracy with its uncertainty, pass@k, what needs no looking, and whether two runs differ."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from math import comb
from typing import Any

import numpy as np
import pandas as pd

from vppo.analysis.perception import correctness, json_ready, resampling_weights

FLIPS = 10_000  # random signs of the paired test


@dataclass(frozen=True)
class Estimate:
    """A mean over questions, and its 95 % interval from a bootstrap over the questions (of one question, none)."""

    mean: float
    low: float
    high: float


def estimate(values: np.ndarray) -> Estimate:
    """Of `[n]` values, one a question."""
    if not len(values):
        return Estimate(math.nan, math.nan, math.nan)
    low, high = np.quantile(resampling_weights(len(values)) @ values / len(values), [0.025, 0.975]).tolist()
    return Estimate(float(values.mean()), low, high)


def average(values: list[np.ndarray]) -> Estimate:
    """The mean of several sets' means, each set with the same weight; questions are resampled within their set."""
    means = np.mean([one.mean() for one in values])
    draws = [_resampled(one, number) for number, one in enumerate(values)]
    low, high = np.quantile(np.mean(draws, axis=0), [0.025, 0.975]).tolist()
    return Estimate(float(means), low, high)


def _resampled(values: np.ndarray, number: int) -> np.ndarray:
    """Bootstrap means; the sets' draws are independent of each other."""
    weights = resampling_weights(len(values))
    return np.random.default_rng(number).permutation(weights @ values / len(values))


def pass_at(correct: int, samples: int, k: int) -> float:
    """The chance that one of `k` answers is right, unbiased from `correct` right ones of `samples` (Chen 2021)."""
    return 1.0 - comb(samples - correct, k) / comb(samples, k)


def summarise_set(answers: pd.DataFrame) -> dict[str, Any]:
    """The numbers of one set, for JSON; what cannot be told is None.

    Args:
        answers: A row an answer, with the columns of `vppo.evaluation.run.ANSWERS`.
    """
    seen, blind = answers[answers["view"] == "seen"], answers[answers["view"] != "seen"]
    by_question = seen.groupby("question")["correct"].agg(["sum", "count"])
    rights, counts = by_question["sum"].to_numpy(), by_question["count"].to_numpy()
    samples = int(counts.min()) if len(counts) else 0
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64) if k < samples] + ([samples] if samples else [])
    passed = {k: np.array([pass_at(int(c), int(n), k) for c, n in zip(rights, counts, strict=True)]) for k in ks}
    numbers: dict[str, Any] = {
        "questions": len(by_question),
        "samples": samples,
        "accuracy": asdict(estimate(rights / counts)) if samples else None,
        "pass_at": {str(k): asdict(estimate(values)) for k, values in passed.items()},
        "blind": None,
        "seen_minus_blind": None,
        "no_box": float((seen["answer"].isna()).mean()),
        "in_form": float(seen["in_form"].mean()),
        "cut": float((~seen["ended"]).mean()),
        "undecided": int(seen["undecided"].sum()),
        "tokens": _lengths(seen),
        "dependency": _dependency(seen),
        "subjects": _subjects(seen),
    }
    if len(blind):
        right_blind = blind.groupby("question")["correct"].mean()
        both = pd.concat([seen.groupby("question")["correct"].mean(), right_blind], axis=1, join="inner").to_numpy(
            float
        )
        numbers["blind"] = asdict(estimate(right_blind.to_numpy(dtype=np.float64)))
        numbers["seen_minus_blind"] = asdict(estimate(both[:, 0] - both[:, 1]))
    return json_ready(numbers)


def _lengths(answers: pd.DataFrame) -> dict[str, float]:
    right = answers["correct"].to_numpy(dtype=bool)
    tokens = answers["tokens"].to_numpy(dtype=np.float64)
    return {
        "mean": float(tokens.mean()),
        "median": float(np.median(tokens)),
        "p95": float(np.quantile(tokens, 0.95)),
        "mean_right": float(tokens[right].mean()) if right.any() else math.nan,
        "mean_wrong": float(tokens[~right].mean()) if (~right).any() else math.nan,
    }


def _dependency(answers: pd.DataFrame) -> dict[str, Any] | None:
    """The mean dependency of the answers that were measured, and how it goes with being right."""
    measured = answers[answers["dependency"].notna()]
    if measured.empty:
        return None
    outcome = correctness(
        measured.rename(columns={"question": "sample", "sample": "response", "dependency": "mean_dependency"})
    )
    per_question = measured.groupby("question")["dependency"].mean().to_numpy(dtype=np.float64)
    return {
        "answers": len(measured),
        "questions": len(per_question),
        **asdict(estimate(per_question)),
        "right_against_wrong": None if outcome is None else {**asdict(outcome), "difference": outcome.difference},
    }


def _subjects(answers: pd.DataFrame) -> dict[str, Any]:
    found = {}
    for subject, own in answers[answers["subject"].notna()].groupby("subject"):
        values = own.groupby("question")["correct"].mean().to_numpy(dtype=np.float64)
        found[str(subject)] = {"questions": len(values), **asdict(estimate(values))}
    return found


@dataclass(frozen=True)
class Paired:
    """One run against another on the questions that both were asked.

    Attributes:
        questions: How many.
        first, second: Their mean accuracies on these.
        difference: The second's minus the first's.
        low, high: Its 95 % interval, from a bootstrap over the questions.
        p: Of the paired randomisation test: the chance of a difference as large where each question's answers could as
            well have come from the other run.
        better, worse: Questions on which the second run is better, and worse.
    """

    questions: int
    first: float
    second: float
    difference: float
    low: float
    high: float
    p: float
    better: int
    worse: int


def paired(first: np.ndarray, second: np.ndarray) -> Paired:
    """Of `[n]` accuracies each, question by question."""
    gaps = second - first
    found = estimate(gaps)
    return Paired(
        questions=len(gaps),
        first=float(first.mean()),
        second=float(second.mean()),
        difference=found.mean,
        low=found.low,
        high=found.high,
        p=randomisation_test([gaps]),
        better=int((gaps > 0).sum()),
        worse=int((gaps < 0).sum()),
    )


def paired_average(first: list[np.ndarray], second: list[np.ndarray]) -> Paired:
    """The same over several sets, each with the same weight."""
    gaps = [b - a for a, b in zip(first, second, strict=True)]
    found = average(gaps)
    return Paired(
        questions=sum(map(len, gaps)),
        first=float(np.mean([one.mean() for one in first])),
        second=float(np.mean([one.mean() for one in second])),
        difference=found.mean,
        low=found.low,
        high=found.high,
        p=randomisation_test(gaps),
        better=int(sum((one > 0).sum() for one in gaps)),
        worse=int(sum((one < 0).sum() for one in gaps)),
    )


def randomisation_test(gaps: list[np.ndarray], seed: int = 0) -> float:
    """Two-sided p of the mean of the sets' mean differences, under random signs of each question's difference."""
    rng = np.random.default_rng(seed)
    observed, drawn = 0.0, np.zeros(FLIPS)
    for values in gaps:
        moved = values[values != 0]
        observed += values.mean() / len(gaps)
        for part in np.array_split(drawn, 10):  # views: one of the largest sets at once would take 300 MB
            signs = rng.integers(0, 2, (len(part), len(moved)), dtype=np.int8) * 2 - 1
            part += signs @ moved / len(values) / len(gaps)
    return float((1 + (np.abs(drawn) >= abs(observed) - 1e-12).sum()) / (1 + FLIPS))
