r"""What a cleaned answer is made of: a choice, a name and its value, the elements of a list, words, a quantity."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from vppo.grading.units import CURRENCY_SIGNS, Unit, parse_unit

_OPTION = re.compile(
    r"(?i)^(?:option|choice|answer)?\s*(?:\(\s*([a-j])\s*\)|\[\s*([a-j])\s*\]|([a-j])\s*[).:])(?:\s*(.*))?$", re.DOTALL
)
_BARE_OPTION = re.compile(r"(?i)^(?:(?:option|choice|answer)\s+)?([a-j])$")
_SECOND_OPTION = re.compile(
    r"(?i)^(?:and|or|[,;&/])(?![a-z])|(?<![a-z\\])[a-j]\s*[).:](?!\w)|[,;/&]\s*[a-j]$|(?:and|or)\s+[a-j]$"
)
_NAME = re.compile(
    r"^(?:\\(?:text|overline|angle|triangle|vec|hat|bar)(?![A-Za-z])|\\[a-z]+(?![A-Za-z])|[A-Za-z0-9_{}(),\s'])+$"
)


@dataclass(frozen=True)
class Option:
    """A choice of a multiple-choice question: its letter in lower case, and its text where that is given."""

    letter: str
    text: str


def option(text: str) -> Option | None:
    """`B`, `(B)`, `B) 30`, `B: 30`, `B. 30`, `option B`; None for anything else."""
    plain = unwrap_text(text).strip()
    if match := _BARE_OPTION.match(plain):
        return Option(match[1].lower(), "")
    if match := _OPTION.match(plain):
        if _SECOND_OPTION.search(match[4] or ""):
            return None  # whoever names two choices has not chosen
        letter = match[1] or match[2] or match[3]
        return Option(letter.lower(), (match[4] or "").strip())
    return None


def unwrap_text(text: str) -> str:
    r"""The words of every `\text{...}`, in place."""
    return re.sub(r"\\text\{((?:[^{}]|\{[^{}]*\})*+)\}", r"\1", text)


def assignment(text: str) -> tuple[str, str]:
    """The name and the value of `x = 5`, `f(x) = 2x`, `Area = 5`; of `3 + 2 = 5` the value. No name is empty."""
    sides = re.split(r"(?<![\\<>!])=", text)
    if len(sides) > 1 and not re.search("[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", text)) and sides[-1].strip():
        return "", sides[-1].strip()
    if len(sides) == 2 and sides[1].strip() and re.search("[A-Za-z]", sides[0]) and _NAME.match(sides[0]):
        name = re.sub(r"[\s{}]", "", unwrap_text(sides[0]))
        # `2x = 6` is an equation; `x_2`, `f(2)` and `Area 2` are names.
        if not re.match(r"\d", name) and not re.search(r"[a-z)]\d", name.replace("_", " ")):
            return name, sides[1].strip()
    if len(sides) > 2 and "(" not in text:  # x = 2, x = -2
        named = [assignment(element) for element in parts(text).elements]
        if len(named) > 1 and named[0][0] and len({name for name, _ in named}) == 1:
            return named[0][0], ", ".join(value for _, value in named)
    if match := re.match(r"^([A-Za-z])\s*\\in\s*(\\\{.*)$", text):
        return match[1], match[2]
    return "", text


@dataclass(frozen=True)
class Parts:
    """The elements of `(1, 2)`, `{1, 2}`, `[1, 2)` or of a bare list, with the brackets around them."""

    opening: str
    elements: tuple[str, ...]
    closing: str


def parts(text: str) -> Parts:
    """The elements between commas, semicolons, `and` and `or` outside of inner brackets. One where there are none."""
    for opening, closing in ((r"\{", r"\}"), ("(", ")"), ("(", "]"), ("[", ")"), ("[", "]")):
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening):
            inner = text[len(opening) : -len(closing)]
            elements = _split(inner)
            if elements and (len(elements) > 1 or opening == r"\{"):
                return Parts(opening, elements, closing)
    return Parts("", _split(text) or (text,), "")


_SEPARATOR = re.compile(r"\s*(?:[,;]\s*(?:and|or)(?![A-Za-z])|[,;]|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]))\s*")
_BRACKET = re.compile(r"\\[{}]|\\begin|\\end|[(){}\[\]]")


def _split(text: str) -> tuple[str, ...]:
    """The parts of a text, or none where its brackets do not match."""
    depth, elements, start, position = 0, [], 0, 0
    while position < len(text):
        if bracket := _BRACKET.match(text, position):
            depth += 1 if bracket[0] in (r"\{", r"\begin", "(", "{", "[") else -1
            if depth < 0:
                return ()
            position = bracket.end()
        elif depth == 0 and (separator := _SEPARATOR.match(text, position)) and separator[0].strip():
            elements.append(text[start:position].strip())
            start = position = separator.end()
        else:
            position += 1
    elements.append(text[start:].strip())
    return tuple(e for e in elements if e) if depth == 0 else ()


_DATE = re.compile(r"(?<!\d)(?:\d{4}-\d{1,2}-\d{1,2}|\d{1,2}/\d{1,2}/\d{4})(?!\d)")
# Two letters that are a word; any other two are a product of symbols.
_SHORT_WORD = re.compile("(?i)(?:no|on|is|it|at|am|an|as|if|in|of|or|to|up|us|we|me|my|be|by|do|go|he|so|hi|ok)$")


def is_words(text: str) -> bool:
    """Whether an answer is words rather than a formula: `east`, `isosceles triangle`, `SAS`, but not `xy` or `2abc`.

    A run of letters is a word if it stands by itself and has a vowel or three capitals; two letters are a product.
    """
    text = unwrap_text(text)
    if _DATE.search(text):
        return True
    text = re.sub(r"\\(?:begin|end)\{\w+\}|\\[A-Za-z]+", " \\\\ ", text)
    for run in re.finditer(r"[A-Za-z]{2,}", text):
        word = run[0]
        if len(word) == 2:
            if _SHORT_WORD.match(word):
                return True
        elif re.search("[aeiouAEIOU]", word) or word.isupper():
            before, after = text[: run.start()][-1:], text[run.end() :][:1]
            attached = bool(before and before in "0123456789^_{}()+-*/=") or bool(after and after in "^_{}()+*/=")
            if len(word) > 4 or not attached:
                return True
    return bool(re.search(r"[^\W\d_]", re.sub(r"[ -~μΩ]", "", text)))  # letters of another script


def words(text: str) -> str:
    """A text answer for comparison: case, punctuation, hyphens and a leading article do not count."""
    text = unicodedata.normalize("NFKC", unwrap_text(text)).casefold()
    text = re.sub(r"\s*(?:,\s*)?(?<![a-z])and(?![a-z])\s*", ", ", text)
    text = re.sub(r"(?<!\d)\.|\.(?!\d)|[;:!?'\"`{}$\\]", " ", text)
    text = re.sub(r"(?<=[a-z])-(?=[a-z])", " ", text)
    return re.sub(r"^(?:an?|the) (?=\S)", "", re.sub(r"[\s,]+", " ", text).strip())


@dataclass(frozen=True)
class Quantity:
    """A value in LaTeX and its unit, None where it has none."""

    value: str
    unit: Unit | None


# Possessive, so that a long run of letters that is no unit is given up at once.
_UNIT_ATOM = r"(?:\\text\{(?:[^{}]|\{[^{}]*\})*+\}|[A-Za-zμΩ]++\.?+|\^\\circ|[%'\"]|\\cdot|[*/]|\^\{-?\d\})"
_UNIT_TAIL = re.compile(
    rf"(?:(?<=[\d}})!\]])|(?<=\\pi)|(?<=\\infty))(?P<space>\s*+)(?P<unit>{_UNIT_ATOM}(?>\s*+{_UNIT_ATOM})*+)$"
)
_BASE = re.compile(r"^([0-9A-F]+)_\{?\s*(\d+)\s*\}?$")


def quantity(text: str) -> Quantity:
    """Splits the unit off `5 cm`, `12 m/s^2`, `60°`, `50%`, `$5`, `3 apples`, `101_2`."""
    if match := re.match(rf"^(-?)\s*(?:US)?(\\\$|[{CURRENCY_SIGNS}]|USD|EUR|GBP|INR|Rs\.?)\s*(?=[\d.])(.*)$", text):
        return Quantity(match[1] + quantity(match[3]).value, parse_unit(match[2].lstrip("\\")))
    if match := re.match(r"^(.*\d)\s*(\\\$|[" + CURRENCY_SIGNS + "])$", text):
        return Quantity(match[1], parse_unit(match[2].lstrip("\\")))
    if match := _BASE.match(text):
        return Quantity(match[1], Unit(1, ((f"base {int(match[2])}", 1),)))
    start = 0
    while match := _UNIT_TAIL.search(text, start):  # the longest tail that names a unit
        if _may_be_a_unit(match["space"], match["unit"]):
            unit = parse_unit(unwrap_text(match["unit"].replace(r"\text{", r" \text{")))
            if unit is not None:
                return Quantity(text[: match.start()].strip(), unit)
        start = match.start() + 1
    return Quantity(text, None)


def _may_be_a_unit(space: str, written: str) -> bool:
    """`5m` and `2ab` are products; `5 m`, `5cm` and whatever is set as text are quantities."""
    if written.startswith((r"\text", "%", r"^\circ", "'", '"')):
        return True
    name = re.match(r"[A-Za-zμΩ]*", written)
    assert name
    if not name[0]:
        return False
    return bool(space) if len(name[0]) == 1 else True
