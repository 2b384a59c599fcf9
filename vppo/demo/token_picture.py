"""Images beside their answers, each token coloured by its dependency: the picture for a README."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyBboxPatch
from PIL import Image

from vppo.demo.scored import ScoredResponse
from vppo.pages.fonts import drawable
from vppo.pages.plot import Plot
from vppo.pages.theme import DependencyScale, Theme, colour_map
from vppo.pages.token_text import is_special, visible

_MONO = FontProperties(family="DejaVu Sans Mono")

# lengths in inches, font sizes in points
_WIDTH, _MARGIN = 9.6, 0.3
_PICTURE_WIDTH, _PICTURE_HEIGHT, _BETWEEN = 1.62, 0.8, 0.1
_TOKENS_X = _MARGIN + 2 * (_PICTURE_WIDTH + _BETWEEN) + 0.18
_MARK_WIDTH = 0.3
_TOKENS_WIDTH = _WIDTH - _MARGIN - _MARK_WIDTH - _TOKENS_X
_SIZE, _SPECIAL_SIZE = 12.0, 7.5
_ADVANCE = 0.602 / 72  # width of a character of DejaVu Sans Mono for each point of its size
_EM = 1 / 0.602  # the width of a square character, in those
_PAD, _SPACE, _CHIP_HEIGHT, _LINE = 0.045, 0.035, 0.25, 0.46
_MAX_LINES, _MAX_CHARACTERS = 4, 32
_HEAD, _ROW_GAP, _FOOT = 0.5, 0.26, 0.72


def token_picture(responses: Sequence[ScoredResponse], scale: DependencyScale) -> Plot:
    """Draws a row for each response: image, perturbed view, and the answer's tokens; kept tokens have their number.

    Args:
        responses: A handful; of an answer longer than four lines, the rest is left out.
        scale: The colours of the tokens.
    """
    rows = [_Row.lay_out(response) for response in responses]
    height = _HEAD + sum(row.height + _ROW_GAP for row in rows) + _FOOT

    def draw(figure: Figure, theme: Theme) -> None:
        figure.set_layout_engine("none")
        ax = figure.add_axes((0, 0, 1, 1))
        ax.axis("off")
        for x, title in (
            (_MARGIN, "image"),
            (_MARGIN + _PICTURE_WIDTH + _BETWEEN, "perturbed view"),
            (_TOKENS_X, "answer, token by token"),
        ):
            ax.text(x, _HEAD - 0.12, title, size=9, color=theme.muted, va="bottom")
        y = _HEAD
        for row in rows:
            row.draw(ax, y, scale, theme)
            y += row.height + _ROW_GAP
        _draw_legend(ax, y + 0.08, scale, theme)
        ax.set(xlim=(0, _WIDTH), ylim=(height, 0))  # last, because imshow moves the limits

    shown = "; ".join("".join(visible(token) for token in response.tokens[:40]) for response in responses)
    return Plot("tokens", "", f"Images with their answers coloured token by token: {shown}", draw, (_WIDTH, height))


@dataclass(frozen=True)
class _Chip:
    text: str
    special: bool
    dependency: float
    kept: bool
    x: float
    line: int
    width: float

    def draw(self, ax: Axes, x: float, y: float, colour: str, theme: Theme) -> None:
        ax.add_patch(
            FancyBboxPatch(
                (x, y), self.width, _CHIP_HEIGHT, "round,pad=0,rounding_size=0.04", facecolor=colour, edgecolor="none"
            )
        )
        ax.text(
            x + self.width / 2,
            y + _CHIP_HEIGHT * 0.7,
            self.text,
            size=_SPECIAL_SIZE if self.special else _SIZE,
            color=theme.muted if self.special and not self.kept else theme.ink,
            ha="center",
            fontproperties=_MONO,
            parse_math=False,  # a lone $ is text here
        )
        if self.kept:
            ax.plot([x + 0.015, x + self.width - 0.015], [y + _CHIP_HEIGHT + 0.035] * 2, color=theme.ink, linewidth=1.4)


@dataclass(frozen=True)
class _Row:
    response: ScoredResponse
    chips: list[_Chip]
    height: float

    @classmethod
    def lay_out(cls, response: ScoredResponse) -> _Row:
        chips: list[_Chip] = []
        x, line = 0.0, 0
        for token, dependency, kept in zip(response.tokens, response.dependency, response.kept, strict=True):
            text, special = _drawable(token), is_special(token)
            width = _columns(text) * _ADVANCE * (_SPECIAL_SIZE if special else _SIZE) + 2 * _PAD
            if x and x + width > _TOKENS_WIDTH:
                x, line = 0.0, line + 1
            if line == _MAX_LINES:
                break
            chips.append(_Chip(text, special, float(dependency), bool(kept), x, line, width))
            x += width + _SPACE
        lines = chips[-1].line + 1 if chips else 0
        pictures = (response.image, response.perturbed_image)
        return cls(response, chips, max(lines * _LINE, *(picture.height * _zoom(picture) for picture in pictures)))

    def draw(self, ax: Axes, y: float, scale: DependencyScale, theme: Theme) -> None:
        for column, picture in enumerate((self.response.image, self.response.perturbed_image)):
            width, height = (side * _zoom(picture) for side in picture.size)
            x = _MARGIN + column * (_PICTURE_WIDTH + _BETWEEN)
            ax.imshow(
                np.asarray(picture.convert("RGB")),
                extent=(x, x + width, y + height, y),
                aspect="auto",
                interpolation="nearest" if max(picture.size) < 128 else "antialiased",
            )
        colours = scale.colours(np.array([chip.dependency for chip in self.chips]), theme)
        for chip, colour in zip(self.chips, colours, strict=True):
            x, top = _TOKENS_X + chip.x, y + chip.line * _LINE
            chip.draw(ax, x, top, colour, theme)
            if chip.kept and chip.dependency >= 0.1:
                _below(ax, x + chip.width / 2, top + _CHIP_HEIGHT + 0.06, f"{chip.dependency:.1f}", theme)
        if self.chips and len(self.chips) < len(self.response.tokens):
            end = self.chips[-1]
            ax.text(_TOKENS_X + end.x + end.width, y + end.line * _LINE + _CHIP_HEIGHT * 0.7, " …", size=_SIZE)
        mark, colour = ("✓", theme.good) if self.response.correct else ("✗", theme.bad)
        ax.text(_WIDTH - _MARGIN, y + _CHIP_HEIGHT * 0.72, mark, color=colour, size=14, ha="right")


def _zoom(picture: Image.Image) -> float:
    return min(_PICTURE_WIDTH / picture.width, _PICTURE_HEIGHT / picture.height)


def _below(ax: Axes, x: float, y: float, text: str, theme: Theme) -> None:
    ax.text(x, y, text, size=7.5, color=theme.muted, ha="center", va="top")


def _drawable(token: str) -> str:
    text = drawable(visible(token))
    return text if len(text) <= _MAX_CHARACTERS else text[: _MAX_CHARACTERS - 1] + "…"


def _columns(text: str) -> float:
    """The width of a text in characters of the fixed-width font; those of East Asia fill an em."""
    return sum(_EM if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _draw_legend(ax: Axes, y: float, scale: DependencyScale, theme: Theme) -> None:
    width, height = 2.6, 0.11
    gradient = np.linspace(0, 1, 256)[None]
    ax.imshow(gradient, extent=(_TOKENS_X, _TOKENS_X + width, y + height, y), cmap=colour_map(theme), aspect="auto")
    for value, label in scale.ticks:
        x = _TOKENS_X + width * float(scale.position(value))
        _below(ax, x, y + height + 0.05, label, theme)
    for line, text in enumerate(("dependency in nats", "underlined: kept by gradient filtering")):
        ax.text(_TOKENS_X + width + 0.28, y + height / 2 + 0.17 * line, text, size=8, color=theme.muted, va="center")
