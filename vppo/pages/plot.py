"""A figure of ours: drawn once for a light and once for a dark page, by Matplotlib's object interface."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from vppo.pages.fonts import cover
from vppo.pages.theme import LIGHT, Theme

FLOOR_DECADE = -8  # what lies below 1e-8 nats is rounding, which is all that the kernels promise there
DASHED = (0, (2, 2))


@dataclass(frozen=True)
class Plot:
    """A figure before it is drawn.

    Attributes:
        name: The stem of its file.
        caption: How to read it, for the page.
        alt: What it shows, in words and numbers, for those who do not see it.
        draw: Puts it on an empty figure in the colours of a theme.
        size: Width and height in inches, at 100 CSS pixels to the inch.
    """

    name: str
    caption: str
    alt: str
    draw: Callable[[Figure, Theme], None]
    size: tuple[float, float] = (5.2, 3.2)

    def png(self, theme: Theme) -> bytes:
        """The PNG file in the colours of `theme`, two pixels to a CSS pixel."""
        with matplotlib.style.context(["default", _style(theme)]):
            figure = Figure(figsize=self.size, dpi=200)
            canvas = FigureCanvasAgg(figure)
            self.draw(figure, theme)
            cover(figure)
            file = io.BytesIO()
            # without the version of Matplotlib in the metadata, the same input gives the same bytes
            canvas.print_figure(file, format="png", metadata={"Software": None})
        return file.getvalue()

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        """How a notebook shows it, at its size in CSS pixels."""
        return self.png(LIGHT), {"width": round(100 * self.size[0])}


def nats(value: float) -> str:
    """A divergence to three digits, as a person writes it: `1.42`, `0.0031`, `6.3 × 10⁻⁷`."""
    if value == 0 or 1e-3 <= abs(value) < 1e3:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa} \N{MULTIPLICATION SIGN} {power_of_ten(int(exponent))}"


def percent(value: float) -> str:
    """A share from 0 to 1 as a percentage with one decimal."""
    return f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def _style(theme: Theme) -> dict[str, Any]:
    return {
        "figure.facecolor": theme.surface,
        "figure.constrained_layout.use": True,
        "figure.constrained_layout.h_pad": 0.09,
        "figure.constrained_layout.w_pad": 0.09,
        "savefig.facecolor": theme.surface,
        "axes.facecolor": theme.surface,
        "axes.edgecolor": theme.rule,
        "axes.labelcolor": theme.muted,
        "axes.labelsize": 9,
        "axes.titlecolor": theme.ink,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlepad": 10,
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "grid.color": theme.rule,
        "grid.linewidth": 0.8,
        "legend.fontsize": 9,
        "legend.frameon": False,
        "legend.handlelength": 1.0,
        "legend.handleheight": 0.8,
        "legend.handletextpad": 0.5,
        "legend.columnspacing": 1.4,
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "text.color": theme.ink,
        "xtick.color": theme.rule,
        "xtick.labelcolor": theme.muted,
        "ytick.color": theme.rule,
        "ytick.labelcolor": theme.muted,
        "ytick.left": False,
    }


def prepare(ax: Axes, title: str) -> Axes:
    ax.set_title(title, loc="left")
    return ax


def line(ax: Axes, x: np.ndarray, y: np.ndarray, **style: Any) -> None:
    ax.plot(x, y, marker="." if x.size == 1 else None, **style)  # a line through one point is invisible


def legend_beside_title(ax: Axes) -> None:
    # above the axes it can cover no bar, whatever the data
    ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderaxespad=0.4)


def room_above(ax: Axes, peak: float, share: float, *, whole: bool) -> None:
    """Ends the y axis so that the highest bar takes a share of it; ticks go no higher than the bar."""
    ticks = MaxNLocator(4, integer=whole).tick_values(0, peak)
    ax.set(ylim=(0, peak / share), yticks=[tick for tick in ticks if tick <= peak * 1.001])


def mark(ax: Axes, x: float, height: float, label: str, theme: Theme) -> None:
    """A dashed line at `x`, up to a label at `height`, a fraction of the axes."""
    ax.axvline(x, ymax=height, color=theme.ink, linewidth=1.0, linestyle=DASHED)
    box = {"facecolor": theme.surface, "edgecolor": "none", "pad": 1.0}  # where two are close, over the other's line
    style: dict[str, Any] = {"ha": "center", "va": "bottom", "bbox": box}
    ax.annotate(label, (x, height), (0, 2), ("data", "axes fraction"), "offset points", **style)


def power_of_ten(exponent: int) -> str:
    return f"10{str(exponent).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def decade_label(exponent: int) -> str:
    return f"{10.0**exponent:g}" if -3 <= exponent <= 3 else power_of_ten(exponent)


def dependency_bars(
    ax: Axes, values: np.ndarray, kept: np.ndarray, marks: Sequence[tuple[float, str]], theme: Theme
) -> None:
    """Shares of the tokens by dependency on a log axis, kept ones apart from filtered ones, with up to two marks."""
    floor = 10.0**FLOOR_DECADE
    at_floor = values <= floor
    last_decade = max(1, math.ceil(math.log10(max(float(values.max()), floor))))
    edges = np.linspace(FLOOR_DECADE, last_decade, 4 * (last_decade - FLOOR_DECADE) + 1)
    logs = np.log10(np.maximum(values, floor))
    left = np.append(edges[:-1], FLOOR_DECADE - 0.8)  # the bin at the floor stands apart from the axis's own
    width = np.append(np.diff(edges) * 0.92, 0.5)
    base = np.zeros(left.size)
    for label, group, colour in (("kept", kept, theme.dependency), ("filtered out", ~kept, theme.faint)):
        counts = np.append(np.histogram(logs[group & ~at_floor], edges)[0], (group & at_floor).sum())
        ax.bar(left, counts / values.size, width, base, align="edge", color=colour, label=label)
        base = base + counts / values.size
    room_above(ax, float(base.max()), 0.77, whole=False)
    for height, (value, label) in zip((0.85, 0.93), marks, strict=False):
        mark(ax, math.log10(value), height, label, theme)
    dependency_axis(ax, last_decade)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g} %"))
    legend_beside_title(ax)


def dependency_axis(ax: Axes, last_decade: int) -> None:
    """An x axis of decades of nats, which begins with the bin for all at the floor."""
    decades = range(FLOOR_DECADE + 1, last_decade + 1)
    ax.set_xticks(
        [FLOOR_DECADE - 0.55, *decades],
        [f"≤ {power_of_ten(FLOOR_DECADE)}", *(decade_label(decade) for decade in decades)],
    )
    ax.set_xlim(FLOOR_DECADE - 1.0, last_decade)
    ax.set_xlabel("nats, log scale")
