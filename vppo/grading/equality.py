r"""Are two answers the same? The rules are in docs/rewards.md; mathematics is left to math-verify.

Parsing and simplifying what a policy wrote can take for ever or any amount of memory, so only the child processes of
`vppo.grading.pool` call this.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

from vppo.grading import answers
from vppo.grading.answers import Parts
from vppo.grading.spelling import clean, may_be_a_list
from vppo.grading.units import Unit

# A decimal stands for every value that agrees with it in six decimals and, of tiny numbers, in five significant digits.
DECIMALS = 6  # math-verify's own default
_SIXTH_DECIMAL, _FIVE_DIGITS = Fraction(1, 2 * 10**DECIMALS), Fraction(1, 2 * 10**4)
_DOUBLE, _EVALUATION = Fraction(1, 10**15), Fraction(1, 10**40)  # what rounding leaves of a value
_NUMBER_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
)  # fmt: skip
_POWER_OF_TEN, _EULER = re.compile(r"\d[eE][+-]?\d"), re.compile(r"(?<![A-Za-z\\])e(?![A-Za-z])")
_NESTED = 4  # how deep lists in lists are followed


def equal(reference: str, predicted: str) -> bool:
    r"""Whether a predicted answer is the reference answer.

    Args:
        reference: Text or LaTeX, as is `predicted`; without `\boxed`.

    Raises:
        MemoryError: An answer is too large for this process.
    """
    # 2e+3 is a sum with Euler's number where the other answer has that number, and 100,200 may be two numbers: each
    # further reading counts where there is one.
    pairs = ((reference, predicted), (predicted, reference))
    eulers = any(_POWER_OF_TEN.search(x) and not _POWER_OF_TEN.search(y) and _EULER.search(y) for x, y in pairs)
    for scientific in (True, False):
        for thousands in (True, False):
            if not scientific and not eulers:
                continue
            if not thousands and not any(map(may_be_a_list, (reference, predicted))):
                continue
            first, second = (clean(text, scientific=scientific, thousands=thousands) for text in (reference, predicted))
            if second and _equal(first, second, _NESTED):
                return True
    return False


def _equal(reference: str, predicted: str, depth: int) -> bool:
    if reference == predicted:
        return True
    if (verdict := _same_option(reference, predicted, depth)) is not None:
        return verdict
    (name, value), (predicted_name, predicted_value) = map(answers.assignment, (reference, predicted))
    if name or predicted_name:
        if name and predicted_name and name.casefold() != predicted_name.casefold():
            return _same_formula(reference, predicted)  # x = y is y = x
        # A name that only one of them gives is left out: x = 5 is 5; 3 + 2 = 5 is no name.
        if (name and predicted_name) or "=" not in (predicted if name else reference):
            return _equal_part(value, predicted_value, depth)
    else:
        reference, predicted = value, predicted_value
    first, second = map(answers.parts, (reference, predicted))
    if len(first.elements) > 1 or len(second.elements) > 1 or first.opening == second.opening == r"\{":
        verdict = _same_parts(first, second, lambda a, b: _equal_part(a, b, depth))
        if verdict is not None:
            return verdict
    return _same_quantity(reference, predicted)


def _same_option(reference: str, predicted: str, depth: int) -> bool | None:
    """For the letter or the text of a choice; None where neither is one."""
    first, second = answers.option(reference), answers.option(predicted)
    if first and second:
        if first.letter != second.letter:
            return False
        return not (first.text and second.text) or _equal_part(first.text, second.text, depth)
    if first and first.text and _equal_part(first.text, predicted, depth):
        return True  # the text of the choice without its letter
    if second and second.text and _equal_part(reference, second.text, depth):
        return True
    return None


def _equal_part(reference: str, predicted: str, depth: int) -> bool:
    return depth > 0 and _equal(clean(reference), clean(predicted), depth - 1)


def _same_parts(reference: Parts, predicted: Parts, same: Callable[[str, str], bool]) -> bool | None:
    """Lists element by element; None where only mathematics can tell (an interval and an inequality, +-2 and 2, -2).

    Mathematics takes a list for a set. So a list that repeats an element, such as the sides 5, 5, 8, is not left to it:
    it equals only one with the same elements as often, unless braces say that either is a set.
    """
    first, second = reference.elements, predicted.elements
    brackets = {reference.opening + reference.closing, predicted.opening + predicted.closing}
    repeats = r"\{\}" not in brackets and any(map(_repeats, (first, second)))
    if len(first) != len(second):
        return False if repeats else None
    if len(first) > 64:
        return None
    if len(brackets) == 2:
        half_open = brackets & {"(]", "[)"}
        interval_or_point = brackets == {"()", "[]"} and len(first) == 2
        if half_open or interval_or_point or (r"\{\}" in brackets and "" not in brackets):
            return False
    named = [any(answers.assignment(element)[0] for element in elements) for elements in (first, second)]
    if brackets & {"()", "[]", "(]", "[)"} or named[0] != named[1]:
        return all(same(a, b) for a, b in zip(first, second, strict=True))
    left = list(second)
    for element in first:
        match = next((other for other in left if same(element, other)), None)
        if match is None:
            return None if not repeats and brackets & {"", r"\{\}"} else False
        left.remove(match)
    return True


def _repeats(elements: Sequence[str]) -> bool:
    """Whether a list has an element twice."""
    values = [(text, _rational(text)) for text in map(clean, elements)]
    return len({text if value is None else value for text, value in values}) < len(elements)


def _same_quantity(reference: str, predicted: str) -> bool:
    """Values with units: a unit that one of them leaves out is taken for granted, different units are converted."""
    if not re.search(r"\d|\\pi|\\frac", reference) or not re.search(r"\d|\\pi|\\frac", predicted):
        return _same_formula(reference, predicted)
    if re.search(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])", reference + predicted):
        return _same_formula(reference, predicted)  # the degrees are an argument's
    first, second = answers.quantity(reference), answers.quantity(predicted)
    if first.unit is None and second.unit is None:
        return _same_formula(reference, predicted)
    if first.unit and second.unit and first.unit.powers and second.unit.powers:
        factors = _angle_factor(first.unit, second.unit) or _factor(first.unit, second.unit)
        return factors is not None and _same_formula(first.value, _times(second.value, factors))
    if _same_formula(first.value, second.value):
        return True
    # 50 % is also 0.5, and 60 degrees are also pi/3; and a unit of one letter may have been a variable.
    for unit, scaled, other in ((first.unit, first, second), (second.unit, second, first)):
        if unit and (worked := _PURE.get(unit.powers)) and _same_formula(_times(scaled.value, worked), other.value):
            return True
    return _same_formula(reference, predicted)


_Powers = tuple[tuple[str, int], ...]
_DEGREE: _Powers = (("degree", 1),)
_RADIAN: _Powers = (("radian", 1),)
_PERCENT: _Powers = (("percent", 1),)
_PURE = {_PERCENT: r"\frac{1}{100}", _DEGREE: r"\frac{\pi}{180}"}  # what they are as numbers


def _factor(reference: Unit, predicted: Unit) -> str | None:
    """What turns the predicted unit into the reference's, or None where they measure different things."""
    if reference.powers != predicted.powers:
        return None
    ratio = Fraction(predicted.size) / Fraction(reference.size)
    return rf"\frac{{{ratio.numerator}}}{{{ratio.denominator}}}" if ratio != 1 else ""


