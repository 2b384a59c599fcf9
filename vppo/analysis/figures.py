"""The figures of an analysis: one run in detail, several runs over each other; the numbers are `perception.py`'s."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from vppo.analysis.perception import (
    COMPARED,
    ESTIMATORS,
    FLOOR,
    TOP_SHARES,
    Distribution,
    Run,
    by_entropy,
    by_position,
    by_relative_position,
    correctness,
    gini,
    held_by_entropy,
    log_density,
    lorenz,
    one_draw,
    overlap_by_chance,
    overlaps,
    rank_correlation,
    share_of_top,
    token_types,
    top_tokens,
)
from vppo.pages.plot import (
    DASHED,
    FLOOR_DECADE,
    Plot,
    decade_label,
    dependency_axis,
    dependency_bars,
    legend_beside_title,
    mark,
    nats,
    percent,
    power_of_ten,
    prepare,
    room_above,
)
from vppo.pages.theme import Theme, colour_map, series_colours
from vppo.pages.token_text import visible

_LINES = ("-", (0, (4, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
_PAIRS = [(a, b) for i, a in enumerate(COMPARED) for b in COMPARED[i + 1 :]]


def perception_plots(runs: Sequence[Run]) -> list[Plot]:
    """All figures that the runs have data for, in the page's order.

    Args:
        runs: One, which is drawn in detail, or several, which are drawn over each other.
    """
    figures: list[Callable[[Sequence[Run]], Plot | None]] = [
        token_plot,
        frequency_plot,
        trajectory_plot,
        correctness_plot,
        relative_position_plot,
        position_plot,
        lorenz_plot,
        entropy_plot,
        overlap_plot,
        type_plot,
        top_token_plot,
        draw_error_plot,
        draw_set_plot,
    ]
    plots = [figure(runs) for figure in figures]
    return [plot for plot in plots if plot is not None]


def token_plot(runs: Sequence[Run]) -> Plot:
    """Token dependency on a log axis: bars by kept and filtered with the density, or the densities of several runs."""
    values = [_dependency(run) for run in runs]
    spreads = [Distribution.of(v) for v in values]
    last_decade = max(1, *(math.ceil(math.log10(max(spread.largest, FLOOR))) for spread in spreads))
    densities = [log_density(v) for v in values]

    def draw(figure: Figure, theme: Theme) -> None:
        ax = prepare(figure.subplots(), "Visual dependency of tokens")
        if len(runs) == 1:
            kept = runs[0].tokens["kept"].to_numpy(dtype=bool)
            marks = [(spreads[0].median, f"median {nats(spreads[0].median)}")]
            marks.append((spreads[0].mean, f"mean {nats(spreads[0].mean)}"))
            dependency_bars(ax, values[0], kept, sorted(m for m in marks if m[0] > FLOOR), theme)
            x, density = densities[0]
            inside = x > FLOOR_DECADE
            ax.plot(x[inside], density[inside] / 4, color=theme.ink, linewidth=1.3)  # bars are a quarter decade wide
        else:
            for (x, density), spread, style in zip(densities, spreads, _styles(runs, theme), strict=True):
                inside = x > FLOOR_DECADE
                ax.plot(x[inside], density[inside] / 4, **style)
                ax.plot(FLOOR_DECADE - 0.55, spread.at_floor, "o", color=style["color"], markersize=5)
            dependency_axis(ax, last_decade)
            ax.set_ylim(bottom=0)
            _percent_axis(ax)
            _legend_below(figure)

    floor = power_of_ten(FLOOR_DECADE)
    if len(runs) == 1:
        spread = spreads[0]
        caption = (
            f"All {spread.count:,} response tokens by how far, in nats, their next-token distribution moves when the "
            f"image is perturbed; each bar a quarter of a decade, the line their density. The first bar holds those "
            f"at or below {floor}, zero included."
        )
    else:
        caption = (
            "Density of the tokens by dependency: share of the tokens in a quarter of a decade. The dots on the left "
            f"are the shares at or below {floor}, zero included."
        )
    return _plot("tokens", caption, runs, [f"median {nats(s.median)}, mean {nats(s.mean)} nats" for s in spreads], draw)


def frequency_plot(runs: Sequence[Run]) -> Plot | None:
    """The paper's Figure 3: how often a dependency occurs, the frequency on a log axis; None without any dependency."""
    values = [_dependency(run) for run in runs]
    top = max(float(v.max()) for v in values)
    if top <= FLOOR:
        return None
    edges = np.linspace(0, top, 41)
    shares = [np.histogram(v, edges)[0] / v.size for v in values]
    first = [float(share[0]) for share in shares]
    smallest = min(1 / v.size for v in values)

    def draw(figure: Figure, theme: Theme) -> None:
        ax = prepare(figure.subplots(), "How often a dependency occurs")
        if len(runs) == 1:
            ax.bar(edges[:-1], shares[0], np.diff(edges) * 0.92, align="edge", color=theme.dependency)
        else:
            for share, style in zip(shares, _styles(runs, theme), strict=True):
                ax.stairs(np.maximum(share, smallest / 10), edges, baseline=None, **style)
            _legend_below(figure)
        ax.set_yscale("log")
        ax.set_ylim(smallest / 1.6, 1.2)
        decades = range(math.ceil(math.log10(smallest / 1.6)), 1)
        ax.set_yticks([10.0**d for d in decades], [f"{100 * 10.0**d:g} %" for d in decades])
        ax.yaxis.set_minor_locator(NullLocator())
        ax.set_xlim(0, top)
        ax.set_xlabel("nats")

    who = f"{percent(first[0])} of the tokens lie" if len(runs) == 1 else "most tokens lie"
    caption = (
        f"The same tokens on a plain axis, their frequency on a log axis, as in Figure 3 of the paper: {who} in the "
        f"first bin, below {nats(top / 40)} nats. A straight fall would be exponential."
    )
    return _plot("frequency", caption, runs, [f"{percent(share)} in the first bin" for share in first], draw)


