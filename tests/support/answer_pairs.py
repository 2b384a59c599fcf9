r"""Pairs of answers whose truth is known by construction: two spellings of one value, or of two values.

Nothing here asks a grader, or a computer algebra: a pair is equal because both of its sides were written from the same
value, and different because they were written from values that differ.
"""

# ruff: noqa: RUF001 - characters that look like others are what a model writes, too

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

Spelling = Callable[[random.Random], str]
Two = tuple[Spelling, Spelling]  # what spells a value, and what spells one that differs from it


@dataclass(frozen=True)
class Pair:
    """A reference, an answer to it, whether they are the same, and what kind of answer it is."""

    kind: str
    reference: str
    predicted: str
    equal: bool


def pairs(count: int, seed: int = 0) -> Iterator[Pair]:
    """`count` pairs, half of them equal; the same (count, seed) gives the same pairs."""
    rng = random.Random(seed)
    names = list(KINDS)
    for number in range(count):
        kind = names[number % len(names)]
        equal = rng.random() < 0.5
        if kind == "hostile":
            yield Pair(kind, plain_integer(rng.randint(2, 99))(rng), hostile(rng), False)
            continue
        same, other = KINDS[kind](rng)
        yield Pair(kind, same(rng), dressed((same if equal else other)(rng), rng), equal)


def dressed(text: str, rng: random.Random) -> str:
    """An answer with what models put around one."""
    return rng.choice([text, text, text, f"${text}$", rf"\({text}\)", f" {text} ", f"{text}.", rf"\text{{{text}}}"
                       if "\\" not in text and "{" not in text else text])  # fmt: skip


def one_of(*texts: str) -> Spelling:
    return lambda rng: rng.choice(texts)


def plain_integer(value: int) -> Spelling:
    return one_of(str(value))


# -- numbers -----------------------------------------------------------------------------------------------------------


def spelled_integer(value: int) -> Spelling:
    texts = [str(value), f"{value}.0", f"{value:,}" if abs(value) >= 1000 else str(value), f"x = {value}"]
    if abs(value) >= 1000:
        texts += [f"{value:,}".replace(",", "{,}"), f"{value:,}".replace(",", r"\,")]
    if value < 0:
        texts.append(str(value).replace("-", "−"))
    return one_of(*texts)


def integers(rng: random.Random) -> Two:
    value = rng.choice([rng.randint(-20, 120), rng.randint(-(10**6), 10**6)])
    return spelled_integer(value), spelled_integer(value + rng.choice([-10, -1, 1, 2, 100]))


def spelled_fraction(value: Fraction) -> Spelling:
    sign, n, d = ("-" if value < 0 else ""), abs(value.numerator), value.denominator
    texts = [
        f"{sign}{n}/{d}",
        rf"{sign}\frac{{{n}}}{{{d}}}",
        rf"{sign}\dfrac{{{n}}}{{{d}}}",
        rf"\frac{{{sign}{n}}}{{{d}}}",
        rf"\frac{{{sign}{3 * n}}}{{{3 * d}}}",
    ]
    if n > d > 1:
        texts += [rf"{sign}{n // d}\frac{{{n % d}}}{{{d}}}", f"{sign}{n // d} {n % d}/{d}"]
    if n < 10 and d < 10:
        texts.append(rf"{sign}\frac{n}{d}")
    if not 10**6 % d:
        texts.append(f"{sign}{n / d:.6f}".rstrip("0").rstrip("."))
    return one_of(*texts)


def fractions(rng: random.Random) -> Two:
    value = Fraction(rng.choice([-1, 1]) * rng.randint(1, 60), rng.randint(2, 40))
    other = rng.choice([1 / value, -value, value + 1, value + Fraction(1, value.denominator), value * 2])
    if other == value:
        other = value + 3
    return spelled_fraction(value), spelled_fraction(other)


def decimals(rng: random.Random) -> Two:
    hundredths = rng.randint(1, 99999)
    value, other = hundredths / 100, (hundredths + rng.choice([-1, 1, 10, 100])) / 100

    def spelled(number: float) -> Spelling:
        text = f"{number:.2f}"
        return one_of(text, f"{text}0", text.rstrip("0").rstrip("."), rf"{round(number * 100)}/100")

    return spelled(value), spelled(other)


