"""Whether other measures of a token would pick the same ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from vppo.analysis.figures.parts import dependency_of, draw_dots, draw_spreads, plot_of, share_axis
from vppo.analysis.perception import (
    COMPARED,
    ESTIMATORS,
    Run,
    by_entropy,
    held_by_entropy,
    overlap_by_chance,
    overlaps,
    rank_correlation,
)
from vppo.pages.plot import DASHED, Plot, decade_label, percent, prepare
from vppo.pages.theme import Theme, colour_map

_PAIRS = [(a, b) for i, a in enumerate(COMPARED) for b in COMPARED[i + 1 :]]


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
        draw_spreads(figure, ax, runs, tables, theme)
        ax.set_xlim(0, 1)
        ax.set_xticks([0.05, 0.5, 0.95], ["lowest tenth", "entropy", "highest tenth"])

    alts = [f"rank correlation {_correlation(c)}" for c in correlations]
    if len(runs) > 1:
        caption = "Mean dependency in tenths of the tokens by entropy. A steep line would make entropy a substitute."
        return plot_of("entropy", caption, runs, alts, draw_several)
    ratio = runs[0].keep_ratio
    caption = (
        "Every token by the entropy of its distribution and by its dependency; the more orange a cell, the more tokens "
        f"it holds, and the outermost hold all beyond. The rank correlation is {_correlation(correlations[0])}; the "
        f"{100 * ratio:.0f} % of highest entropy in each response hold {_share(held[0])} of all dependency, the kept "
        f"ones {_share(_kept_share(runs[0]))}."
    )
    return plot_of("entropy", caption, runs, alts, draw_one)


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
        draw_dots(figure, ax, [f"{ESTIMATORS[a]}, {ESTIMATORS[b]}" for a, b in _PAIRS], values, runs, theme)
        ax.axvline(float(np.mean(chance)), color=theme.muted, linewidth=1, linestyle=DASHED)
        share_axis(ax)

    alts = [", ".join(f"{a} and {b} {percent(float(table.loc[a, b]))}" for a, b in _PAIRS) for table in tables]
    caption = (
        "Share of the tokens that gradient filtering would keep by one measure and by the other too, averaged over the "
        f"responses; equals go to the earlier token. Random sets would share {percent(float(np.mean(chance)))}"
    ) + (", the dashed line." if len(runs) > 1 else ".")
    return plot_of("overlap", caption, runs, alts, draw_one if len(runs) == 1 else draw_several)


def _kept_share(run: Run) -> float:
    values, kept = dependency_of(run), run.tokens["kept"].to_numpy(dtype=bool)
    return float(values[kept].sum() / values.sum()) if values.sum() > 0 else math.nan


def _correlation(value: float) -> str:
    return "undefined" if math.isnan(value) else f"{value:.2f}"


def _share(value: float) -> str:
    return "nothing" if math.isnan(value) else percent(value)


def _decade_or_floor(value: float, _: object) -> str:
    label = decade_label(round(value))
    return f"≤ {label}" if round(value) <= -6 else label