def trajectory_plot(runs: Sequence[Run]) -> Plot:
    """The paper's Figure 4: responses by the mean dependency of their tokens."""
    means = [run.trajectories["mean_dependency"].to_numpy(dtype=np.float64) for run in runs]
    spreads = [Distribution.of(m) for m in means]
    edges = _edges(means, 33)

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
            _outlines(ax, means, edges, _styles(runs, theme))
            _legend_below(figure)
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
    return _plot("responses", caption, runs, [f"mean {nats(s.mean)}, median {nats(s.median)}" for s in spreads], draw)


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
        edges, peak = _edges([means], 25), 0.0
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
        _percent_axis(ax)
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
        _rows(ax, [_short(run.label) for run, _ in found])

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
        return _plot("correctness", caption, [run for run, _ in found], alts, draw_several)
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
    return _plot("correctness", caption, runs, alts, draw_one)


def relative_position_plot(runs: Sequence[Run]) -> Plot:
    """Dependency from the first to the last twentieth of the responses."""
    tables = [by_relative_position(run.tokens) for run in runs]

    def draw(figure: Figure, theme: Theme) -> None:
        ax = prepare(figure.subplots(), "Along the response")
        _spreads(figure, ax, runs, tables, theme)
        ax.set_xlim(0, 1)
        ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["start", "25 %", "50 %", "75 %", "end"])

    what = "Mean and median; 90 % of the tokens lie below the upper edge of the band." if len(runs) == 1 else "Means."
    ends = [[nats(float(table["mean"].iloc[place])) for place in (0, -1)] for table in tables]
    alts = [f"mean {start} at the start, {end} at the end" for start, end in ends]
    return _plot("position", f"Tokens by their place in their response, in twentieths. {what}", runs, alts, draw)