def scientific(rng: random.Random) -> Two:
    digits, exponent = rng.randint(11, 99), rng.choice([-7, -5, -4, 3, 5, 8])

    def spelled(d: int, e: int) -> Spelling:
        m = f"{d // 10}.{d % 10}"
        return one_of(rf"{m} \times 10^{{{e}}}", rf"{m}\cdot 10^{{{e}}}", f"{m}e{e}", f"{m}×10^{e}")

    other = (digits, exponent + rng.choice([-1, 1])) if rng.random() < 0.5 else (digits % 88 + 11, exponent)
    if other == (digits, exponent):
        other = (digits, exponent + 1)
    return spelled(digits, exponent), spelled(*other)


def percents(rng: random.Random) -> Two:
    value = rng.randint(1, 99)

    def spelled(number: int) -> Spelling:
        texts = [f"{number}%", rf"{number}\%", f"{number} percent", f"{number} %", rf"{number}\text{{%}}"]
        return one_of(*texts)

    return spelled(value), spelled(value % 99 + 1 if rng.random() < 0.5 else (value * 7) % 99 + 100)


def percents_as_numbers(rng: random.Random) -> Two:
    value = rng.choice([5, 10, 20, 25, 35, 40, 60, 75, 80, 90])
    wrong = (value + rng.choice([1, 3, 7])) / 100
    return one_of(rf"{value}\%", f"{value}%"), one_of(f"{wrong}", str(Fraction(wrong).limit_denominator(100)))


# -- quantities --------------------------------------------------------------------------------------------------------

UNITS = {
    "cm": ("cm", r"\text{ cm}", r"\mathrm{cm}", "centimeters"),
    "m": ("m", r"\text{ m}", "meters"),
    "km": ("km", r"\text{ km}", "kilometers"),
    "kg": ("kg", r"\text{ kg}", "kilograms"),
    "s": ("s", "seconds", r"\text{ seconds}"),
    "cm2": ("cm^2", r"\text{ cm}^2", "square centimeters", "cm²"),
    "m/s": ("m/s", r"\text{ m/s}"),
    "N": ("N", "newtons", r"\text{ N}"),
}
CONVERSIONS = [("km", "m", 1000), ("m", "cm", 100)]


def spelled_quantity(value: int, unit: str) -> Spelling:
    return lambda rng: (lambda name: f"{value}{name}" if name.startswith("\\") else f"{value} {name}")(
        rng.choice(UNITS[unit])
    )


def units(rng: random.Random) -> Two:
    unit, value = rng.choice(list(UNITS)), rng.randint(2, 400)
    if rng.random() < 0.5:
        return spelled_quantity(value, unit), spelled_quantity(value + rng.randint(1, 9), unit)
    incompatible = rng.choice([u for u in ("cm", "kg", "s", "N") if u != unit and unit not in ("m", "km")] or ["kg"])
    return spelled_quantity(value, unit), spelled_quantity(value, incompatible)


def converted_units(rng: random.Random) -> Two:
    large, small, factor = rng.choice(CONVERSIONS)
    value = rng.randint(2, 60)
    first = spelled_quantity(value, large)

    def same(inner: random.Random) -> str:
        return (first if inner.random() < 0.5 else spelled_quantity(value * factor, small))(inner)

    return same, spelled_quantity(value * factor + rng.randint(1, 9), small)


def units_left_out(rng: random.Random) -> Two:
    unit, value = rng.choice(list(UNITS)), rng.randint(2, 400)

    def same(inner: random.Random) -> str:
        return (spelled_quantity(value, unit) if inner.random() < 0.5 else plain_integer(value))(inner)

    return same, plain_integer(value + rng.randint(1, 9))


def degrees(rng: random.Random) -> Two:
    value = rng.randint(1, 359)

    def spelled(number: int) -> Spelling:
        return one_of(
            f"{number}°", rf"{number}^\circ", rf"{number}^{{\circ}}", f"{number} degrees", str(number),
            rf"{number}\degree", rf"\angle A = {number}^\circ",
        )  # fmt: skip

    return spelled(value), spelled(value + rng.choice([1, 5, 90]))


def money(rng: random.Random) -> Two:
    cents = rng.randint(100, 99999)

    def spelled(number: int) -> Spelling:
        text = f"{number // 100}.{number % 100:02d}"
        return one_of(rf"\${text}", text, f"{text} dollars")

    return spelled(cents), spelled(cents + rng.choice([1, 10, 100]))


