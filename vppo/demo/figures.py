"""The charts of a training run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from vppo.demo.baseline import Baseline
from vppo.demo.scored import ScoredResponse, token_values
from vppo.pages.plot import (
    FLOOR_DECADE,
    Plot,
    decade_label,
    dependency_bars,
    legend_beside_title,
    line,
    mark,
    nats,
    percent,
    power_of_ten,
    prepare,
    room_above,
)
from vppo.pages.theme import Theme


def run_plots(
    summary: dict[str, Any],
    metrics: Sequence[dict[str, Any]],
    responses: Sequence[ScoredResponse],
    baseline: Baseline | None = None,
) -> list[Plot]:
    """All charts that the run has data for, in the page's order.

    Args:
        summary: What `vppo demo` writes to `summary.json`.
        metrics: What the trainer logged, a dict per step with its "step".
        responses: The held-out answers, scored token by token.
        baseline: DAPO's runs, to be seen beside this one.
    """
    plots = [
        accuracy_plot(summary, baseline),
        reward_plot(metrics, baseline),
        token_histogram(summary, responses),
        answer_histogram(responses),
        dependency_plot(metrics),
        shaping_plot(metrics),
        products_plot(summary),
    ]
    return [plot for plot in plots if plot is not None]


def accuracy_plot(summary: dict[str, Any], baseline: Baseline | None = None) -> Plot:
    """Accuracy on held-out questions before and after, with the 95 % interval of that many, and the range of DAPO's."""
    before, after, n = float(summary["accuracy_before"]), float(summary["accuracy_after"]), int(summary["held_out"])

    def draw(figure: Figure, theme: Theme) -> None:
        ax = prepare(figure.subplots(), "Accuracy on held-out questions")
        for row, (name, value, colour) in enumerate([("before", before, theme.faint), ("after", after, theme.outcome)]):
            ax.barh(row, 1.0, height=0.34, color=theme.low)
            ax.barh(row, value, height=0.34, color=colour)
            ax.plot(_interval_95(value, n), [row, row], color=theme.ink, linewidth=1.2, solid_capstyle="butt")
            ax.text(0, row - 0.27, name, size=10, color=theme.muted, va="bottom")
            ax.text(1, row - 0.25, percent(value), size=17, weight="bold", ha="right", va="bottom")
        if baseline:
            low, high = min(baseline.accuracy), max(baseline.accuracy)
            ax.barh(2, 1.0, height=0.34, color=theme.low)
            ax.barh(2, high - low, left=low, height=0.34, color=theme.faint)
            ax.text(0, 1.73, _dapo(baseline), size=10, color=theme.muted, va="bottom")
            ax.text(1, 1.75, f"{100 * low:.1f} to {percent(high)}", size=12, color=theme.muted, ha="right", va="bottom")
        ax.set(ylim=(2.3 if baseline else 1.3, -0.6), xlim=(0, 1), xticks=[], yticks=[])
        ax.spines["bottom"].set_visible(False)

    beside = f" Below: the least and the most that {_dapo(baseline)}, came to ({baseline.about})." if baseline else ""
    return Plot(
        "accuracy",
        f"Greedy answers to {n:,} held-out questions, checked by the verifier that gives the reward. The whole "
        f"width is 100 %; thin lines are 95 % intervals.{beside}",
        f"Two bars: accuracy {percent(before)} before and {percent(after)} after.",
        draw,
    )


def _dapo(baseline: Baseline) -> str:
    return f"DAPO, all tokens, {len(baseline.seeds)} seeds"