def _angle_factor(reference: Unit, predicted: Unit) -> str | None:
    return {
        (_DEGREE, _RADIAN): r"\frac{180}{\pi}",
        (_RADIAN, _DEGREE): r"\frac{\pi}{180}",
    }.get((reference.powers, predicted.powers))


def _times(value: str, factor: str) -> str:
    return rf"({value})\cdot {factor}" if factor else value


def _same_formula(reference: str, predicted: str) -> bool:
    if reference == predicted:
        return True
    first, second = _rational(reference), _rational(predicted)
    if first is not None and second is not None:
        return _same_number(first, second, rounded="." in reference + predicted)
    texts = [text for text in (reference, predicted) if answers.is_words(text)]
    # abc is a word beside bac, and a product beside a formula.
    if len(texts) == 2 or (texts and not re.fullmatch("[A-Za-z]{3,4}", texts[0])):
        return answers.words(reference) == answers.words(predicted) != ""
    try:
        return any(_same_expression(a, b) for a in _parse(reference) for b in _parse(predicted))
    except MemoryError:
        raise
    except Exception:  # math-verify and sympy raise anything at all on what they cannot read or evaluate
        return False


def _rational(text: str) -> Fraction | None:
    r"""Of an integer, in digits or as a word, a decimal or a fraction of integers the value; of anything else None."""
    if (word := text.casefold()) in _NUMBER_WORDS:
        return Fraction(_NUMBER_WORDS.index(word))
    if match := re.fullmatch(
        r"([+-]?)\s*(?:(\d+(?:\.\d*)?|\.\d+)|(\d+)\s*/\s*(\d+)|\\frac\{(\d+)\}\{(\d+)\})", text, re.ASCII
    ):
        numerator, denominator = match[2] or match[3] or match[5], match[4] or match[6] or "1"
        if int(denominator):
            return Fraction(match[1] + numerator) / int(denominator)
    return None