# -- formulas ----------------------------------------------------------------------------------------------------------


def roots(rng: random.Random) -> Two:
    radicand, factor = rng.choice([2, 3, 5, 6, 7, 10, 11]), rng.randint(1, 9)

    def spelled(f: int, r: int) -> Spelling:
        texts = [rf"\sqrt{{{f * f * r}}}", rf"\frac{{{f * r}}}{{\sqrt{{{r}}}}}", rf"\sqrt {{{f * f * r}}}"]
        texts += [rf"{f}\sqrt{{{r}}}", rf"{f} \sqrt {{ {r} }}", f"{f}√{r}"] if f > 1 else [rf"\sqrt{r}", f"√{r}"]
        return one_of(*(text for text in texts if r < 10 or text not in (rf"\sqrt{r}",)))

    other = (factor + 1, radicand) if rng.random() < 0.5 else (factor, radicand + 2)
    return spelled(factor, radicand), spelled(*other)


def sums_with_roots(rng: random.Random) -> Two:
    a, b, r = rng.randint(1, 12), rng.randint(2, 9), rng.choice([2, 3, 5, 7])
    return (
        one_of(rf"{a}+{b}\sqrt{{{r}}}", rf"{b}\sqrt{{{r}}} + {a}", rf"{a} + \sqrt{{{b * b * r}}}"),
        one_of(rf"{a}-{b}\sqrt{{{r}}}", rf"{a + 1}+{b}\sqrt{{{r}}}", rf"{a}+{b + 1}\sqrt{{{r}}}"),
    )


def multiples_of_pi(rng: random.Random) -> Two:
    n, d = rng.randint(1, 30), rng.choice([1, 2, 3, 4, 6])

    def spelled(value: Fraction) -> Spelling:
        p, q = value.numerator, value.denominator
        if q == 1:
            return one_of(rf"{p}\pi", f"{p}π", rf"\pi \cdot {p}") if p > 1 else one_of(r"\pi", "π")
        return one_of(rf"\frac{{{p}\pi}}{{{q}}}", rf"\frac{{{p}}}{{{q}}}\pi", rf"{p}\pi/{q}")

    value = Fraction(n, d)
    return spelled(value), spelled(value + rng.choice([1, Fraction(1, 2), 3]))


def polynomials(rng: random.Random) -> Two:
    a, b = rng.randint(1, 9), rng.randint(1, 9)

    def spelled(p: int, q: int) -> Spelling:
        linear = f"{p + q}" if p + q != 1 else ""
        return one_of(
            f"x^2+{linear}x+{p * q}", f"(x+{p})(x+{q})", f"(x+{q})(x+{p})", f"x^{{2}} + {linear} x + {p * q}",
            f"{p * q}+{linear}x+x^2",
        )  # fmt: skip

    return spelled(a, b), spelled(a, b + rng.randint(1, 3))


def equations(rng: random.Random) -> Two:
    m, c = rng.randint(2, 9), rng.randint(1, 20)

    def spelled(slope: int, offset: int) -> Spelling:
        return one_of(f"y={slope}x+{offset}", f"y = {slope}x + {offset}", f"y={offset}+{slope}x")

    return spelled(m, c), spelled(m, c + 1) if rng.random() < 0.5 else spelled(m + 1, c)


def powers(rng: random.Random) -> Two:
    base, exponent = rng.randint(2, 9), rng.randint(2, 5)

    def spelled(b: int, e: int) -> Spelling:
        return one_of(f"{b}^{e}", f"{b}^{{{e}}}", str(b**e), "\\times ".join([str(b)] * e))

    return spelled(base, exponent), spelled(base, exponent + 1)


def logarithms(rng: random.Random) -> Two:
    a, b = rng.sample(range(2, 12), 2)
    same = one_of(rf"\ln {a}+\ln {b}", rf"\ln {a * b}", rf"\ln({a * b})", rf"\ln({a}\cdot {b})")
    return same, one_of(rf"\ln {a * b + 1}", rf"\ln {a} - \ln {b}")


# -- several values ----------------------------------------------------------------------------------------------------


