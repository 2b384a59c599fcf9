"""Kinds of token by their text."""

from __future__ import annotations

import pytest

from vppo.analysis.token_types import _WORDS, TYPES, token_type

CASES = {
    "numbers": ["3", " 60", "7.5", "1,000", "-2", " twelve", "Half", "3."],
    "names": ["ABC", " A", "B", " x", "DE", "\N{GREEK SMALL LETTER ALPHA}", " n", "P"],
    "geometry": [" triangle", "Angle", " radius", "parallelogram"],
    "colours and places": [" red", "left", " above", "Between"],
    "operators": [" =", "+", "°", "\\frac", "\\sin{", " \N{MULTIPLICATION SIGN}", "≤", "**"],
    "reasoning": [" so", "Therefore", "Wait", " equation"],
    "function words": ["a", " the", "I", "which", "Of"],
    "other words": ["ines", " car", "don't", "三角形", "élève"],
    "punctuation": [".", ",", "\n\n", " ", "(", "}", "\\"],
    "marks": ["<|im_end|>", "</s>", "<think>", "</answer>", "\\boxed{", "boxed"],
    "other": ["x2", "3cm", "\ufffd", "a1b", ""],
}


@pytest.mark.parametrize(("kind", "texts"), CASES.items())
def test_kinds(kind: str, texts: list[str]) -> None:
    assert {text: token_type(text) for text in texts} == dict.fromkeys(texts, kind)


def test_every_kind_has_cases_and_every_list_a_kind() -> None:
    assert tuple(CASES) and set(CASES) == set(TYPES)
    assert set(_WORDS) < set(TYPES)
