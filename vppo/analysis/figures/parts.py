"""What the figures of an analysis share: lines, bars and dots of runs, axes, legends."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from vppo.analysis.perception import FLOOR, Run
from vppo.pages.plot import FLOOR_DECADE, Plot, decade_label, legend_beside_title
from vppo.pages.theme import Theme, series_colours

_LINES = ("-", (0, (4, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))


def dependency_of(run: Run) -> np.ndarray:
    return run.tokens["dependency"].to_numpy(dtype=np.float64)


def plot_of(
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


def line_styles(shown: Sequence[Run], theme: Theme, runs: Sequence[Run] | None = None) -> list[dict]:
    """How the lines of runs look; a run looks the same in every figure of `runs`."""
    everyone = list(runs or shown)
    colours = series_colours(theme, len(everyone))
    places = [next(place for place, run in enumerate(everyone) if run is one) for one in shown]
    return [
        {
            "color": colours[place],
            "linestyle": _LINES[place % len(_LINES)],
            "linewidth": 2,
            "label": short_label(everyone[place].label),
        }
        for place in places
    ]


def draw_spreads(figure: Figure, ax: Axes, runs: Sequence[Run], tables: Sequence[pd.DataFrame], theme: Theme) -> None:
    """Curves over the index of tables with mean, median and 90 % quantile, on a log axis of nats."""
    floor = 10.0**FLOOR_DECADE
    if len(runs) == 1:
        table = tables[0].clip(lower=floor)
        ax.fill_between(table.index, table["median"], table["q90"], color=theme.faint, alpha=0.4, linewidth=0)
        ax.plot(table.index, table["median"], color=theme.muted, linewidth=1.2, label="median")
        ax.plot(table.index, table["mean"], color=theme.dependency, linewidth=2.2, label="mean")
        legend_beside_title(ax)
    else:
        for table, style in zip(tables, line_styles(runs, theme), strict=True):
            ax.plot(table.index, table["mean"].clip(lower=floor), **style)
        legend_below(figure)
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    step = 1 + len(decades) // 7
    ax.set_yticks([10.0**d for d in decades[::step]], [decade_label(d) for d in decades[::step]])
    ax.set_ylim(10.0 ** decades[0], 10.0 ** decades[-1])
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_ylabel("nats, log scale")


def draw_bars(ax: Axes, rows: Sequence[str], values: Sequence[float], notes: Sequence[str], theme: Theme) -> None:
    """Horizontal bars with a note beside each."""
    places = np.arange(len(rows))
    ax.barh(places, values, height=0.62, color=theme.dependency)
    top = max([*values, FLOOR])
    for place, value, note in zip(places, values, notes, strict=True):
        offset: Any = {"xytext": (5, 0), "textcoords": "offset points"}
        ax.annotate(note, (value, float(place)), **offset, va="center", size=8, color=theme.muted)
    ax.set_xlim(0, top * 1.6)  # room for the notes
    ax.set_xticks([tick for tick in MaxNLocator(5).tick_values(0, top) if tick <= top])
    name_rows(ax, rows)


def draw_dots(
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
    for line, style, offset in zip(values, line_styles(shown, theme, runs), offsets, strict=True):
        ax.plot(line, np.arange(len(rows)) + offset, "o", color=style["color"], markersize=5.5, label=style["label"])
    ax.set_xlim(left=0)
    name_rows(ax, rows)
    legend_below(figure)


def name_rows(ax: Axes, rows: Sequence[str]) -> None:
    ax.set_yticks(range(len(rows)), rows)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(True, axis="x")
    ax.grid(False, axis="y")


def draw_outlines(ax: Axes, groups: Sequence[np.ndarray], edges: np.ndarray, styles: Sequence[dict]) -> None:
    """Histograms as outlines, each in shares of its own group."""
    for values, style in zip(groups, styles, strict=True):
        ax.stairs(np.histogram(values, edges)[0] / values.size, edges, baseline=None, **style)
    ax.set_ylim(bottom=0)
    percent_axis(ax)


def bin_edges(groups: Sequence[np.ndarray], count: int) -> np.ndarray:
    return np.linspace(0.0, max(float(values.max()) for values in groups) * 1.02 or 1.0, count)


def percent_axis(ax: Axes) -> None:
    ax.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g} %"))


def share_axis(ax: Axes) -> None:
    ax.set_xlim(0, 1.15)
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1])
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))


def legend_below(figure: Figure) -> None:
    axes = figure.axes[0]
    handles, labels = axes.get_legend_handles_labels()
    widest = max(map(len, labels))
    figure.legend(handles, labels, loc="outside lower left", ncols=max(1, min(4, 64 // (widest + 6))))


def elide(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def short_label(label: str) -> str:
    return elide(label, 34)
