"""Where in a response its tokens depend on the image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from vppo.analysis.figures.parts import draw_spreads, plot_of
from vppo.analysis.perception import Run, by_position, by_relative_position
from vppo.pages.plot import Plot, nats, prepare
from vppo.pages.theme import Theme


def relative_position_plot(runs: Sequence[Run]) -> Plot:
    """Dependency from the first to the last twentieth of the responses."""
    tables = [by_relative_position(run.tokens) for run in runs]

    def draw(figure: Figure, theme: Theme) -> None:
        ax = prepare(figure.subplots(), "Along the response")
        draw_spreads(figure, ax, runs, tables, theme)
        ax.set_xlim(0, 1)
        ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["start", "25 %", "50 %", "75 %", "end"])

    what = "Mean and median; 90 % of the tokens lie below the upper edge of the band." if len(runs) == 1 else "Means."
    ends = [[nats(float(table["mean"].iloc[place])) for place in (0, -1)] for table in tables]
    alts = [f"mean {start} at the start, {end} at the end" for start, end in ends]
    return plot_of("position", f"Tokens by their place in their response, in twentieths. {what}", runs, alts, draw)


def position_plot(runs: Sequence[Run]) -> Plot:
    """Dependency by the number of tokens since the start."""
    tables = [by_position(run.tokens) for run in runs]
    tables = [table.set_index(np.arange(len(table), dtype=np.float64)) for table in tables]
    bins = max(len(table) for table in tables)
    labels = ["1", "2", *(f"{2**k + 1}-{2 ** (k + 1)}" for k in range(1, bins))][:bins]

    def draw(figure: Figure, theme: Theme) -> None:
        ax = prepare(figure.subplots(), "From the start")
        draw_spreads(figure, ax, runs, tables, theme)
        shown = range(0, bins, 1 if bins <= 7 else 2)
        ax.set_xticks(list(shown), [labels[place] for place in shown])
        ax.set_xlabel("token of the response")

    what = "Mean and median; 90 % of the tokens lie below the upper edge of the band." if len(runs) == 1 else "Means."
    caption = f"The same by the token's number; long responses alone reach the right end. {what}"
    alts = [f"mean {nats(float(t['mean'].iloc[0]))} at the first token" for t in tables]
    return plot_of("distance", caption, runs, alts, draw)
