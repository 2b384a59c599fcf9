"""Two appearances, light and dark, and the colour of a dependency in each; page and figures share them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, to_hex


@dataclass(frozen=True)
class Theme:
    """The colours of one appearance, as `#rrggbb`; the page's CSS variables and the figures share them."""

    name: str
    page: str
    surface: str
    ink: str
    muted: str
    rule: str
    low: str  # dependency zero
    high: str  # dependency at the top of the scale
    dependency: str  # marks that measure the dependency
    outcome: str  # marks that measure reward and accuracy
    faint: str  # whatever the figure sets the others against
    good: str
    bad: str


LIGHT = Theme(
    name="light",
    page="#f7f5f1",
    surface="#fffefb",
    ink="#1d2127",
    muted="#626974",
    rule="#e3dfd7",
    low="#f0ede6",
    high="#ee6a1f",
    dependency="#d9560b",
    outcome="#2b6cb0",
    faint="#c3c0b9",
    good="#1c7c43",
    bad="#c02f2f",
)
DARK = Theme(
    name="dark",
    page="#121417",
    surface="#1b1e23",
    ink="#e9e7e3",
    muted="#9da5af",
    rule="#32373e",
    low="#272b31",
    high="#b24606",
    dependency="#f58442",
    outcome="#74aee8",
    faint="#565d67",
    good="#5cc98a",
    bad="#ff8077",
)
THEMES = (LIGHT, DARK)
# at equal steps from low to high on a straight line in OKLab, so that equal steps are perceived as equal
_BETWEEN = {"light": ("#f4ceba", "#f5af8d", "#f38e5e"), "dark": ("#493430", "#6b3c2b", "#8e4221")}
_SERIES = {
    "light": ("#d9560b", "#2b6cb0", "#1c7c43", "#8a4fb5", "#96700a", "#c0327a", "#0f8090", "#626974"),
    "dark": ("#f58442", "#74aee8", "#5cc98a", "#c39bea", "#d8b44a", "#f083b4", "#55c3d0", "#9da5af"),
}


def series_colours(theme: Theme, count: int) -> list[str]:
    """Colours that tell `count` runs in one figure apart; from the ninth on they begin again."""
    return [_SERIES[theme.name][index % len(_SERIES[theme.name])] for index in range(count)]


@dataclass(frozen=True)
class DependencyScale:
    """Maps dependencies to colours.

    Attributes:
        top: The dependency in nats at which the scale ends; what lies above has the last colour.
    """

    top: float

    @classmethod
    def of(cls, values: np.ndarray) -> DependencyScale:
        """The scale that ends at a round number which few of the values exceed, 0.01 nats at least."""
        high = float(np.quantile(values, 0.98)) if values.size else 1.0
        high = max(high, 0.01)  # below it, colour would make rounding look like a signal
        power = 10.0 ** math.floor(math.log10(high))
        step = next((step for step in (1, 1.5, 2, 3, 4, 5, 6, 8) if high <= step * power * 1.001), 10)
        return cls(float(f"{step * power:.2g}"))

    def position(self, dependency: np.ndarray | float) -> np.ndarray:
        """Where values in nats lie on the scale, from 0 to 1."""
        # the root of a divergence behaves like a distance, so equal steps of colour are equal distances between views
        return np.sqrt(np.clip(np.asarray(dependency, dtype=np.float64) / self.top, 0.0, 1.0))

    def colours(self, dependency: np.ndarray, theme: Theme) -> list[str]:
        """The colour, `#rrggbb`, of each value in nats."""
        return [to_hex(rgba) for rgba in colour_map(theme)(self.position(dependency))]

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Values in nats for a legend, each with its label."""
        inner = [f"{self.top * share:.1g}" for share in (0.02, 0.1, 0.3, 0.6)]
        return [(float(label), label) for label in ["0", *inner]] + [(self.top, f"≥ {self.top:g}")]


def colour_map(theme: Theme) -> LinearSegmentedColormap:
    """The theme's colours from no dependency to the top of the scale."""
    return LinearSegmentedColormap.from_list(
        f"dependency-{theme.name}", [theme.low, *_BETWEEN[theme.name], theme.high], N=256
    )
