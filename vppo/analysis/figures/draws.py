"""How far one perturbation tells what the mean of several does."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from vppo.analysis.figures.parts import (
    draw_bars,
    draw_dots,
    draw_outlines,
    legend_below,
    line_styles,
    percent_axis,
    plot_of,
    share_axis,
)
from vppo.analysis.perception import Run, one_draw, overlap_by_chance
from vppo.pages.plot import DASHED, Plot, legend_beside_title, percent, prepare
from vppo.pages.theme import Theme


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
            styles = line_styles([run for run, _ in found], theme, runs)
            draw_outlines(ax, [np.minimum(values, edges[-1]) for values in kept], edges, styles)
            legend_below(figure)
        ax.set_xlim(0, float(edges[-1]))
        ax.set_ylim(bottom=0)
        ax.set_xlabel("standard deviation over draws / mean")
        percent_axis(ax)

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
    return plot_of("draw_error", caption, [run for run, _ in found], alts, draw)


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
            draw_bars(ax, rows, values[0], [percent(value) for value in values[0]], theme)
        else:
            draw_dots(figure, ax, rows, values, [run for run, _ in found], theme, runs)
        ax.axvline(chance, color=theme.ink, linewidth=1, linestyle=DASHED)
        share_axis(ax)

    caption = (
        "Share of the set kept by the first perturbation alone that the mean of all draws keeps too. The mean holds "
        "that draw as well, so two independent draws agree less. The last row is what training by k3 sees against the "
        f"best that is known here. Dashed: random sets, {percent(chance)}."
    )
    alts = [", ".join(f"{row} {percent(value)}" for row, value in zip(rows, line, strict=True)) for line in values]
    return plot_of("draw_sets", caption, [run for run, _ in found], alts, draw)
