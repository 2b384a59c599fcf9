"""Differences that are paired by seed, and their pooled standard errors, against numpy written out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.study import run

from vppo.errors import InputError
from vppo.study.arms import ARMS
from vppo.study.options import StudyOptions
from vppo.study.summary import mean_and_error, paired_differences, summarise


def test_paired_and_pooled_by_hand() -> None:
    table = {"dapo": [0.40, 0.50, 0.45], "tgf": [0.42, 0.49, 0.50], "random": [0.30, 0.45, 0.35]}
    found = paired_differences({arm: dict(enumerate(values)) for arm, values in table.items()})
    tgf, random = np.array([0.02, -0.01, 0.05]), np.array([-0.10, -0.05, -0.10])
    squares = ((tgf - 0.02) ** 2).sum() + ((random - random.mean()) ** 2).sum()
    error = np.sqrt(squares / (2 + 2)) / np.sqrt(3)
    assert found["tgf"] == pytest.approx((0.02, error))
    assert found["random"] == pytest.approx((-0.25 / 3, error))
    assert "dapo" not in found


def test_a_level_that_all_arms_of_a_seed_share_falls_out() -> None:
    random = np.random.default_rng(0)
    values = {arm: dict(enumerate(random.random(6))) for arm in ("dapo", "tgf", "k3")}
    level = 10 * random.random(6)
    moved = {arm: {seed: value + level[seed] for seed, value in own.items()} for arm, own in values.items()}
    for arm, pair in paired_differences(values).items():
        assert paired_differences(moved)[arm] == pytest.approx(pair)


def test_pooling_is_right_on_average() -> None:
    """Over many studies, the mean squared pooled error is the variance of the differences."""
    random, errors, differences = np.random.default_rng(1), [], []
    for _ in range(2000):
        values = {arm: dict(enumerate(random.normal(0, 1, 4))) for arm in ("dapo", "tgf", "k3", "tas")}
        difference, error = paired_differences(values)["tgf"]
        errors.append(error**2)
        differences.append(difference)
    assert np.mean(errors) == pytest.approx(0.5, rel=0.05)
    assert np.var(differences) == pytest.approx(0.5, rel=0.08)


def test_seeds_that_only_one_arm_has() -> None:
    found = paired_differences(
        {"dapo": {0: 1.0, 1: 2.0}, "tgf": {1: 5.0, 2: 9.0}, "k3": {0: 2.0, 1: 5.0}, "tas": {7: 1.0}}
    )
    assert found["tgf"][0] == 3.0
    assert found["k3"] == pytest.approx((2.0, math.sqrt(2.0) / math.sqrt(2)))
    assert found["tgf"][1] == pytest.approx(math.sqrt(2.0))  # one seed, with the spread of the others
    assert all(math.isnan(value) for value in found["tas"])


def test_one_seed_has_no_error() -> None:
    found = paired_differences({"dapo": {0: 1.0}, "tgf": {0: 1.5}})
    assert found["tgf"][0] == 0.5 and math.isnan(found["tgf"][1])
    assert mean_and_error([2.0])[0] == 2.0 and math.isnan(mean_and_error([2.0])[1])
    assert mean_and_error([1.0, 3.0]) == pytest.approx((2.0, 1.0))


def test_the_summary(tmp_path: Path) -> None:
    options = StudyOptions(tmp_path, ("dapo", "gate"), seeds=2)
    runs = [run("dapo", 0, 0.5), run("dapo", 1, 0.6, tokens=300), run("gate", 0, 0.45), run("gate", 1, 0.65)]
    found = summarise(options, runs)
    dapo, gate = found["arms"]["dapo"], found["arms"]["gate"]
    assert dapo["sampled"] == pytest.approx({"mean": 0.55, "se": 0.05})
    assert dapo["products"] == pytest.approx({"scoring": 2.0, "forward": 1.0, "backward": 0.3})
    assert dapo["active"] == pytest.approx(0.1)
    assert gate["sampled_difference"] == pytest.approx({"mean": 0.0, "se": 0.05})
    assert gate["label"] == ARMS["gate"].label and gate["options"]["keep_threshold"] == 1.0
    assert "sampled_difference" not in dapo and "guess_rate" not in dapo
    assert found["runs"] == runs


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"arms": ("dapo", "ppo")}, "--arms: got ppo, takes some of dapo,tgf"),
        ({"arms": ()}, "--arms: got none"),
        ({"arms": ("dapo", "tgf", "tgf")}, "--arms: got tgf twice"),
        ({"arms": ("tgf",)}, "--arms: got tgf, takes dapo among them"),
        ({"seeds": 0}, "--seeds: got 0, takes a number from 1"),
        ({"jobs": -1}, "--jobs: got -1"),
        ({"steps": 0}, "--steps: got 0"),
        ({"held_out": 0}, "--held-out: got 0"),
        ({"task": "sums"}, "--task: got 'sums', takes narrated or guess"),
    ],
)
def test_bad_options_are_named(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        StudyOptions(tmp_path, **given)


def test_every_arm_is_a_config() -> None:
    from vppo.config import VPPOConfig

    for arm in ARMS.values():
        config = VPPOConfig(output_dir="unused", bf16=False, use_cpu=True, **arm.options)
        assert config.algorithm == arm.options["algorithm"]
