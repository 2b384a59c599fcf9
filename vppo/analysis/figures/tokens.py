"""How the dependencies of tokens are distributed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from vppo.analysis.figures.parts import dependency_of, legend_below, line_styles, percent_axis, plot_of
from vppo.analysis.perception import FLOOR, Distribution, Run, log_density
from vppo.pages.plot import FLOOR_DECADE, Plot, dependency_axis, dependency_bars, nats, percent, power_of_ten, prepare
from vppo.pages.theme import Theme


def token_plot(runs: Sequence[Run]) -> Plot:
    """Token dependency on a log axis: bars by kept and filtered with the density, or the densities of several runs."""
    values = [dependency_of(run) for run in runs]
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
            for (x, density), spread, style in zip(densities, spreads, line_styles(runs, theme), strict=True):
                inside = x > FLOOR_DECADE
                ax.plot(x[inside], density[inside] / 4, **style)
                ax.plot(FLOOR_DECADE - 0.55, spread.at_floor, "o", color=style["color"], markersize=5)
            dependency_axis(ax, last_decade)
            ax.set_ylim(bottom=0)
            percent_axis(ax)
            legend_below(figure)

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
    return plot_of(
        "tokens", caption, runs, [f"median {nats(s.median)}, mean {nats(s.mean)} nats" for s in spreads], draw
    )


def frequency_plot(runs: Sequence[Run]) -> Plot | None:
    """The paper's Figure 3: how often a dependency occurs, the frequency on a log axis; None without any dependency."""
    values = [dependency_of(run) for run in runs]
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
            for share, style in zip(shares, line_styles(runs, theme), strict=True):
                ax.stairs(np.maximum(share, smallest / 10), edges, baseline=None, **style)
            legend_below(figure)
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
    return plot_of("frequency", caption, runs, [f"{percent(share)} in the first bin" for share in first], draw)
