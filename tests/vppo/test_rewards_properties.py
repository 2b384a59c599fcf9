"""What holds for answers of every kind: equal to itself, in both directions, however a number is written."""

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vppo.grading.answers import quantity
from vppo.grading.spelling import clean
from vppo.rewards import accuracy_reward, equal_answers

settings.register_profile("reward", max_examples=60, deadline=None)
pytestmark = pytest.mark.filterwarnings("ignore:.*could not be compared:RuntimeWarning")

integers = st.integers(-(10**9), 10**9)
digits = st.integers(0, 10**6)
fractions = st.fractions(min_value=-1000, max_value=1000, max_denominator=999)
letters = st.sampled_from("xyzabn")
units = st.sampled_from(["cm", "kg", "s", "m/s", "cm^2", r"\text{ apples}", "%", "°"])
formulas = st.recursive(
    st.one_of(st.integers(1, 20).map(str), letters),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda p: rf"\frac{{{p[0]}}}{{{p[1]}}}"),
        st.tuples(inner, inner).map(lambda p: f"({p[0]}+{p[1]})"),
        st.tuples(inner, inner).map(lambda p: f"({p[0]})({p[1]})"),
        inner.map(lambda e: rf"\sqrt{{{e}}}"),
        inner.map(lambda e: f"({e})^2"),
    ),
    max_leaves=5,
)
well_formed = st.one_of(
    integers.map(str),
    fractions.map(str),
    formulas,
    st.tuples(digits, units).map(lambda p: f"{p[0]} {p[1]}"),
    st.lists(integers.map(str), min_size=2, max_size=4).map(lambda e: "(" + ", ".join(e) + ")"),
    st.lists(formulas, min_size=2, max_size=3).map(", ".join),
    st.sampled_from("ABCDE"),
    st.text("abcdefghij ", min_size=3, max_size=12).filter(lambda t: len(t.split()) > 0),
)


def written(number: Fraction) -> list[str]:
    """One number in many ways, all of them exact."""
    sign, n, d = "-" if number < 0 else "", abs(number.numerator), number.denominator
    ways = [
        f"{sign}{n}/{d}",
        rf"{sign}\frac{{{n}}}{{{d}}}",
        rf"\frac{{{sign}{n}}}{{{d}}}",
        rf"{sign}\dfrac{{{n}}}{{{d}}}",
    ]
    ways += [rf"$\displaystyle {sign}\frac{{{n}}}{{{d}}}$", rf"x = {sign}\frac{{{2 * n}}}{{{2 * d}}}"]
    if n > d > 1:
        ways.append(rf"{sign}{n // d}\frac{{{n % d}}}{{{d}}}")
    if d == 1:
        ways += [
            f"{sign}{n:,}",
            f"{sign}{n}.0",
            f"{sign}{n}.",
            f"{sign}{n:,}".replace(",", "{,}"),
            rf"\text{{{sign}{n}}}",
        ]
        ways += [
            f"{sign}{n:,}".replace(",", r"\,"),
            sign.replace("-", "\N{MINUS SIGN}") + str(n),
            rf"\boxed{{{sign}{n}}}",
        ]
    return ways


@given(well_formed)
@settings(settings.get_profile("reward"))
def test_an_answer_equals_itself_however_it_is_spaced(answer: str) -> None:
    spaced = rf"\( {answer.replace(',', ' , ')} \)."
    assert accuracy_reward([rf"so \boxed{{{answer}}}", rf"\boxed{{{spaced}}}"], [answer] * 2) == [1.0, 1.0]


@given(st.lists(well_formed, min_size=2, max_size=2))
@settings(settings.get_profile("reward"))
def test_equality_has_no_direction(answers: list[str]) -> None:
    first, second = answers
    forwards, backwards = equal_answers([(first, second), (second, first)])
    assert forwards == backwards


@given(st.one_of(fractions, integers.map(Fraction)), st.data())
@settings(settings.get_profile("reward"))
def test_a_number_is_the_same_however_it_is_written(number: Fraction, data: st.DataObject) -> None:
    ways = written(number)
    first, second = data.draw(st.sampled_from(ways)), data.draw(st.sampled_from(ways))
    other = data.draw(st.sampled_from(written(number + Fraction(1, 7))))
    assert equal_answers([(first, second), (first, other)]) == [True, False]


@given(st.integers(1, 10**6), st.integers(-30, 30))
@settings(settings.get_profile("reward"))
def test_powers_of_ten(mantissa: int, exponent: int) -> None:
    ways = [rf"{mantissa}\times 10^{{{exponent}}}", rf"{mantissa} \cdot 10^{{{exponent}}}", f"{mantissa}e{exponent}"]
    ways += [f"{mantissa}E{exponent:+d}", f"{Decimal(mantissa).scaleb(exponent):f}"]
    assert all(equal_answers([(a, b) for a in ways for b in ways]))
    assert not any(equal_answers([(a, f"{2 * mantissa}e{exponent}") for a in ways]))


@given(digits, units, units)
@settings(settings.get_profile("reward"))
def test_a_unit_may_be_left_out_but_not_be_another(number: int, unit: str, other: str) -> None:
    pairs = [
        (f"{number} {unit}", str(number)),
        (str(number), f"{number} {unit}"),
        (f"{number} {unit}", f"{number} {other}"),
    ]
    assert equal_answers(pairs) == [True, True, unit == other]


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_can_be_cleaned_and_taken_apart(text: str) -> None:
    cleaned = clean(text)
    assert cleaned == cleaned.strip()
    quantity(cleaned)


@given(st.text(r"\{}()[]$^_,.;:=+-*/!|%&#~ 0123xeE°√π'\"`" + "\n\x00\ud800", max_size=40))
@settings(settings.get_profile("reward"))
def test_hostile_text_is_judged(text: str) -> None:
    assert equal_answers([("17", text), (f"{text} 17 {text} 18", "17")])[0] in (True, False)