def reward_plot(metrics: Sequence[dict[str, Any]], baseline: Baseline | None = None) -> Plot | None:
    """Mean reward of each step's rollouts, their accuracy where it is logged apart, and the band of DAPO's rewards."""
    steps, reward = _series(metrics, "reward")
    if not steps.size:
        return None
    accuracy_steps, accuracy = _series(metrics, "accuracy")
    if not accuracy.size:
        accuracy_steps, accuracy = _series(metrics, "rewards/accuracy_reward/mean")
    same = np.array_equal(accuracy, reward)
    separate = accuracy.size > 0 and not same

    def draw(figure: Figure, theme: Theme) -> None:
        ax = prepare(figure.subplots(), "Accuracy of the rollouts (the reward)" if same else "Reward of the rollouts")
        curves = [(steps, reward, theme.outcome, "reward")]
        if separate:
            curves.append((accuracy_steps, accuracy, theme.good, "accuracy"))
        if baseline:
            smooth = np.array([_smooth(np.array(rewards)) for rewards in baseline.rewards])
            places = np.arange(1, baseline.steps + 1)
            ax.fill_between(places, smooth.min(0), smooth.max(0), color=theme.faint, linewidth=0, label=_dapo(baseline))
        for x, y, colour, label in curves:
            line(ax, x, y, color=colour, linewidth=0.8, alpha=0.45)
            line(ax, x, _smooth(y), color=colour, linewidth=2.2, label=label)
        if all(y.min() >= 0 and y.max() <= 1 for _, y, _, _ in curves):
            ax.set_ylim(0, 1.02)
        if same:
            ax.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        _step_axis(ax, steps)
        if baseline:
            ax.legend(loc="lower right", ncols=3)  # beside the title there is no room for it
        elif separate:
            legend_beside_title(ax)

    band = f" The band holds the running means of {_dapo(baseline)}." if baseline else ""
    what = "Mean reward and accuracy" if separate else "Mean reward"
    return Plot(
        "reward",
        f"{what} of the rollouts that each step samples; the heavy line is a running mean.{band}",
        f"Line over {len(steps)} steps: reward {reward[0]:.2f} at the first, {reward[-1]:.2f} at the last.",
        draw,
    )


def token_histogram(summary: dict[str, Any], responses: Sequence[ScoredResponse]) -> Plot | None:
    """Token dependency on a log axis, kept tokens apart from filtered ones, and one bin for all below the floor."""
    values = token_values(responses)
    if not values.size:
        return None
    kept = np.concatenate([np.asarray(r.kept, dtype=bool) for r in responses])
    floor = 10.0**FLOOR_DECADE
    means = [(float(summary[f"dependency_{name}"]), name) for name in ("digits", "other")]
    shown_means = sorted((mean, f"{name} {nats(mean)}") for mean, name in means if mean > floor)
    at_floor = float((values <= floor).mean())

    def draw(figure: Figure, theme: Theme) -> None:
        ax = prepare(figure.subplots(), "Visual dependency of tokens")
        dependency_bars(ax, values, kept, shown_means, theme)

    dashes = " Dashed: the means at the digits read from the image and at all other tokens." if shown_means else ""
    return Plot(
        "dependency_tokens",
        f"The {values.size:,} tokens of {len(responses):,} held-out answers. The first bar holds those at or below "
        f"{power_of_ten(FLOOR_DECADE)} nats, zero included.{dashes}",
        f"Histogram of {values.size:,} tokens on a log axis: median {nats(float(np.median(values)))} nats, largest "
        f"{nats(float(values.max()))}, {percent(at_floor)} at or below {power_of_ten(FLOOR_DECADE)}.",
        draw,
    )


def answer_histogram(responses: Sequence[ScoredResponse]) -> Plot | None:
    """Mean dependency of each answer: the number that shapes a trajectory's advantage."""
    answers = [r for r in responses if r.tokens]
    if not answers:
        return None
    means = np.array([np.mean(r.dependency, dtype=np.float64) for r in answers])
    correct = np.array([r.correct for r in answers])
    mean = float(means.mean())

    def draw(figure: Figure, theme: Theme) -> None:
        ax = prepare(figure.subplots(), "Mean dependency of answers")
        top = float(means.max()) * 1.02 or 1.0
        edges = np.linspace(0.0, top, 33)
        base = np.zeros(len(edges) - 1)
        for label, group, colour in (("correct", correct, theme.outcome), ("wrong", ~correct, theme.faint)):
            count = np.histogram(np.clip(means[group], 0.0, top), edges)[0]
            if group.any():
                ax.bar(edges[:-1], count, np.diff(edges) * 0.92, base, align="edge", color=colour, label=label)
            base = base + count
        room_above(ax, float(base.max()), 0.85, whole=True)
        mark(ax, mean, 0.91, f"mean {nats(mean)}", theme)
        ax.set_xlim(0, top)
        ax.set_xlabel("nats")
        legend_beside_title(ax)

    return Plot(
        "dependency_answers",
        f"The {len(answers):,} held-out answers by the mean over their tokens, the number by which "
        "trajectory shaping scales an advantage.",
        f"Histogram of {len(answers):,} answers: mean {nats(mean)} nats, from {nats(float(means.min()))} to "
        f"{nats(float(means.max()))}.",
        draw,
    )


