"""Characters that the figures' own font lacks: from another font of the machine, or else spelled out."""

from __future__ import annotations

import functools

from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, fontManager, get_font
from matplotlib.text import Text

_NO_GLYPHS = ("LastResort", "Adobe Blank", "NotDef")  # fonts that have a box or nothing for every character


def drawable(text: str) -> str:
    r"""The text with what no font of the machine can draw as `\uXXXX`, which says more than a box does."""
    return "".join(c if ord(c) in _own() or _font_with(c) else _spelled(c) for c in text)


def cover(figure: Figure) -> None:
    """Lets every text of a drawn figure fall back to fonts that have its characters, and spells out the others."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            labels = [label.get_text() for label in axis.get_ticklabels()]
            if (spelled := list(map(drawable, labels))) != labels:
                axis.set_ticks(axis.get_majorticklocs(), spelled)  # a tick's text is written anew from its axis
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        content = text.get_text()
        others = dict.fromkeys(font for c in content if ord(c) not in _own() and (font := _font_with(c)))
        if others:
            text.set_fontfamily([*text.get_fontfamily(), *others])
        text.set_text(drawable(content))


def _spelled(character: str) -> str:
    code = ord(character)
    return character if character == "\n" else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


@functools.cache
def _own() -> frozenset[int]:
    """What both faces of the figures' font have."""
    return frozenset.intersection(*(_characters(findfont(f"DejaVu Sans{kind}")) for kind in ("", " Mono")))


@functools.cache
def _font_with(character: str) -> str | None:
    """The family of an installed font that has the character, the first by name."""
    return next((family for family, path in _families() if ord(character) in _characters(path)), None)


@functools.cache
def _families() -> list[tuple[str, str]]:
    """The installed families that have an upright face of usual weight, and the file of that."""
    usual = (400, "normal", "regular", "book", 500, "medium")  # the most usual first
    found: dict[str, tuple[int, str]] = {}
    for font in fontManager.ttflist:
        if font.style == "normal" and font.weight in usual and not font.name.startswith(_NO_GLYPHS):
            face = usual.index(font.weight), font.fname
            found[font.name] = min(face, found.get(font.name, face))
    return [(name, path) for name, (_, path) in sorted(found.items())]


@functools.cache
def _characters(path: str) -> frozenset[int]:
    """The code points of a font; none if it cannot be drawn in any size, as fonts of coloured pictures cannot."""
    try:
        font = get_font(path)
    except (OSError, RuntimeError):  # FreeType does not read every file that is called a font
        return frozenset()
    return frozenset(font.get_charmap()) if font.scalable else frozenset()
