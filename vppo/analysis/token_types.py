"""What kind of text a token is, as far as the token alone tells: numbers, words of geometry, operators, ..."""

from __future__ import annotations

import re

from vppo.pages.token_text import is_special

_MARKS = re.compile(r"</?(?:think|answer|image|reasoning)>|\\?boxed\{?|[<>/]*(?:think|answer)>?")
_NUMBER = re.compile(r"[+\-−]?\d[\d.,:]*")  # noqa: RUF001
_OPERATOR = re.compile(r"[+\-−–*/×÷·=<>≤≥≠≈≅~∼^±√∑∫∠°%∥⊥∈|&π²³]+|\\[A-Za-z]+\{?")  # noqa: RUF001
_NAME = re.compile(r"[A-Zb-z]|[A-Z]{2,4}'?|[α-ωΑ-Ω]'?")  # noqa: RUF001

_WORDS = {
    "numbers": """
        zero one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty hundred thousand
        half third quarter first second double triple twice
    """,
    "geometry": """
        triangle triangles circle circles square squares rectangle rectangles polygon pentagon hexagon octagon angle
        angles side sides line lines segment segments point points vertex vertices edge edges radius radii diameter
        chord arc arcs sector tangent secant diagonal diagonals height base width length area perimeter circumference
        volume surface hypotenuse leg legs bisector midpoint median altitude parallel perpendicular congruent similar
        inscribed degrees degree cone cylinder sphere cube prism pyramid plane axis axes graph curve slope coordinate
        coordinates origin quadrilateral parallelogram trapezoid rhombus diagram figure shape shapes isosceles
        equilateral right-angled interior exterior
    """,
    "colours and places": """
        red green blue yellow orange purple pink brown black white grey gray cyan teal dark light left right top
        bottom above below under over inside outside between beside behind front upper lower middle center centre
        corner corners next near row column horizontal vertical north south east west
    """,
    "reasoning": """
        so therefore thus hence because since if then but however wait let now first finally next need find know given
        using calculate compute determine substitute solve means gives implies follows consider step answer equation
        formula problem
    """,
    "function words": """
        a an the this that these those it its i we you he she they them our your their of in on at to from by with for
        as and or not no nor is are was were be been being am has have had do does did can could will would shall
        should may might must there here which who whose what when where how why all both each any some such same
        other than into onto out up down off about also only just
    """,
}
# a word that two lists hold has the kind that stands first
_KIND_OF_WORD = {word: kind for kind in reversed(list(_WORDS)) for word in _WORDS[kind].split()}

TYPES = (
    "numbers",
    "names",
    "geometry",
    "colours and places",
    "operators",
    "reasoning",
    "function words",
    "other words",
    "punctuation",
    "marks",
    "other",
)


def token_type(text: str) -> str:
    """The kind of a token, one of `TYPES`; the surrounding blanks and the case of a word do not matter.

    - numbers: digits, with point, comma or sign, and number words.
    - names: of points and variables: one letter (but no "a" and no "I"), or up to four capitals.
    - geometry, colours and places, reasoning, function words: lists of English words.
    - operators: mathematical signs and LaTeX commands.
    - marks: of the chat format and of the answer's, such as `<|im_end|>`, `<think>` and `boxed`.
    - punctuation: anything else without a letter or a digit, blanks included; other words: letters only.

    - other: words mixed with digits, and pieces of a character.

    A token is judged alone: the piece "tri" of a split "triangle" is among the other words.
    """
    word = text.strip()
    if is_special(word) or _MARKS.fullmatch(word):
        return "marks"
    if _NUMBER.fullmatch(word):
        return "numbers"
    if word.lower() in _KIND_OF_WORD and word != "A":  # in capitals, a point far more often than an article
        return _KIND_OF_WORD[word.lower()]
    if _NAME.fullmatch(word):
        return "names"
    if _OPERATOR.fullmatch(word):
        return "operators"
    if not any(character.isalnum() for character in word):
        return "other" if not text or "\N{REPLACEMENT CHARACTER}" in word else "punctuation"  # a piece of a character
    return "other words" if all(c.isalpha() or c in "'-_" for c in word) else "other"
