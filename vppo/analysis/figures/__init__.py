"""The figures of an analysis: one run in detail, several runs over each other; the numbers are `perception.py`'s."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vppo.analysis.figures.concentration import lorenz_plot
from vppo.analysis.figures.draws import draw_error_plot, draw_set_plot
from vppo.analysis.figures.kinds import top_token_plot, type_plot
from vppo.analysis.figures.measures import entropy_plot, overlap_plot
from vppo.analysis.figures.position import position_plot, relative_position_plot
from vppo.analysis.figures.responses import correctness_plot, trajectory_plot
from vppo.analysis.figures.tokens import frequency_plot, token_plot
from vppo.analysis.perception import Run
from vppo.pages.plot import Plot

__all__ = [
    "correctness_plot",
    "draw_error_plot",
    "draw_set_plot",
    "entropy_plot",
    "frequency_plot",
    "lorenz_plot",
    "overlap_plot",
    "perception_plots",
    "position_plot",
    "relative_position_plot",
    "token_plot",
    "top_token_plot",
    "trajectory_plot",
    "type_plot",
]


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