def dependency_plot(metrics: Sequence[dict[str, Any]]) -> Plot | None:
    """Mean dependency over the steps with its quantiles, on a log axis; None where the algorithm measures none."""
    steps, mean = _series(metrics, "vppo/dependency_mean")
    if not steps.size:
        return None
    names = {"mean": "mean", "median": "q50", "90 %": "q90", "99 %": "q99"}
    curves = {label: _series(metrics, f"vppo/dependency_{key}") for label, key in names.items()}

    def draw(figure: Figure, theme: Theme) -> None:
        ax = prepare(figure.subplots(), "Dependency in training")
        ends = []
        for label, (x, y) in curves.items():
            if not x.size:
                continue
            heavy = label == "mean"
            shown = np.maximum(y, 10.0**FLOOR_DECADE)
            colour = theme.dependency if heavy else theme.muted
            line(ax, x, shown, color=colour, linewidth=2.2 if heavy else 0.9)
            ends.append((float(shown[-1]), label))
        ax.set_yscale("log")
        low, high = ax.get_ylim()
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ax.set_yticks([10.0**decade for decade in decades], [decade_label(decade) for decade in decades])
        ax.set_ylim(10.0 ** decades[0], 10.0 ** decades[-1])
        ax.minorticks_off()
        _step_axis(ax, steps)
        ax.set_ylabel("nats, log scale")
        _label_ends(ax, ends, theme)

    return Plot(
        "dependency_training",
        "Over all tokens that a step samples: their mean, their median, and the values that 90 % and 99 % of them "
        "stay below.",
        f"Line over {len(steps)} steps: mean dependency {nats(float(mean[0]))} nats at the first, "
        f"{nats(float(mean[-1]))} at the last.",
        draw,
    )


def shaping_plot(metrics: Sequence[dict[str, Any]]) -> Plot | None:
    """How the dependency shapes the loss over the steps: factors on the advantages, tokens that keep their gradient."""
    kept_steps, kept = _series(metrics, "vppo/kept_fraction")
    steps, alpha = _series(metrics, "vppo/alpha_mean")
    low, high = (_series(metrics, f"vppo/alpha_{key}")[1] for key in ("min", "max"))
    shaped = alpha.size > 0 and alpha.size == low.size == high.size
    rows: list[tuple[Callable[[Axes, Theme], None], str, str]] = []

    def draw_alpha(ax: Axes, theme: Theme) -> None:
        prepare(ax, "Factor on the advantages")
        ax.fill_between(steps, low, high, color=theme.faint, alpha=0.5, linewidth=0)
        line(ax, steps, alpha, color=theme.outcome, linewidth=2.2)
        ax.yaxis.set_major_locator(MaxNLocator(3))
        _step_axis(ax, steps)

    def draw_kept(ax: Axes, theme: Theme) -> None:
        prepare(ax, "Tokens that keep their gradient")
        line(ax, kept_steps, kept, color=theme.dependency, linewidth=2.2)
        ax.set(ylim=(0, 1.02), yticks=[0, 0.5, 1])
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        _step_axis(ax, kept_steps)

    if shaped:
        caption = "Factor on the advantages: smallest to largest of a step (band) and mean (line)."
        rows.append((draw_alpha, caption, f"mean factor on the advantages {alpha[-1]:.2f}"))
    if kept_steps.size:
        caption = "Tokens that keep their gradient, of all response tokens."
        rows.append((draw_kept, caption, f"{percent(float(kept[-1]))} of the tokens keep their gradient"))
    if not rows:
        return None

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots(len(rows), 1, squeeze=False, sharex=True)[:, 0]
        for ax, (draw_row, _, _) in zip(axes, rows, strict=True):
            draw_row(ax, theme)
        for ax in axes[:-1]:
            ax.set_xlabel("")

    captions, values = " ".join(caption for _, caption, _ in rows), ", ".join(value for _, _, value in rows)
    return Plot("shaping", captions, f"Lines over the steps; at the last: {values}.", draw)