def sets(rng: random.Random) -> Two:
    values = rng.sample(range(-20, 40), rng.randint(2, 4))

    def spelled(numbers: list[int]) -> Spelling:
        def text(inner: random.Random) -> str:
            order = inner.sample(numbers, len(numbers))
            listed = ", ".join(map(str, order))
            return inner.choice([rf"\{{{listed}\}}", rf"\left\{{{listed}\right\}}", listed, listed.replace(", ", ",")])

        return text

    changed = [*values[:-1], values[-1] + 61]
    return spelled(values), spelled(rng.choice([changed, values[:-1] or changed, [*values, 77]]))


def sides(rng: random.Random) -> Two:
    """Lists in which a value stands twice, which sets of values do not tell apart."""
    a, b = rng.sample(range(2, 40), 2)

    def spelled(numbers: list[int]) -> Spelling:
        def text(inner: random.Random) -> str:
            *first, last = inner.sample(numbers, len(numbers))
            listed = ", ".join(map(str, first))
            return inner.choice([f"{listed}, {last}", f"{listed},{last}", f"{listed} and {last}"])

        return text

    return spelled([a, a, b]), spelled(rng.choice([[a, b], [a, b, b], [a, a, a, b], [a, a]]))


def solutions(rng: random.Random) -> Two:
    a, b = rng.sample(range(-9, 20), 2)

    def spelled(p: int, q: int) -> Spelling:
        return one_of(f"x={p} or x={q}", f"{p}, {q}", f"x = {q}, x = {p}", rf"\{{{p},{q}\}}", f"{q} and {p}")

    return spelled(a, b), spelled(a, b + 31)


def points(rng: random.Random) -> Two:
    x, y = rng.sample(range(-12, 13), 2)

    def spelled(p: int, q: int) -> Spelling:
        return one_of(f"({p},{q})", f"({p}, {q})", rf"\left({p},{q}\right)", rf"\left( {p} , {q} \right)")

    return spelled(x, y), spelled(y, x) if rng.random() < 0.5 else spelled(x, y + 25)


def intervals(rng: random.Random) -> Two:
    low = rng.randint(-9, 9)
    high = low + rng.randint(1, 12)
    closed = rng.choice([(True, False), (False, True), (True, True), (False, False)])

    def spelled(a: int, b: int, ends: tuple[bool, bool]) -> Spelling:
        left, right = "[" if ends[0] else "(", "]" if ends[1] else ")"
        less = tuple(r"\le" if end else "<" for end in ends)
        return one_of(
            f"{left}{a},{b}{right}", f"{left}{a}, {b}{right}", rf"\left{left}{a},{b}\right{right}",
            rf"{a} {less[0]} x {less[1]} {b}",
        )  # fmt: skip

    flipped = (not closed[0], closed[1])
    other = spelled(low, high + 1, closed) if rng.random() < 0.5 else spelled(low, high, flipped)
    return spelled(low, high, closed), other


def rays(rng: random.Random) -> Two:
    a = rng.randint(-20, 20)

    def spelled(end: int) -> Spelling:
        return one_of(rf"({end},\infty)", f"x > {end}", f"x>{end}", rf"({end}, +\infty)", rf"\left({end},\infty\right)")

    return spelled(a), rng.choice([spelled(a + 1), one_of(f"x < {a}", rf"(-\infty,{a})"), one_of(rf"x \ge {a}")])


def unions(rng: random.Random) -> Two:
    a = rng.randint(-9, 5)
    b = a + rng.randint(1, 6)

    def spelled(p: int, q: int) -> Spelling:
        return one_of(
            rf"(-\infty,{p})\cup({q},\infty)", rf"(-\infty, {p}) \cup ({q}, \infty)",
            rf"\left(-\infty,{p}\right)\cup\left({q},\infty\right)", rf"({q},\infty)\cup(-\infty,{p})",
        )  # fmt: skip

    return spelled(a, b), spelled(a, b + 1)


def matrices(rng: random.Random) -> Two:
    rows = [[rng.randint(-9, 9) for _ in range(2)] for _ in range(2)]

    def spelled(values: list[list[int]]) -> Spelling:
        def text(inner: random.Random) -> str:
            name = inner.choice(["pmatrix", "bmatrix"])
            gap = inner.choice(["", " "])
            body = rf"{gap}\\{gap}".join(f"{gap}&{gap}".join(map(str, row)) for row in values)
            return rf"\begin{{{name}}}{gap}{body}{gap}\end{{{name}}}"

        return text

    changed = [list(row) for row in rows]
    changed[rng.randrange(2)][rng.randrange(2)] += rng.choice([-1, 1, 20])
    return spelled(rows), spelled(changed)


