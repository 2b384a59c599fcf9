"""Units of measurement in answers: which names are the same unit, and how large one is in terms of another."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

CURRENCY_SIGNS = "$€£¥₹₩₽"


@dataclass(frozen=True)
class Unit:
    """A product of powers of base units.

    Args:
        size: How many of the base it is: 1/100 for cm in metres. Of an angle in degrees, without the factor pi.
        powers: Base units and their exponents, sorted.
    """

    size: Fraction | int
    powers: tuple[tuple[str, int], ...]


# base: {name: size}. Bases that nobody converts in an answer (temperatures, currencies) have one entry.
_TABLE: dict[str, dict[str, str]] = {
    "m": {
        "nm nanometer nanometre": "1/1000000000",
        "μm um micrometer micrometre micron": "1/1000000",
        "mm millimeter millimetre": "1/1000",
        "cm centimeter centimetre": "1/100",
        "dm decimeter decimetre": "1/10",
        "m meter metre": "1",
        "km kilometer kilometre": "1000",
        'in inch "': "0.0254",
        "ft foot feet '": "0.3048",
        "yd yard": "0.9144",
        "mi mile": "1609.344",
    },
    "g": {
        "μg ug microgram": "1/1000000",
        "mg milligram": "1/1000",
        "g gram gramme gm": "1",
        "kg kilogram kilogramme kilo": "1000",
        "tonne": "1000000",
        "lb pound lbs": "453.59237",
        "oz ounce": "28.349523125",
    },
    "s": {
        "ns nanosecond": "1/1000000000",
        "μs us microsecond": "1/1000000",
        "ms millisecond": "1/1000",
        "s sec second": "1",
        "min minute": "60",
        "h hr hour": "3600",
        "day": "86400",
        "week": "604800",
    },
    "year": {"year yr": "1", "month": "1/12"},
    "degree": {"° deg degree": "1"},
    "radian": {"rad radian": "1"},
    "percent": {"% percent pct percentage": "1"},
    "°C": {"°C celsius": "1"},
    "°F": {"°F fahrenheit": "1"},
    "K": {"K kelvin": "1"},
    "dollar": {"$ dollar usd buck": "1", "cent ¢": "1/100"},
    "euro": {"€ euro eur": "1"},
    "pound sterling": {"£ gbp": "1"},
    "yen": {"¥ yen yuan rmb jpy cny": "1"},
    "rupee": {"₹ rupee rs inr": "1"},
    "won": {"₩ won krw": "1"},
    "rouble": {"₽ rouble ruble": "1"},
    "N": {"N newton": "1", "kN kilonewton": "1000"},
    "J": {"J joule": "1", "kJ kilojoule": "1000", "MJ megajoule": "1000000"},
    "cal": {"cal calorie": "1", "kcal kilocalorie": "1000"},
    "eV": {"eV": "1", "keV": "1000", "MeV": "1000000", "GeV": "1000000000"},
    "W": {"mW milliwatt": "1/1000", "W watt": "1", "kW kilowatt": "1000", "MW megawatt": "1000000"},
    "V": {"mV millivolt": "1/1000", "V volt": "1", "kV kilovolt": "1000"},
    "A": {"μA microampere": "1/1000000", "mA milliampere": "1/1000", "A amp ampere": "1"},
    "Ω": {"Ω ohm Omega": "1", "kΩ kiloohm": "1000"},
    "C": {"C coulomb": "1", "μC microcoulomb": "1/1000000"},
    "F": {"μF microfarad": "1/1000000", "farad": "1"},
    "T": {"T tesla": "1"},
    "Hz": {"Hz hertz": "1", "kHz kilohertz": "1000", "MHz megahertz": "1000000", "GHz gigahertz": "1000000000"},
    "Pa": {"Pa pascal": "1", "kPa kilopascal": "1000", "MPa megapascal": "1000000"},
    "atm": {"atm atmosphere": "1"},
    "mol": {"mol mole": "1", "mmol millimole": "1/1000"},
    "acre": {"acre": "1"},
    "gallon": {"gal gallon": "1"},
}
_UNITS = {
    name: Unit(Fraction(size), ((base, 1),))
    for base, names in _TABLE.items()
    for spelled, size in names.items()
    for name in spelled.split()
}
_LITRE = Unit(Fraction(1, 1000), (("m", 3),))
_UNITS |= {name: _LITRE for name in ("L", "l", "liter", "litre")}
_UNITS |= {name: Unit(Fraction(1, 1000000), (("m", 3),)) for name in ("mL", "ml", "milliliter", "millilitre", "cc")}
_UNITS |= {"ha": Unit(Fraction(10000), (("m", 2),)), "hectare": Unit(Fraction(10000), (("m", 2),))}
_HOUR = Fraction(1, 3600)
_UNITS |= {name: Unit(Fraction("1609.344") * _HOUR, (("m", 1), ("s", -1))) for name in ("mph",)}
_UNITS |= {name: Unit(1000 * _HOUR, (("m", 1), ("s", -1))) for name in ("kmh", "kph", "kmph")}

# Words after a number that make it another one, or no number: "3 or more", "3 quarters".
_NOT_A_UNIT = re.compile(
    "(?:and|or|more|less|fewer|than|not|about|at|least|most|over|from|are|dozens?|pairs?|hal(?:f|ves)|quarters?"
    "|(?:third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|hundredth|thousandth)s?)$"
)
_SAID_BESIDE = re.compile("(?:old|long|tall|high|wide|deep|away|apart|total|units?)$")  # "5 years old"
_TEMPERATURE = re.compile(r"(?i)(?:°|(?<![a-z])deg(?:ree)?s?)\s*([cf])(?:elsius|ahrenheit)?(?![a-z])")
_PREFIXES = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_SUFFIXES = {"squared": 2, "cubed": 3}
_TOKEN = re.compile(r"\s*(°\s*[CF](?![A-Za-z])|[A-Za-zμΩ°%$€£¥₹₩₽¢]+|[\"']|\^\{?-?\d\}?|/|\*|\.)")


def parse_unit(text: str) -> Unit | None:
    """The unit that a text names, or None where it names none.

    Args:
        text: `cm^{2}`, `km/h`, `square metres`, `°C`, `apples`. An unknown word of three letters or more is a unit of
            its own, in the singular; `units` is the number 1.
    """
    text = text.replace(r"^\circ", "°").replace(r"\cdot", "*").replace(r"\Omega", "Ω").replace(r"\mu", "μ").strip()
    text = _TEMPERATURE.sub(lambda m: "°" + m[1].upper(), text)
    factors: list[tuple[Unit, int]] = []  # units and their exponents
    sign, prefix, position = 1, 1, 0
    while position < len(text):
        token = _TOKEN.match(text, position)
        if token is None:
            return None
        position = token.end()
        word = token[1].replace(" ", "")
        if word in ("*", "."):
            continue
        if word == "/" or word.lower() == "per":
            sign = -1
        elif word.lower() in _PREFIXES:
            prefix = _PREFIXES[word.lower()]
        elif word.startswith("^") or word.lower() in _SUFFIXES:
            if not factors:
                return None
            unit, exponent = factors.pop()
            factors.append((unit, exponent * (_SUFFIXES.get(word.lower()) or int(word.strip("^{}")))))
        elif (found := _lookup(word)) is not None:
            factors.append((found, sign * prefix))
            sign, prefix = 1, 1
        else:
            return None
    size, powers = Fraction(1), Counter[str]()
    for unit, exponent in factors:
        size *= Fraction(unit.size) ** exponent
        for base, power in unit.powers:
            powers[base] += power * exponent
    return Unit(size, tuple(sorted((base, power) for base, power in powers.items() if power)))


def _lookup(word: str) -> Unit | None:
    lower = word.lower()
    if _SAID_BESIDE.match(lower):
        return Unit(1, ())
    singular = {"feet": "foot", "inches": "inch"}.get(lower) or re.sub(r"(?<=[a-z]{2})s$", "", lower)
    for name in (word, lower, singular):
        if name in _UNITS and (len(word) > 1 or name == word):
            return _UNITS[name]
    if len(word) < 3 or _NOT_A_UNIT.match(lower) or not re.search("[aeiou]", lower):
        return None
    return Unit(1, ((re.sub("ie$", "y", singular), 1),))