def position_plot(runs: Sequence[Run]) -> Plot:
    """Dependency by the number of tokens since the start."""
    tables = [by_position(run.tokens) for run in runs]
    tables = [table.set_index(np.arange(len(table), dtype=np.float64)) for table in tables]
    bins = max(len(table) for table in tables)
    labels = ["1", "2", *(f"{2**k + 1}-{2 ** (k + 1)}" for k in range(1, bins))][:bins]

    def draw(figure: Figure, theme: Theme) -> None:
        ax = prepare(figure.subplots(), "From the start")
        _spreads(figure, ax, runs, tables, theme)
        shown = range(0, bins, 1 if bins <= 7 else 2)
        ax.set_xticks(list(shown), [labels[place] for place in shown])
        ax.set_xlabel("token of the response")

    what = "Mean and median; 90 % of the tokens lie below the upper edge of the band." if len(runs) == 1 else "Means."
    caption = f"The same by the token's number; long responses alone reach the right end. {what}"
    alts = [f"mean {nats(float(t['mean'].iloc[0]))} at the first token" for t in tables]
    return _plot("distance", caption, runs, alts, draw)


def lorenz_plot(runs: Sequence[Run]) -> Plot:
    """The share of all dependency that the most dependent tokens hold."""
    curves = [lorenz(_dependency(run)) for run in runs]
    shares = [[share_of_top(_dependency(run), share) for share in TOP_SHARES] for run in runs]

    def draw(figure: Figure, theme: Theme) -> None:
        ax = prepare(figure.subplots(), "Share of all dependency")
        ax.plot([0, 1], [0, 1], color=theme.muted, linewidth=1, linestyle=DASHED)
        for (x, y), held, style in zip(curves, shares, _styles(runs, theme), strict=True):
            shown = np.unique(np.linspace(0, x.size - 1, 1000).astype(np.int64))
            ax.plot(x[shown], y[shown], **style)
            ax.plot(TOP_SHARES, held, "o", color=style["color"], markersize=5)
        if len(runs) == 1:
            height = 1.02
            for share, value in reversed(list(zip(TOP_SHARES, shares[0], strict=True))):
                height = min(value - 0.07, height - 0.09)  # below its dot and below its neighbour's label
                ax.text(share + 0.015, height, f"top {100 * share:.0f} %: {percent(value)}", va="center")
        else:
            _legend_below(figure)
        ax.set(xlim=(0, 1), ylim=(0, 1.02))
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        ax.set_xlabel("share of the tokens, most dependent first")

    caption = (
        "Lorenz curve: how much of all dependency the most dependent tokens hold; dots at the top 10, 20 and 40 %. On "
        "the dashed line every token would hold the same."
    )
    if len(runs) == 1:
        caption += f" Gini coefficient {gini(_dependency(runs[0])):.2f}."
    alts = [
        ", ".join(f"top {100 * s:.0f} %: {percent(v)}" for s, v in zip(TOP_SHARES, held, strict=True))
        for held in shares
    ]
    return _plot("lorenz", caption, runs, alts, draw)


def entropy_plot(runs: Sequence[Run]) -> Plot:
    """Whether a token's entropy tells its dependency."""
    correlations = [rank_correlation(run.tokens["entropy"], run.tokens["dependency"]) for run in runs]
    held = [held_by_entropy(run.tokens, run.keep_ratio) for run in runs]
    tables = [by_entropy(run.tokens) for run in runs]

    def draw_one(figure: Figure, theme: Theme) -> None:
        ax = prepare(figure.subplots(), "Entropy against dependency")
        lowest = 1e-6  # nats; below it nothing is told apart here
        x, y = (np.log10(np.maximum(runs[0].tokens[c].to_numpy(np.float64), lowest)) for c in ("entropy", "dependency"))
        counts, x_edges, y_edges = np.histogram2d(x, y, bins=(44, 32))
        mesh = ax.pcolormesh(
            x_edges,
            y_edges,
            np.ma.masked_equal(counts.T, 0),
            cmap=colour_map(theme),
            norm=LogNorm(1, max(2.0, float(counts.max()))),
        )
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(5, integer=True))
            axis.set_major_formatter(FuncFormatter(_decade_or_floor))
        ax.grid(False)
        ax.set_xlabel("entropy, nats")
        ax.set_ylabel("dependency, nats")
        bar = figure.colorbar(mesh, ax=ax, pad=0.02)
        bar.outline.set_visible(False)
        bar.ax.minorticks_off()
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
        bar.set_label("tokens")

    def draw_several(figure: Figure, theme: Theme) -> None:
        ax = prepare(figure.subplots(), "Dependency by entropy")
        _spreads(figure, ax, runs, tables, theme)
        ax.set_xlim(0, 1)
        ax.set_xticks([0.05, 0.5, 0.95], ["lowest tenth", "entropy", "highest tenth"])

    alts = [f"rank correlation {_correlation(c)}" for c in correlations]
    if len(runs) > 1:
        caption = "Mean dependency in tenths of the tokens by entropy. A steep line would make entropy a substitute."
        return _plot("entropy", caption, runs, alts, draw_several)
    ratio = runs[0].keep_ratio
    caption = (
        "Every token by the entropy of its distribution and by its dependency; the more orange a cell, the more tokens "
        f"it holds, and the outermost hold all beyond. The rank correlation is {_correlation(correlations[0])}; the "
        f"{100 * ratio:.0f} % of highest entropy in each response hold {_share(held[0])} of all dependency, the kept "
        f"ones {_share(_kept_share(runs[0]))}."
    )
    return _plot("entropy", caption, runs, alts, draw_one)


