"""How few tokens hold most of the dependency."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from vppo.analysis.figures.parts import dependency_of, legend_below, line_styles, plot_of
from vppo.analysis.perception import TOP_SHARES, Run, gini, lorenz, share_of_top
from vppo.pages.plot import DASHED, Plot, percent, prepare
from vppo.pages.theme import Theme


def lorenz_plot(runs: Sequence[Run]) -> Plot:
    """The share of all dependency that the most dependent tokens hold."""
    curves = [lorenz(dependency_of(run)) for run in runs]
    shares = [[share_of_top(dependency_of(run), share) for share in TOP_SHARES] for run in runs]

    def draw(figure: Figure, theme: Theme) -> None:
        ax = prepare(figure.subplots(), "Share of all dependency")
        ax.plot([0, 1], [0, 1], color=theme.muted, linewidth=1, linestyle=DASHED)
        for (x, y), held, style in zip(curves, shares, line_styles(runs, theme), strict=True):
            shown = np.unique(np.linspace(0, x.size - 1, 1000).astype(np.int64))
            ax.plot(x[shown], y[shown], **style)
            ax.plot(TOP_SHARES, held, "o", color=style["color"], markersize=5)
        if len(runs) == 1:
            height = 1.02
            for share, value in reversed(list(zip(TOP_SHARES, shares[0], strict=True))):
                height = min(value - 0.07, height - 0.09)  # below its dot and below its neighbour's label
                ax.text(share + 0.015, height, f"top {100 * share:.0f} %: {percent(value)}", va="center")
        else:
            legend_below(figure)
        ax.set(xlim=(0, 1), ylim=(0, 1.02))
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        ax.set_xlabel("share of the tokens, most dependent first")

    caption = (
        "Lorenz curve: how much of all dependency the most dependent tokens hold; dots at the top 10, 20 and 40 %. On "
        "the dashed line every token would hold the same."
    )
    if len(runs) == 1:
        caption += f" Gini coefficient {gini(dependency_of(runs[0])):.2f}."
    alts = [
        ", ".join(f"top {100 * s:.0f} %: {percent(v)}" for s, v in zip(TOP_SHARES, held, strict=True))
        for held in shares
    ]
    return plot_of("lorenz", caption, runs, alts, draw)