def products_plot(summary: dict[str, Any]) -> Plot | None:
    """What the head multiplied in training, and what it left out; None where it was not counted."""
    found = summary.get("head_products")
    if not found or not found["tokens"]:
        return None
    passes = [("forward", "forward"), ("backward", "backward"), ("left_out", "left out")]
    whole = sum(found[name] for name, _ in passes)

    def draw(figure: Figure, theme: Theme) -> None:
        ax = prepare(figure.subplots(), "What the head multiplied, and what it left out")
        start = 0.0
        for (name, label), colour in zip(passes, (theme.outcome, theme.dependency, theme.low), strict=True):
            share = found[name] / whole
            ax.barh(0, share, 0.5, start, color=colour, label=f"{label} {percent(share)}")
            start += share
        ax.legend(loc="upper left", ncols=3, frameon=False, borderaxespad=0, fontsize=9, columnspacing=1.2)
        ax.text(0, 0.62, "to measure dependency, besides", size=9, color=theme.muted, va="bottom")
        ax.barh(0.92, found["scoring"] / whole, 0.5, color=theme.faint)
        ax.text(found["scoring"] / whole + 0.01, 0.92, percent(found["scoring"] / whole), size=9, va="center")
        ax.set(ylim=(1.3, -0.7), xlim=(0, 1), xticks=[], yticks=[])
        ax.spines["bottom"].set_visible(False)

    active = found["active"] / found["tokens"]
    return Plot(
        "head",
        "Products of the head in training, counted where they were made; the whole width is what all "
        f"{found['tokens']:,} sampled tokens would take. {percent(active)} of them carried gradient; the others "
        "were filtered, or their group had rewards that are all equal. Sampling is not counted.",
        f"Bars: {', '.join(f'{label} {percent(found[name] / whole)}' for name, label in passes)}; "
        f"scoring {percent(found['scoring'] / whole)}.",
        draw,
    )


def _label_ends(ax: Axes, ends: list[tuple[float, str]], theme: Theme) -> None:
    """Names lines at their right ends, pushed apart where they would touch; needs the final limits of a log axis."""
    low, high = ax.get_ylim()
    place = -math.inf
    for value, label in sorted(ends):
        place = max(math.log10(value / low) / math.log10(high / low), place + 0.075)
        heavy = label == "mean"
        ax.annotate(
            label,
            (1.0, place),
            (5, 0),
            "axes fraction",
            "offset points",
            va="center",
            color=theme.dependency if heavy else theme.muted,
            weight="bold" if heavy else "normal",
        )


def _step_axis(ax: Axes, steps: np.ndarray) -> None:
    ax.set_xlabel("step")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    single = steps.size == 1
    ax.set_xlim(float(steps[0]) - single, float(steps[-1]) + single)


def _series(metrics: Sequence[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric, from the rows where it is a finite number."""
    points = [(row["step"], row[key]) for row in metrics if isinstance(row.get(key), int | float)]
    table = np.array([point for point in points if math.isfinite(point[1])], dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _smooth(values: np.ndarray) -> np.ndarray:
    """A centred running mean over a tenth of the run; at both ends, over what there is of it."""
    half = max(1, len(values) // 20)
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def _interval_95(share: float, n: int) -> tuple[float, float]:
    """Wilson's interval for a share seen in `n` trials."""
    z = 1.96
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