def overlap_plot(runs: Sequence[Run]) -> Plot:
    """How far the kept sets by exact KL, k3, JSD and entropy are the same."""
    tables = [overlaps(run.tokens, run.keep_ratio) for run in runs]
    chance = [overlap_by_chance(run.tokens, run.keep_ratio) for run in runs]
    names = [ESTIMATORS[name] for name in COMPARED]

    def draw_one(figure: Figure, theme: Theme) -> None:
        ax = prepare(figure.subplots(), f"Overlap of the top {100 * runs[0].keep_ratio:.0f} % sets")
        values = tables[0].loc[list(COMPARED), list(COMPARED)].to_numpy()
        ax.imshow(values, cmap=colour_map(theme), vmin=0, vmax=1, aspect="auto")
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                same = row == column
                text = "" if same else percent(value)
                ax.text(column, row, text, ha="center", va="center", size=11, weight="normal" if same else "bold")
                if same:
                    ax.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=theme.surface))
        ax.set_xticks(range(len(names)), names)
        ax.set_yticks(range(len(names)), names)
        ax.tick_params(length=0)
        ax.grid(False)
        ax.spines["bottom"].set_visible(False)

    def draw_several(figure: Figure, theme: Theme) -> None:
        ax = prepare(figure.subplots(), "Overlap of the kept sets")
        values = [[float(table.loc[a, b]) for a, b in _PAIRS] for table in tables]
        _dots(figure, ax, [f"{ESTIMATORS[a]}, {ESTIMATORS[b]}" for a, b in _PAIRS], values, runs, theme)
        ax.axvline(float(np.mean(chance)), color=theme.muted, linewidth=1, linestyle=DASHED)
        _share_axis(ax)

    alts = [", ".join(f"{a} and {b} {percent(float(table.loc[a, b]))}" for a, b in _PAIRS) for table in tables]
    caption = (
        "Share of the tokens that gradient filtering would keep by one measure and by the other too, averaged over the "
        f"responses; equals go to the earlier token. Random sets would share {percent(float(np.mean(chance)))}"
    ) + (", the dashed line." if len(runs) > 1 else ".")
    return _plot("overlap", caption, runs, alts, draw_one if len(runs) == 1 else draw_several)


def type_plot(runs: Sequence[Run]) -> Plot:
    """Mean dependency by kind of token."""
    tables = [token_types(run.tokens) for run in runs]
    order = _by_mean(tables)

    def draw(figure: Figure, theme: Theme) -> None:
        ax = prepare(figure.subplots(), "Kinds of token")
        if len(runs) == 1:
            notes = [f"{percent(row.held)} held by {percent(row.share)}" for row in tables[0].loc[order].itertuples()]
            _bars(ax, order, tables[0].loc[order, "mean"].tolist(), notes, theme)
        else:
            _dots(figure, ax, order, [_column(table, order, "mean") for table in tables], runs, theme)
        ax.set_xlabel("mean dependency, nats")

    caption = "Mean dependency by kind of token, judged by the token's text alone (English words, digits, LaTeX)."
    if len(runs) == 1:
        caption += " Beside each bar: the share of all dependency that the kind holds, and its share of the tokens."
    alts = [_listed([kind for kind in order if kind in table.index], table) for table in tables]
    return _plot("types", caption, runs, alts, draw, rows=len(order))


