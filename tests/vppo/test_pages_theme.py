"""The colour of a dependency: evenly spaced, readable, and ending at a round number."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from vppo.pages.theme import THEMES, DependencyScale, Theme

# sRGB to the cones' responses, and those to lightness and two opponent axes: the constants that define OKLab
TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def linear_rgb(colour: str) -> np.ndarray:
    rgb = np.array(to_rgb(colour))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def oklab(colour: str) -> np.ndarray:
    return TO_LAB @ np.cbrt(TO_LMS @ linear_rgb(colour))


def luminance(colour: str) -> float:
    """Relative luminance as WCAG defines it."""
    return float(linear_rgb(colour) @ [0.2126, 0.7152, 0.0722])


def contrast(first: str, second: str) -> float:
    darker, lighter = sorted([luminance(first), luminance(second)])
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("theme", THEMES, ids=lambda theme: theme.name)
def test_equal_steps_of_the_scale_are_equal_steps_of_colour(theme: Theme) -> None:
    scale = DependencyScale(4.0)
    colours = scale.colours(4.0 * np.linspace(0, 1, 9) ** 2, theme)
    assert (colours[0], colours[-1]) == (theme.low, theme.high)
    steps = np.linalg.norm(np.diff([oklab(colour) for colour in colours], axis=0), axis=1)
    assert steps == pytest.approx(np.full(8, steps.mean()), rel=0.1)  # colours are rounded to 8 bits


@pytest.mark.parametrize("theme", THEMES, ids=lambda theme: theme.name)
def test_text_is_readable_on_every_colour_of_the_scale(theme: Theme) -> None:
    scale = DependencyScale(1.0)
    assert min(contrast(theme.ink, colour) for colour in scale.colours(np.linspace(0, 1, 50), theme)) >= 4.5
    assert contrast(theme.muted, theme.low) >= 4.5  # special tokens
    for background in (theme.page, theme.surface):
        for colour in (theme.ink, theme.muted):
            assert contrast(colour, background) >= 4.5
    assert min(contrast(colour, theme.surface) for colour in (theme.good, theme.bad)) >= 4.5
    assert min(contrast(colour, theme.surface) for colour in (theme.dependency, theme.outcome)) >= 3.0  # lines


def test_position_is_the_root_and_stays_on_the_scale() -> None:
    positions = DependencyScale(4.0).position(np.array([-1e-9, 0.0, 1.0, 4.0, 50.0]))
    assert positions.tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("largest", "top"), [(0.0, 0.01), (1e-7, 0.01), (0.9, 1.0), (1.0, 1.0), (1.2, 1.5), (7.0, 8.0), (9.9, 10.0)]
)
def test_the_scale_ends_at_a_round_number(largest: float, top: float) -> None:
    scale = DependencyScale.of(np.full(10, largest))
    assert scale.top == top
    assert [value for value, _ in scale.ticks] == sorted(value for value, _ in scale.ticks)
    assert scale.ticks[0] == (0.0, "0")
    assert scale.ticks[-1] == (top, f"≥ {top:g}")


def test_no_tokens_still_give_a_scale() -> None:
    assert DependencyScale.of(np.empty(0)).top == 1.0
