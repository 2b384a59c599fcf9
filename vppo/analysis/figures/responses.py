"""How the mean dependencies of responses are distributed, and whether correct ones depend on the image more."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from vppo.analysis.figures.parts import (
    bin_edges,
    draw_outlines,
    legend_below,
    line_styles,
    name_rows,
    percent_axis,
    plot_of,
    short_label,
)
from vppo.analysis.perception import Distribution, Run, correctness
from vppo.pages.plot import DASHED, Plot, legend_beside_title, mark, nats, percent, prepare, room_above
from vppo.pages.theme import Theme, series_colours


def trajectory_plot(runs: Sequence[Run]) -> Plot:
    """The paper's Figure 4: responses by the mean dependency of their tokens."""
    means = [run.trajectories["mean_dependency"].to_numpy(dtype=np.float64) for run in runs]
    spreads = [Distribution.of(m) for m in means]
    edges = bin_edges(means, 33)

    def draw(figure: Figure, theme: Theme) -> None:
        ax = prepare(figure.subplots(), "Mean dependency of responses")
        if len(runs) == 1:
            counts = np.histogram(means[0], edges)[0]
            ax.bar(edges[:-1], counts, np.diff(edges) * 0.92, align="edge", color=theme.dependency)
            room_above(ax, float(counts.max()), 0.77, whole=True)
            marks = [(spreads[0].mean, "mean"), (spreads[0].median, "median")]
            for height, (value, name) in zip((0.85, 0.93), sorted(marks), strict=True):
                mark(ax, value, height, f"{name} {nats(value)}", theme)
        else:
            draw_outlines(ax, means, edges, line_styles(runs, theme))
            legend_below(figure)
        ax.set_xlim(0, float(edges[-1]))
        ax.set_xlabel("nats")

    caption = (
        "Responses by the mean dependency of their tokens, as in Figure 4 of the paper: the number by which VPPO "
        "scales a response's advantage. "
    ) + (
        f"The {spreads[0].count:,} lie between {nats(float(means[0].min()))} and {nats(spreads[0].largest)}."
        if len(runs) == 1
        else "Heights are shares of the run's responses."
    )
    return plot_of("responses", caption, runs, [f"mean {nats(s.mean)}, median {nats(s.median)}" for s in spreads], draw)


def correctness_plot(runs: Sequence[Run]) -> Plot | None:
    """Correct against wrong responses; None where no run has both."""
    found = [(run, outcome) for run in runs if (outcome := correctness(run.trajectories)) is not None]
    if not found:
        return None
    outcomes = [outcome for _, outcome in found]

    def draw_one(figure: Figure, theme: Theme) -> None:
        ax = prepare(figure.subplots(), "Correct and wrong responses")
        judged = runs[0].trajectories.dropna(subset="correct")
        right = judged["correct"].to_numpy(dtype=bool)
        means = judged["mean_dependency"].to_numpy(dtype=np.float64)
        groups = [("correct", means[right], theme.outcome), ("wrong", means[~right], theme.bad)]
        edges, peak = bin_edges([means], 25), 0.0
        for name, group, colour in groups:
            shares = np.histogram(group, edges)[0] / group.size
            peak = max(peak, float(shares.max()))
            ax.stairs(shares, edges, fill=True, color=colour, alpha=0.22)
            ax.stairs(shares, edges, color=colour, linewidth=1.8, label=name)
        room_above(ax, peak, 0.77, whole=False)
        marks = sorted((float(group.mean()), name) for name, group, _ in groups)
        for height, (value, name) in zip((0.85, 0.93), marks, strict=True):
            mark(ax, value, height, f"{name} {nats(value)}", theme)
        ax.set_xlim(0, float(edges[-1]))
        ax.set_xlabel("nats")
        percent_axis(ax)
        legend_beside_title(ax)

    def draw_several(figure: Figure, theme: Theme) -> None:
        ax = prepare(figure.subplots(), "Correct minus wrong responses")
        colours = series_colours(theme, len(runs))
        for row, (run, outcome) in enumerate(found):
            colour = colours[runs.index(run)]
            ax.plot([outcome.low, outcome.high], [row, row], color=colour, linewidth=2, solid_capstyle="butt")
            ax.plot(outcome.difference, row, "o", color=colour, markersize=7)
        ax.axvline(0, color=theme.ink, linewidth=1, linestyle=DASHED)
        ax.set_xlabel("difference of mean dependency, nats")
        name_rows(ax, [short_label(run.label) for run, _ in found])

    alts = [
        f"correct {nats(o.mean_correct)}, wrong {nats(o.mean_wrong)}, 95 % interval of the difference "
        f"{nats(o.low)} to {nats(o.high)}"
        for o in outcomes
    ]
    if len(runs) > 1:
        caption = (
            "How much higher the mean dependency of correct responses is than that of wrong ones; lines are 95 % "
            "intervals from a bootstrap over questions. An interval that holds zero shows no difference."
        )
        return plot_of("correctness", caption, [run for run, _ in found], alts, draw_several)
    o = outcomes[0]
    within = (
        f" On the {o.questions:,} questions with both, correct responses differ from wrong ones by {nats(o.within)}."
        if o.questions
        else ""
    )
    caption = (
        f"{o.correct:,} correct and {o.wrong:,} wrong responses, each group as shares of its own. The difference of "
        f"the means is {nats(o.difference)} nats (95 % interval from a bootstrap over questions: {nats(o.low)} to "
        f"{nats(o.high)}); a random correct response lies above a random wrong one in {percent(o.auc)} of all "
        f"pairs.{within}"
    )
    return plot_of("correctness", caption, runs, alts, draw_one)