def top_token_plot(runs: Sequence[Run]) -> Plot | None:
    """The individual tokens of highest mean dependency; None where no token occurs often enough in every run."""
    at_least, count = 10, 12
    tables = [top_tokens(run.tokens, count=10**9, at_least=at_least) for run in runs]
    shared = [text for text in tables[0].index if all(text in table.index for table in tables)]
    if not shared:
        return None
    order = _by_mean([table.loc[shared] for table in tables])[:count]
    labels = [_elide(visible(text), 18) for text in order]

    def draw(figure: Figure, theme: Theme) -> None:
        ax = prepare(figure.subplots(), "Most dependent tokens")
        if len(runs) == 1:
            notes = [f"{row.tokens:,} times, kept {percent(row.kept)}" for row in tables[0].loc[order].itertuples()]
            _bars(ax, labels, tables[0].loc[order, "mean"].tolist(), notes, theme)
        else:
            _dots(figure, ax, labels, [_column(table, order, "mean") for table in tables], runs, theme)
        for label in ax.get_yticklabels():
            label.set_fontfamily("DejaVu Sans Mono")
            label.set_parse_math(False)  # a lone $ is text here
        ax.set_xlabel("mean dependency, nats")

    caption = f"The texts of highest mean dependency among those that occur at least {at_least} times"
    caption += "." if len(runs) == 1 else " in every run, by the mean of the runs."
    alts = [_listed(order, table) for table in tables]
    return _plot("top_tokens", caption, runs, alts, draw, rows=len(order))


def draw_error_plot(runs: Sequence[Run]) -> Plot | None:
    """How far a token's dependency by one perturbation lies from its mean; None with a single draw."""
    found = [(run, one) for run in runs if (one := one_draw(run.tokens, run.keep_ratio, run.draws)) is not None]
    found = [(run, one) for run, one in found if one.relative_kept.size]
    if not found:
        return None
    kept = [one.relative_kept for _, one in found]
    edges = np.linspace(0, float(np.quantile(np.concatenate(kept), 0.995)) * 1.1 or 1.0, 41)

    def draw(figure: Figure, theme: Theme) -> None:
        ax = prepare(figure.subplots(), "Relative error of one draw")
        if len(runs) == 1:
            one = found[0][1]
            groups = [("kept", one.relative_kept, theme.dependency), ("filtered out", one.relative_other, theme.muted)]
            for name, group, colour in groups:
                if group.size:
                    shares = np.histogram(np.minimum(group, edges[-1]), edges)[0] / group.size
                    ax.stairs(shares, edges, fill=True, color=colour, alpha=0.22)
                    ax.stairs(shares, edges, color=colour, linewidth=1.8, label=name)
            legend_beside_title(ax)
        else:
            styles = _styles([run for run, _ in found], theme, runs)
            _outlines(ax, [np.minimum(values, edges[-1]) for values in kept], edges, styles)
            _legend_below(figure)
        ax.set_xlim(0, float(edges[-1]))
        ax.set_ylim(bottom=0)
        ax.set_xlabel("standard deviation over draws / mean")
        _percent_axis(ax)

    medians = [float(np.median(one.relative_kept)) for _, one in found]
    caption = (
        "Standard deviation of a token's dependency over perturbations, relative to its mean: the error of the single "
        "draw that training takes. At 1 it is as large as the number itself; the last bin holds all beyond. "
    )
    if len(runs) == 1:
        draws = runs[0].draws
        caption += (
            f"Half of the kept tokens lie above {percent(medians[0])}. The mean of the {draws} draws here has "
            f"{percent(1 / math.sqrt(draws))} of that error."
        )
    else:
        caption += "Kept tokens only."
    alts = [f"median {percent(median)} of kept tokens" for median in medians]
    return _plot("draw_error", caption, [run for run, _ in found], alts, draw)


