"""Characters beyond the figures' own font: drawn by another font that is there, or spelled out; never a box."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import matplotlib.font_manager
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.figure import Figure
from matplotlib.text import Text

from vppo.pages import fonts
from vppo.pages.fonts import cover, drawable
from vppo.pages.plot import Plot
from vppo.pages.theme import DARK

KNOWN, UNKNOWN = "\N{CJK UNIFIED IDEOGRAPH-4E09}", "\U00020b9f"
SPELLED = r"\u4e09"


def write_font(path: Path) -> None:
    """A font that draws one character, as a square."""
    pen = TTGlyphPen(None)
    pen.moveTo((50, 0))
    for corner in ((950, 0), (950, 900), (50, 900)):
        pen.lineTo(corner)
    pen.closePath()
    empty = TTGlyphPen(None).glyph()
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder([".notdef", "three"])
    font.setupCharacterMap({ord(KNOWN): "three"})
    font.setupGlyf({".notdef": empty, "three": pen.glyph()})
    font.setupHorizontalMetrics({".notdef": (1000, 0), "three": (1000, 50)})
    font.setupHorizontalHeader(ascent=900, descent=-100)
    font.setupNameTable({"familyName": "A Square", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(path)


@pytest.fixture(autouse=True)
def own_fonts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No fonts but Matplotlib's own, whatever this machine has."""
    manager = matplotlib.font_manager.fontManager
    own = [font for font in manager.ttflist if font.name.startswith("DejaVu")]
    monkeypatch.setattr(manager, "ttflist", own)
    forget()
    yield
    forget()


def forget() -> None:
    for function in (fonts._own, fonts._font_with, fonts._families, fonts._characters):
        function.cache_clear()
    matplotlib.font_manager.fontManager._findfont_cached.cache_clear()


@pytest.fixture
def square(tmp_path: Path) -> None:
    write_font(tmp_path / "square.ttf")
    matplotlib.font_manager.fontManager.addfont(tmp_path / "square.ttf")
    forget()


def shown() -> tuple[list[str], bytes]:
    """The texts of a figure with a title, a legend and tick labels beyond its font, and its picture."""
    texts: list[str] = []

    def draw(figure: Figure, theme: object) -> None:
        ax = figure.subplots()
        ax.set_title(f"model {KNOWN}")
        ax.plot([0, 1], [0, 1], label=KNOWN * 2)
        ax.legend()
        ax.set_yticks([0, 1], [KNOWN, "a"])
        cover(figure)
        figure.canvas.draw()
        texts.extend(text.get_text() for text in figure.findobj(Text) if isinstance(text, Text))

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a missing glyph Matplotlib warns
        return texts, Plot("x", "", "", draw).png(DARK)


def test_what_no_font_has_is_spelled_out() -> None:
    assert drawable(f"a{KNOWN}\n{UNKNOWN}") == "a\\u4e09\n\\U00020b9f"
    texts, _ = shown()
    assert {f"model {SPELLED}", SPELLED * 2, SPELLED, "a"} <= set(texts)
    assert not any(KNOWN in text for text in texts)


@pytest.mark.usefixtures("square")
def test_what_another_font_has_is_drawn_by_it() -> None:
    assert drawable(f"a{KNOWN}{UNKNOWN}") == f"a{KNOWN}\\U00020b9f"
    texts, png = shown()
    assert {f"model {KNOWN}", KNOWN * 2, KNOWN, "a"} <= set(texts)
    assert png.startswith(b"\x89PNG")


def test_the_fonts_own_characters_are_left_alone() -> None:
    text = "a ✓ ✗ ↵ ⇥ ∅ 6.3 × 10⁻⁷ é π √ „“"  # noqa: RUF001
    assert drawable(text) == text
