"""The picture for the README: chips in rows, each with its colour and its number."""

from __future__ import annotations

import warnings

import pytest
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from support.responses import response, responses

from vppo.demo.token_picture import token_picture
from vppo.pages.theme import DARK, LIGHT, DependencyScale
from vppo.pages.token_text import is_special, visible


def drawn(picture: object) -> tuple[list[str], list[FancyBboxPatch]]:
    """The texts and the chips of a picture."""
    figure = Figure()
    picture.draw(figure, LIGHT)  # type: ignore[attr-defined]
    (ax,) = figure.axes
    return [text.get_text() for text in ax.texts], [p for p in ax.patches if isinstance(p, FancyBboxPatch)]


@pytest.mark.parametrize("token", ["<|im_end|>", "<|endoftext|>", "</s>", "<eos>", "<end_of_turn>"])
def test_special_tokens(token: str) -> None:
    assert is_special(token)


@pytest.mark.parametrize("token", ["<", "<b>", "<think>", "a<|im_end|>", "|", "", "x < y > z"])
def test_text_is_not_special(token: str) -> None:
    assert not is_special(token)


def test_what_cannot_be_seen_is_made_visible() -> None:
    assert visible(" a\n\tb") == " a↵⇥b"
    assert visible("") == "∅"
    assert visible("\x00\x1b\u202e\ud800") == "\ufffd" * 4
    assert visible("三角形 √2") == "三角形 √2"


def test_every_token_is_a_chip_with_its_colour() -> None:
    scale = DependencyScale(2.0)
    shown = response(["3", "+", "<|im_end|>"], [2.0, 0.0, 0.5])
    texts, chips = drawn(token_picture([shown], scale))
    assert {"3", "+", "<|im_end|>", "✓"} <= set(texts)
    expected = scale.colours(shown.dependency, LIGHT)
    assert (
        [chip.get_facecolor()[:3] for chip in chips]
        == [  # type: ignore[index]
            pytest.approx(tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))) for colour in expected
        ]
    )
    assert "2.0" in texts  # kept, so its number is below it
    assert "✗" in drawn(token_picture([response(["3"], [1.0], correct=False)], scale))[0]


def test_a_long_answer_is_cut_after_four_lines() -> None:
    texts, chips = drawn(token_picture([response(["token"] * 300, [0.1] * 300)], DependencyScale(1.0)))
    assert 4 < len(chips) < 100
    assert " …" in texts
    assert len({round(chip.get_y(), 6) for chip in chips}) == 4


def test_any_text_is_drawn_without_a_warning() -> None:
    odd = ["$", "\\frac{", "$x$", "三", "\n", "\x00", "", "🙂", "x" * 200, "<script>"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        png = token_picture([response(odd, [0.1] * len(odd)), response([], [])], DependencyScale(1.0)).png(DARK)
    assert png.startswith(b"\x89PNG")


def test_height_grows_with_the_number_of_answers() -> None:
    scale = DependencyScale(1.0)
    assert token_picture(responses(6), scale).size[1] > token_picture(responses(2), scale).size[1]