def draw_set_plot(runs: Sequence[Run]) -> Plot | None:
    """How far the set that one perturbation keeps is that of the mean of all; None with a single draw."""
    found = [(run, one) for run in runs if (one := one_draw(run.tokens, run.keep_ratio, run.draws)) is not None]
    if not found:
        return None
    rows = ["exact KL: one draw, mean", "k3: one draw, mean", "one draw of k3, mean KL"]
    values = [[one.overlap_kl, one.overlap_k3, one.overlap_k3_kl] for _, one in found]
    chance = float(np.mean([overlap_by_chance(run.tokens, run.keep_ratio) for run, _ in found]))

    def draw(figure: Figure, theme: Theme) -> None:
        ax = prepare(figure.subplots(), "Kept set of one draw")
        if len(runs) == 1:
            _bars(ax, rows, values[0], [percent(value) for value in values[0]], theme)
        else:
            _dots(figure, ax, rows, values, [run for run, _ in found], theme, runs)
        ax.axvline(chance, color=theme.ink, linewidth=1, linestyle=DASHED)
        _share_axis(ax)

    caption = (
        "Share of the set kept by the first perturbation alone that the mean of all draws keeps too. The mean holds "
        "that draw as well, so two independent draws agree less. The last row is what training by k3 sees against the "
        f"best that is known here. Dashed: random sets, {percent(chance)}."
    )
    alts = [", ".join(f"{row} {percent(value)}" for row, value in zip(rows, line, strict=True)) for line in values]
    return _plot("draw_sets", caption, [run for run, _ in found], alts, draw)


def _dependency(run: Run) -> np.ndarray:
    return run.tokens["dependency"].to_numpy(dtype=np.float64)


def _kept_share(run: Run) -> float:
    values, kept = _dependency(run), run.tokens["kept"].to_numpy(dtype=bool)
    return float(values[kept].sum() / values.sum()) if values.sum() > 0 else math.nan


def _correlation(value: float) -> str:
    return "undefined" if math.isnan(value) else f"{value:.2f}"


def _share(value: float) -> str:
    return "nothing" if math.isnan(value) else percent(value)


def _plot(
    name: str,
    caption: str,
    runs: Sequence[Run],
    alts: Sequence[str],
    draw: Callable[[Figure, Theme], None],
    *,
    rows: int = 0,
) -> Plot:
    """A plot whose alternative text names each run's numbers, higher where it has many rows or a legend below them."""
    said = alts[0] if len(runs) == 1 else "; ".join(f"{run.label}: {alt}" for run, alt in zip(runs, alts, strict=True))
    return Plot(
        name,
        caption,
        said[:1].upper() + said[1:] + ".",
        draw,
        (5.2, 3.2 + 0.16 * max(0, rows - 9) + 0.3 * (len(runs) > 1)),
    )


def _styles(shown: Sequence[Run], theme: Theme, runs: Sequence[Run] | None = None) -> list[dict]:
    """How the lines of runs look; a run looks the same in every figure of `runs`."""
    everyone = list(runs or shown)
    colours = series_colours(theme, len(everyone))
    places = [next(place for place, run in enumerate(everyone) if run is one) for one in shown]
    return [
        {
            "color": colours[place],
            "linestyle": _LINES[place % len(_LINES)],
            "linewidth": 2,
            "label": _short(everyone[place].label),
        }
        for place in places
    ]


def _spreads(figure: Figure, ax: Axes, runs: Sequence[Run], tables: Sequence[pd.DataFrame], theme: Theme) -> None:
    """Curves over the index of tables with mean, median and 90 % quantile, on a log axis of nats."""
    floor = 10.0**FLOOR_DECADE
    if len(runs) == 1:
        table = tables[0].clip(lower=floor)
        ax.fill_between(table.index, table["median"], table["q90"], color=theme.faint, alpha=0.4, linewidth=0)
        ax.plot(table.index, table["median"], color=theme.muted, linewidth=1.2, label="median")
        ax.plot(table.index, table["mean"], color=theme.dependency, linewidth=2.2, label="mean")
        legend_beside_title(ax)
    else:
        for table, style in zip(tables, _styles(runs, theme), strict=True):
            ax.plot(table.index, table["mean"].clip(lower=floor), **style)
        _legend_below(figure)
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    step = 1 + len(decades) // 7
    ax.set_yticks([10.0**d for d in decades[::step]], [decade_label(d) for d in decades[::step]])
    ax.set_ylim(10.0 ** decades[0], 10.0 ** decades[-1])
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_ylabel("nats, log scale")


