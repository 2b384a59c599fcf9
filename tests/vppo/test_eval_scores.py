"""The statistics of an evaluation, against their definitions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest

from vppo.evaluation.scores import (
    average,
    estimate,
    paired,
    paired_average,
    pass_at,
    randomisation_test,
    summarise_set,
)


@pytest.mark.parametrize("correct", [0, 1, 3, 8])
def test_pass_at_k_is_the_share_of_the_subsets_with_a_right_answer(correct: int) -> None:
    answers = [True] * correct + [False] * (8 - correct)
    for k in (1, 2, 5, 8):
        subsets = list(itertools.combinations(answers, k))
        assert pass_at(correct, 8, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_the_bootstrap_has_the_width_of_the_normal_approximation() -> None:
    values = (np.random.default_rng(0).random(2000) < 0.3).astype(float)
    found = estimate(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert found.mean == values.mean()
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert vars(estimate(np.ones(5))) == {"mean": 1.0, "low": 1.0, "high": 1.0}


def test_an_average_weighs_the_sets_alike_and_draws_from_each_by_itself() -> None:
    rng = np.random.default_rng(1)
    sets = [(rng.random(n) < p).astype(float) for n, p in ((400, 0.2), (400, 0.6), (1600, 0.7))]
    found = average(sets)
    assert found.mean == pytest.approx(np.mean([one.mean() for one in sets]))
    half = 1.96 * math.sqrt(sum(one.var() / len(one) for one in sets)) / 3
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)


def test_the_randomisation_test_against_all_signs() -> None:
    gaps = np.array([0.5, 0.25, -0.125, 0.0, 0.375, 0.25, -0.25, 0.5, 0.125])
    every = [abs(np.mean(gaps * signs)) for signs in itertools.product((1, -1), repeat=len(gaps))]
    exact = np.mean(np.array(every) >= abs(gaps.mean()) - 1e-12)
    assert randomisation_test([gaps]) == pytest.approx(exact, abs=0.02)
    assert randomisation_test([np.zeros(5)]) == 1.0
    assert randomisation_test([np.ones(40)]) < 0.001
    assert randomisation_test([np.ones(40), np.zeros(1)]) < 0.001


def test_the_test_rejects_as_often_as_it_says() -> None:
    """Of two runs of one model: 5 % of the time at 0.05, within five standard errors."""
    rng = np.random.default_rng(2)
    skill = rng.random(60)
    rejected = 0
    for _ in range(200):
        first, second = ((rng.random((60, 4)) < skill[:, None]).mean(1) for _ in range(2))
        rejected += paired(first, second).p < 0.05
    assert rejected / 200 < 0.05 + 5 * math.sqrt(0.05 * 0.95 / 200)


def test_paired() -> None:
    first, second = np.array([0.0, 0.5, 1.0, 0.25]), np.array([0.5, 0.5, 0.75, 0.5])
    found = paired(first, second)
    assert (found.questions, found.first, found.second, found.difference) == (4, 0.4375, 0.5625, 0.125)
    assert (found.better, found.worse) == (2, 1) and found.low <= 0.125 <= found.high
    both = paired_average([first, np.zeros(2)], [second, np.ones(2)])
    assert both.difference == pytest.approx((0.125 + 1) / 2) and (both.better, both.questions) == (4, 6)


def table() -> pd.DataFrame:
    """Two questions of two answers each, and one blind."""
    rows = []
    for question, verdicts in enumerate([[True, False], [True, True]]):
        for sample, correct in enumerate(verdicts):
            rows.append({
                "view": "seen", "question": question, "sample": sample, "subject": "sums", "tokens": 10 * (sample + 1),
                "ended": sample == 0, "answer": "1" if correct else None, "in_form": correct, "correct": correct,
                "undecided": not correct, "dependency": 0.5 * sample if question else math.nan,
            })  # fmt: skip
        rows.append({**rows[-1], "view": "grey", "sample": 0, "correct": question == 0, "dependency": math.nan})
    return pd.DataFrame(rows)


def test_a_set() -> None:
    found = summarise_set(table())
    assert (found["questions"], found["samples"]) == (2, 2)
    assert found["accuracy"]["mean"] == 0.75 and found["pass_at"]["1"]["mean"] == 0.75
    assert list(found["pass_at"]) == ["1", "2"] and found["pass_at"]["2"]["mean"] == 1.0
    assert found["blind"]["mean"] == 0.5 and found["seen_minus_blind"]["mean"] == 0.25
    assert (found["no_box"], found["in_form"], found["cut"], found["undecided"]) == (0.25, 0.75, 0.5, 1)
    assert found["tokens"]["mean"] == 15 and found["tokens"]["mean_wrong"] == 20
    assert (found["dependency"]["answers"], found["dependency"]["mean"]) == (2, 0.25)
    assert found["dependency"]["right_against_wrong"] is None  # both are right
    assert found["subjects"]["sums"]["questions"] == 2 and found["subjects"]["sums"]["mean"] == 0.75
    alone = summarise_set(table()[lambda rows: rows["view"] == "seen"].assign(dependency=math.nan, subject=None))
    assert (alone["blind"], alone["dependency"], alone["subjects"]) == (None, None, {})
