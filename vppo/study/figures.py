"""The charts of a study."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from vppo.pages.plot import DASHED, Plot, nats, percent, prepare
from vppo.pages.theme import Theme, series_colours
from vppo.study.arms import BASE

PARTS = ("forward", "backward", "scoring")


def plots(summary: Mapping[str, Any]) -> list[Plot]:
    """All charts, in the page's order."""
    found = [difference_plot(summary), drift_plot(summary), products_plot(summary), reward_plot(summary)]
    return [plot for plot in found if plot is not None]


def difference_plot(summary: Mapping[str, Any]) -> Plot | None:
    """Sampled accuracy of each arm minus DAPO's, with its pooled standard error, and every seed as a dot."""
    arms = {name: arm for name, arm in summary["arms"].items() if name != BASE}
    if not arms:
        return None
    scores = {(run["arm"], run["seed"]): run["sampled"] for run in summary["runs"]}
    labels = [arm["label"] for arm in arms.values()]
    means = np.array([100 * arm["sampled_difference"]["mean"] for arm in arms.values()])
    errors = np.array([100 * (arm["sampled_difference"]["se"] or 0.0) for arm in arms.values()])

    def draw(figure: Figure, theme: Theme) -> None:
        ax = _rows(figure, "Sampled accuracy beside DAPO", labels, theme)
        for place, name in enumerate(arms):
            dots = [100 * (score - scores[BASE, seed]) for (arm, seed), score in scores.items() if arm == name]
            ax.plot(dots, [place] * len(dots), "o", color=theme.faint, markersize=4)
        ax.errorbar(
            means, range(len(means)), xerr=errors, fmt="o", color=theme.outcome, markersize=6, elinewidth=1.6, capsize=3
        )
        ax.axvline(0, color=theme.ink, linewidth=1.0, linestyle=DASHED)
        ax.set_xlabel("points")

    told = "; ".join(
        f"{label} {mean:+.1f} ± {error:.1f}" for label, mean, error in zip(labels, means, errors, strict=True)
    )
    return Plot(
        "difference",
        "Paired by seed. Blue: the mean and one standard error, pooled over the arms; grey: the seeds.",
        f"Points with error bars, in points: {told}.",
        draw,
        _size(len(arms)),
    )


def drift_plot(summary: Mapping[str, Any]) -> Plot:
    """How far each arm has moved from the warm policy, at read tokens and at all others."""
    arms = summary["arms"]
    labels = [arm["label"] for arm in arms.values()]

    def draw(figure: Figure, theme: Theme) -> None:
        ax = _rows(figure, "Distance from the warm policy", labels, theme)
        for key, label, colour in (
            ("drift", "all other tokens", theme.outcome),
            ("drift_read", "read tokens", theme.dependency),
        ):
            means = [arm[key]["mean"] for arm in arms.values()]  # None where a policy has read nothing
            values = [math.nan if mean is None else max(mean, 1e-6) for mean in means]
            errors = [arm[key]["se"] or 0.0 for arm in arms.values()]
            low = [min(error, 0.9 * value) for value, error in zip(values, errors, strict=True)]
            ax.errorbar(
                values,
                range(len(values)),
                xerr=(low, errors),
                fmt="o",
                color=colour,
                markersize=6,
                elinewidth=1.6,
                label=label,
            )
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.set_xlabel("KL in nats, log scale")
        figure.legend(loc="outside lower left", ncols=2)

    told = "; ".join(f"{arm['label']} {nats(arm['drift']['mean'])}" for arm in arms.values())
    return Plot(
        "drift",
        "KL of the trained policy from the warm one, the mean over tokens of its own answers to held-out questions; "
        "lines: one standard error over the seeds.",
        f"Points on a log axis, in nats, at tokens that are not read from the image: {told}.",
        draw,
        _size(len(arms)),
    )


def products_plot(summary: Mapping[str, Any]) -> Plot:
    """What the head multiplied, for each response token."""
    arms = summary["arms"]
    labels = [arm["label"] for arm in arms.values()]

    def draw(figure: Figure, theme: Theme) -> None:
        ax = _rows(figure, "Head products for each token", labels, theme)
        base = np.zeros(len(arms))
        for part, colour in zip(PARTS, (theme.outcome, theme.dependency, theme.faint), strict=True):
            values = np.array([arm["products"][part] for arm in arms.values()])
            ax.barh(range(len(arms)), values, 0.6, base, color=colour, label=part)
            base = base + values
        ax.set_xlim(0, float(base.max()) * 1.05)
        figure.legend(loc="outside lower left", ncols=3)

    told = "; ".join(
        f"{arm['label']} " + ", ".join(f"{part} {arm['products'][part]:.2f}" for part in PARTS) for arm in arms.values()
    )
    return Plot(
        "products",
        "Counted where they are made, without sampling. One is a row of hidden states times the weight of the head. "
        "Forward: of all tokens, for their log-probabilities; backward: of tokens with gradient; scoring: of the views "
        "that are compared.",
        f"Stacked bars: {told}.",
        draw,
        _size(len(arms)),
    )


def reward_plot(summary: Mapping[str, Any]) -> Plot:
    """Mean reward over the steps, the mean of the seeds."""
    arms = summary["arms"]
    curves = {name: np.mean([run["rewards"] for run in summary["runs"] if run["arm"] == name], axis=0) for name in arms}

    def draw(figure: Figure, theme: Theme) -> None:
        ax = prepare(figure.subplots(), "Reward of the rollouts")
        for (name, values), colour in zip(curves.items(), series_colours(theme, len(curves)), strict=True):
            ax.plot(
                np.arange(1, len(values) + 1), _smooth(values), color=colour, linewidth=1.6, label=arms[name]["label"]
            )
        ax.set_xlabel("step")
        ax.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g} %"))
        figure.legend(loc="outside lower left", ncols=2)

    told = "; ".join(f"{arms[name]['label']} {percent(float(values[-10:].mean()))}" for name, values in curves.items())
    return Plot(
        "reward",
        "Mean over the seeds, smoothed over a tenth of the run.",
        f"Lines; the mean of the last ten steps: {told}.",
        draw,
        (5.2, 3.0 + 0.2 * ((len(curves) + 1) // 2)),
    )


def _rows(figure: Figure, title: str, labels: list[str], theme: Theme) -> Axes:
    """Axes with a row for each arm, the first on top."""
    ax = prepare(figure.subplots(), title)
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
    ax.grid(axis="x", visible=True)
    ax.tick_params(axis="y", labelcolor=theme.ink)
    return ax


def _size(rows: int) -> tuple[float, float]:
    return 5.2, 1.5 + 0.3 * rows


def _smooth(values: np.ndarray) -> np.ndarray:
    """A centred running mean over a tenth of the run; at both ends, over what there is of it."""
    half = max(1, len(values) // 20)
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])