def _bars(ax: Axes, rows: Sequence[str], values: Sequence[float], notes: Sequence[str], theme: Theme) -> None:
    """Horizontal bars with a note beside each."""
    places = np.arange(len(rows))
    ax.barh(places, values, height=0.62, color=theme.dependency)
    top = max([*values, FLOOR])
    for place, value, note in zip(places, values, notes, strict=True):
        offset: Any = {"xytext": (5, 0), "textcoords": "offset points"}
        ax.annotate(note, (value, float(place)), **offset, va="center", size=8, color=theme.muted)
    ax.set_xlim(0, top * 1.6)  # room for the notes
    ax.set_xticks([tick for tick in MaxNLocator(5).tick_values(0, top) if tick <= top])
    _rows(ax, rows)


def _dots(
    figure: Figure,
    ax: Axes,
    rows: Sequence[str],
    values: Sequence[Sequence[float]],
    shown: Sequence[Run],
    theme: Theme,
    runs: Sequence[Run] | None = None,
) -> None:
    """A dot per row and run; runs are set apart a little, so that equal dots are both seen."""
    offsets = np.linspace(-0.22, 0.22, len(shown))
    for line, style, offset in zip(values, _styles(shown, theme, runs), offsets, strict=True):
        ax.plot(line, np.arange(len(rows)) + offset, "o", color=style["color"], markersize=5.5, label=style["label"])
    ax.set_xlim(left=0)
    _rows(ax, rows)
    _legend_below(figure)


def _rows(ax: Axes, rows: Sequence[str]) -> None:
    ax.set_yticks(range(len(rows)), rows)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(True, axis="x")
    ax.grid(False, axis="y")


def _outlines(ax: Axes, groups: Sequence[np.ndarray], edges: np.ndarray, styles: Sequence[dict]) -> None:
    """Histograms as outlines, each in shares of its own group."""
    for values, style in zip(groups, styles, strict=True):
        ax.stairs(np.histogram(values, edges)[0] / values.size, edges, baseline=None, **style)
    ax.set_ylim(bottom=0)
    _percent_axis(ax)


def _edges(groups: Sequence[np.ndarray], count: int) -> np.ndarray:
    return np.linspace(0.0, max(float(values.max()) for values in groups) * 1.02 or 1.0, count)


def _percent_axis(ax: Axes) -> None:
    ax.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g} %"))


def _share_axis(ax: Axes) -> None:
    ax.set_xlim(0, 1.15)
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1])
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))


def _legend_below(figure: Figure) -> None:
    axes = figure.axes[0]
    handles, labels = axes.get_legend_handles_labels()
    widest = max(map(len, labels))
    figure.legend(handles, labels, loc="outside lower left", ncols=max(1, min(4, 64 // (widest + 6))))


def _decade_or_floor(value: float, _: object) -> str:
    label = decade_label(round(value))
    return f"≤ {label}" if round(value) <= -6 else label


def _by_mean(tables: Sequence[pd.DataFrame]) -> list[str]:
    """Rows of tables by their mean over the tables, highest first."""
    means = pd.concat([table["mean"] for table in tables], axis=1).mean(axis=1)
    return means.sort_values(ascending=False, kind="stable").index.tolist()


def _listed(rows: Sequence[str], table: pd.DataFrame) -> str:
    return ", ".join(f"{_elide(visible(row), 18)} {nats(float(table.loc[row, 'mean']))}" for row in rows)


def _column(table: pd.DataFrame, rows: Sequence[str], column: str) -> list[float]:
    return table[column].reindex(rows).astype(float).tolist()


def _elide(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _short(label: str) -> str:
    return _elide(label, 34)
