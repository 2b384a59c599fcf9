"""From the numbers of single runs to means, and to differences from DAPO with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vppo.study.arms import ARMS, BASE
from vppo.study.options import StudyOptions

COMPARED = ("sampled", "greedy", "reward")
MEANS = (*COMPARED, "reads", "adds", "drift", "drift_read", "kept", "seconds", "guess_rate")
DIFFERENCES = (*COMPARED, "reads", "guess_rate")
PRODUCTS = ("scoring", "forward", "backward")

ByArm = Mapping[str, Mapping[int, float]]  # arm to seed to value


def paired_differences(values: ByArm, base: str = BASE) -> dict[str, tuple[float, float]]:
    r"""Mean difference of each arm from `base` over the seeds that both have, and its standard error.

    The standard error is pooled: the variance of a paired difference is estimated once, from all arms together,
    `s^2 = sum_a sum_s (d_as - mean_a)^2 / sum_a (n_a - 1)`, and an arm's error is `s / sqrt(n_a)`. A few seeds of one
    arm alone say next to nothing of their spread.

    Args:
        values: Arm to seed to value.
        base: The arm that others are set against; it has no entry in the result.

    Returns:
        (difference, standard error) by arm; the error is NaN where no arm has two seeds, and both are NaN where an arm
        shares no seed with the base.
    """
    found = {
        arm: np.array([own[seed] - values[base][seed] for seed in sorted(own) if seed in values[base]])
        for arm, own in values.items()
        if arm != base
    }
    squares = sum(float(((d - d.mean()) ** 2).sum()) for d in found.values() if len(d))
    freedom = sum(len(d) - 1 for d in found.values() if len(d))
    deviation = math.sqrt(squares / freedom) if freedom else math.nan
    return {
        arm: (float(d.mean()), deviation / math.sqrt(len(d))) if len(d) else (math.nan, math.nan)
        for arm, d in found.items()
    }


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean over seeds and its standard error, which is NaN for one."""
    own = np.asarray(values, dtype=np.float64)
    return float(own.mean()), float(own.std(ddof=1) / math.sqrt(len(own))) if len(own) > 1 else math.nan


def summarise(options: StudyOptions, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What `study.json` holds of the runs: for each arm its means and differences; and the runs themselves.

    Errors are None where there is one seed; `drift_read` and `adds` are where a policy read nothing, as one that only
    guesses.
    Head products are per response token of all runs of an arm.
    """
    by_arm = {arm: [run for run in runs if run["arm"] == arm] for arm in options.arms}
    arms: dict[str, dict[str, Any]] = {}
    for arm, own in by_arm.items():
        tokens = sum(run["products"]["tokens"] for run in own)
        arms[arm] = {
            "label": ARMS[arm].label,
            "options": ARMS[arm].options,
            "seeds": len(own),
            **{name: _entry(mean_and_error([run[name] for run in own])) for name in MEANS if name in own[0]},
            "products": {name: sum(run["products"][name] for run in own) / max(tokens, 1) for name in PRODUCTS},
            "active": sum(run["products"]["active"] for run in own) / max(tokens, 1),
        }
    for name in DIFFERENCES:
        if name not in runs[0]:
            continue
        values = {arm: {run["seed"]: run[name] for run in own} for arm, own in by_arm.items()}
        for arm, difference in paired_differences(values).items():
            arms[arm][f"{name}_difference"] = _entry(difference)
    return {
        "task": options.task,
        "steps": options.steps,
        "seeds": options.seeds,
        "held_out": options.held_out,
        "arms": arms,
        "runs": [without_nan(run) for run in runs],
    }


def _entry(found: tuple[float, float]) -> dict[str, float | None]:
    mean, error = (None if math.isnan(value) else value for value in found)
    return {"mean": mean, "se": error}


def without_nan(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with None for NaN, which JSON has not: so much drift of read tokens has a policy that reads nothing."""
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}