@lru_cache(maxsize=1024)
def _parse(text: str) -> Sequence[Any]:
    """What math-verify reads in a formula: nothing, where it cannot read all of it."""
    from latex2sympy2_extended.math_normalization import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse
    from sympy import Basic, MatrixBase

    # Its own units are any of 120 words and letters at the end, so that 3c would be 3; ours are split off before.
    rules = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="last")
    config = LatexExtractionConfig(boxed_match_priority=0, normalization_config=rules)
    text = re.sub(r"(\d+(?:\.\d+)?)\s*\^\\circ", r"(\\frac{\1\\pi}{180})", text)
    text = re.sub(r"\\text\{([A-Za-z])\}", r"\1", text)  # an upright e or x
    text = _radicals(text)
    found = parse(rf"\boxed{{{text}}}", [config], fallback_mode="no_fallback", parsing_timeout=None)
    return [expression for expression in found if isinstance(expression, (Basic, MatrixBase))]


def _radicals(text: str) -> str:
    r"""`\sqrt(a(b+c))` with braces, which math-verify does for the first closing parenthesis only."""
    while match := re.search(r"\\sqrt\s*\(", text):
        depth, position = 0, match.end() - 1
        for position in range(match.end() - 1, len(text)):
            depth += {"(": 1, ")": -1}.get(text[position], 0)
            if depth == 0:
                break
        if depth:
            return text
        text = rf"{text[: match.start()]}\sqrt{{{text[match.end() : position]}}}{text[position + 1 :]}"
    return text


def _same_expression(reference: Any, predicted: Any) -> bool:
    from math_verify import verify
    from sympy import Expr, Float, MatrixBase, Rational

    matrices = isinstance(reference, MatrixBase) and isinstance(predicted, MatrixBase)
    if matrices:
        if reference.shape != predicted.shape:
            return False
        return all(_same_expression(a, b) for a, b in zip(reference.flat(), predicted.flat(), strict=True))
    floats = reference.atoms(Float) | predicted.atoms(Float)
    written = {f: Rational(str(f)) for f in floats}  # so that no binary rounding comes between equal decimals
    exact = (reference.xreplace(written), predicted.xreplace(written))
    if all(isinstance(e, Expr) for e in exact):
        verdict = _same_value(*exact, rounded=bool(floats))
        if verdict is not None:
            return verdict
    options = {"float_rounding": DECIMALS, "numeric_precision": 50, "allow_set_relation_comp": True}
    both = [exact, (reference, predicted)] if floats else [exact]
    return any(verify(a, b, timeout_seconds=None, **options) for a, b in both)


def _same_value(reference: Any, predicted: Any, rounded: bool, points: int = 8) -> bool | None:
    r"""Whether two expressions have the same value wherever both are real; None where they hardly ever are.

    At random points, to thirty digits, which is much faster than simplification and knows that `\sqrt{1/n}` is
    `1/\sqrt n` (their complex branches differ where n is negative) and that `|x|` is not `x`.
    """
    from sympy import I, Rational, Symbol

    symbols = sorted(reference.free_symbols | predicted.free_symbols, key=str)
    if units := [s for s in symbols if s.name == "i"]:  # the imaginary unit, unless it is an index like any other
        at = {s: I for s in units}
        if _same_value(reference.subs(at), predicted.subs(at), rounded, points):
            return True
    if reference.has(I) or predicted.has(I):
        symbols = [Symbol(s.name) for s in symbols]
    chosen, agreed = random.Random(0), 0
    for _ in range(8 * points if symbols else 1):
        at = {s: Rational(chosen.randint(-400, 400), 97) for s in symbols}
        first, second = _value(reference, at), _value(predicted, at)
        if first is None or second is None:
            continue
        if not _same_number(first, second, rounded):
            return False
        agreed += 1
        if agreed == points:
            break
    return True if agreed == (points if symbols else 1) else None


def _value(expression: Any, at: dict[Any, Any]) -> Any:
    """The value of an expression at a point; None where it is not finite, or where a part of a real one is not real."""
    from sympy import I, Pow, log

    parts = [] if expression.has(I) else list(expression.atoms(Pow, log))
    values = [e.subs(at).doit().evalf(50) for e in [*parts, expression]]
    if parts and not all(v.is_extended_real for v in values):
        return None
    return values[-1] if values[-1].is_number and values[-1].is_finite else None


def _same_number(reference: Any, predicted: Any, rounded: bool) -> bool:
    """Equal, up to the rounding of a decimal where one of them is written as one."""
    size, difference = max(abs(reference), abs(predicted)), abs(reference - predicted)
    if not rounded:
        return bool(difference <= size * _EVALUATION)
    return bool(difference <= max(min(_SIXTH_DECIMAL, size * _FIVE_DIGITS), size * _DOUBLE))