def ratios(rng: random.Random) -> Two:
    a, b = rng.sample([2, 3, 5, 7, 11, 13], 2)

    def spelled(p: int, q: int) -> Spelling:
        return one_of(f"{p}:{q}", f"{p} : {q}")

    return spelled(a, b), spelled(b, a) if rng.random() < 0.5 else spelled(a, b + 4)


# -- words and choices -------------------------------------------------------------------------------------------------

TEXTS = [
    "isosceles triangle", "north", "the red circle", "parallelogram", "Yes", "no solution", "increasing",
    "triangle ABC",
    "SAS", "right angle", "July", "the second row", "chloroplast", "supply and demand",
]  # fmt: skip


def words(rng: random.Random) -> Two:
    first, second = rng.sample(TEXTS, 2)

    def spelled(text: str) -> Spelling:
        return one_of(text, text.capitalize(), rf"\text{{{text}}}", text.lower(), f"{text}.")

    return spelled(first), spelled(second)


def spelled_choice(letter: str) -> Spelling:
    return one_of(letter, f"({letter})", f"{letter}.", rf"\text{{{letter}}}", f"{letter})", letter.lower(),
                  f"Option {letter}", rf"\textbf{{{letter}}}", rf"\mathrm{{{letter}}}")  # fmt: skip


def choices(rng: random.Random) -> Two:
    first, second = rng.sample("ABCDE", 2)
    return spelled_choice(first), spelled_choice(second)


def choices_with_text(rng: random.Random) -> Two:
    first, second = rng.sample("ABCDE", 2)
    value, other = rng.sample(range(2, 90), 2)

    def spelled(letter: str, number: int) -> Spelling:
        return one_of(
            f"{letter}. {number}", f"({letter}) {number}", f"{letter}) {number}", f"{letter}: {number}", letter
        )

    return spelled(first, value), spelled(second, other)


# -- hostile -----------------------------------------------------------------------------------------------------------

TOWERS = (r"9^{9^{9^{9}}}", "2^{2^{2^{2^{2^{2}}}}}", "(10!)!", r"\sum_{n=1}^{10^{12}} \frac{1}{n}", "99999999!!!")


def hostile(rng: random.Random) -> str:
    """What a model writes when it has lost its way: never the reference, which is an integer from 2 to 99."""
    n = rng.randint(50, 400)
    return rng.choice(
        [
            "{" * n, "}" * n, r"\frac{" * n, r"\sqrt{" * n + "2", "(" * n + "1", r"\left(" * n, "\\" * n, "$" * n,
            "x" * n, "^" * n, "_" * n, "\x00", "\ud7ff\uffff" * 5, "…" * n, "NaN", "-inf", "None", "null", "", " ",
            "1" * n, "0." + "3" * n, "1/0", r"\frac{1}{0}", r"\int_0^x", r"\begin{pmatrix}", r"\end{pmatrix} & \\",
            "A or B or C", "import os; os.system('true')", "__import__('os')", "lambda: 0", "'; DROP TABLE answers; --",
            "<think>", "</think>", "100 200 300 400", "一百", "x" + "+x" * n, r"\text{" * n, "a b " * n,
            rng.choice(TOWERS) if rng.random() < 0.4 else "??",
        ]
    )  # fmt: skip


KINDS: dict[str, Callable[[random.Random], Two]] = {
    "integers": integers,
    "fractions": fractions,
    "decimals": decimals,
    "scientific": scientific,
    "percents": percents,
    "percents as numbers": percents_as_numbers,
    "units": units,
    "converted units": converted_units,
    "units left out": units_left_out,
    "degrees": degrees,
    "money": money,
    "roots": roots,
    "sums with roots": sums_with_roots,
    "multiples of pi": multiples_of_pi,
    "polynomials": polynomials,
    "equations": equations,
    "powers": powers,
    "logarithms": logarithms,
    "sets": sets,
    "sides": sides,
    "solutions": solutions,
    "points": points,
    "intervals": intervals,
    "rays": rays,
    "unions": unions,
    "matrices": matrices,
    "ratios": ratios,
    "words": words,
    "choices": choices,
    "choices with text": choices_with_text,
    "hostile": integers,  # what it is different from
}
