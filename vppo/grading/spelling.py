r"""An answer brought to one spelling: plain LaTeX, without what stands around it.

Nothing here is evaluated: these are rules on text, bounded in time by the length of an answer.
"""

# ruff: noqa: RUF001 - characters that look like others are what this is about

from __future__ import annotations

import re
import unicodedata

_SYMBOLS = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "﹣": "-",
        "×": r"\times ",
        "÷": "/",
        "·": r"\cdot ",
        "⋅": r"\cdot ",
        "∙": r"\cdot ",
        "∞": r"\infty ",
    }
    | {"≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∪": r"\cup ", "∩": r"\cap "}
    | {
        "∈": r"\in ",
        "∅": r"\emptyset ",
        "°": r"^\circ ",
        "º": r"^\circ ",
        "˚": r"^\circ ",
        "∘": r"^\circ ",
        "⟨": "(",
        "⟩": ")",
    }
    | {
        "。": ".",
        "’": "'",
        "‘": "'",
        "“": '"',
        "”": '"',
        "µ": "μ",
        "′": "'",
        "″": '"',
        "∠": r"\angle ",
        "△": r"\triangle ",
        "≈": r"\approx ",
        "⁄": "/",
        "∣": "|",
        "\x00": " ",
    }
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_FUNCTIONS = (
    "sqrt|arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|infty|pi|theta|alpha|beta|gamma|lambda"
)

# Of one command, many spellings; the right one is what math-verify reads.
_SPELLINGS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\s*\.?(?=[()\[\]{}|\\/])", ""),
        (r"\\(?:displaystyle|textstyle|limits|nolimits|!)(?![A-Za-z])", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:quad|qquad|thinspace|enspace|space)(?![A-Za-z])|(?<!\\)\\[,;: ]|~", " "),
        (r"\\(?:mathrm|mathbf|mathit|mathsf|mathbb|boldsymbol|bm|mbox|hbox|textbf|textit|textrm|textsf|texttt|textnormal|emph)"
         r"\s*\{", r"\\text{"),
        (r"\\text\s+\{", r"\\text{"),
        (r"\\(?:lvert|rvert|mid|vert)(?![A-Za-z])", "|"),
        (r"\\(?:langle|lparen)(?![A-Za-z])", "("),
        (r"\\(?:rangle|rparen)(?![A-Za-z])", ")"),
        (r"\\lbrace(?![A-Za-z])", r"\\{"),
        (r"\\rbrace(?![A-Za-z])", r"\\}"),
        (r"\\(?:leqslant|leq|leqq)(?![A-Za-z])|<=", r"\\le "),
        (r"\\(?:geqslant|geq|geqq)(?![A-Za-z])|>=", r"\\ge "),
        (r"\\neq(?![A-Za-z])|!=", r"\\ne "),
        (r"\\(?:varnothing|O)(?![A-Za-z])", r"\\emptyset "),
        (r"\\text\{\s*(?:and|or)\s*\}", " and "),
        (r"\\text\{\s*\^\\circ\s*\}", r"^\\circ "),
        (r"(?:\{\s*\})?\s*\^\s*\{?\s*\\(?:circ|degree)(?![A-Za-z])\s*\}?", r"^\\circ "),
        (r"\\(?:degree|textdegree)(?![A-Za-z])(?:\{\})?", r"^\\circ "),
        (r"(?<=\d)\s*\\circ(?![A-Za-z])|(?<=\d)\s*\^\s*\{?o\}?(?![A-Za-z])", r"^\\circ "),
        (r"\\%", "%"),
        (r"\\textdollar(?![A-Za-z])", r"\\$"),
        (r"\*\*", "^"),
        (rf"(?<![\\A-Za-z])(sqrt)(?=[\d(])|(?<![\\A-Za-z])({_FUNCTIONS})(?![A-Za-z])", r"\\\1\2 "),
        (r"(?<![\\A-Za-z])(?:infinity|inf)(?![A-Za-z])", r"\\infty "),
        (r"\^\s*([+-]?\d+(?:\.\d+)?)", r"^{\1}"),
        (r"(\d)\s*[xX]\s*(?=10\s*\^)", r"\1\\times "),
    ]
]  # fmt: skip
_MIXED = re.compile(r"(?<![\d/.^{_])(\d+)\s+(\d+)\s*/\s*(\d+)(?!\.?\d)")
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALE = re.compile(rf"(?<=\d)\s*(?:\\text\{{\s*)?({'|'.join(_SCALES)})s?(?![A-Za-z])\s*\}}?", re.IGNORECASE)
_SCIENTIFIC = re.compile(r"(?<![A-Za-z\d.])(\d+(?:\.\d*)?|\.\d+)[eE]([+-]?\d+)(?!\.?\d|[A-Za-z])")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{?(\d+)\}?")
_THOUSANDS = re.compile(r"(?<![\d.,])(\d{1,3})((?:(?:,|\{,\}|\\,|\\ |[ \u00a0\u2009\u202f']|\\!,|,\\!)\d{3})+)(?![\d])")
_ANSWER_IS = re.compile(r"(?i)^(?:the\s+)?(?:final\s+|correct\s+)?answer\s*(?:is\s*:?|:|=)\s*(?=\S)")


def clean(text: str, *, scientific: bool = True, thousands: bool = True) -> str:
    r"""One spelling of an answer: plain LaTeX without delimiters, outer text commands, sizes, fonts and a full stop.

    Args:
        text: An answer, with or without `$`, `\boxed{}`, Unicode symbols.
        scientific: Read `5e-05` as a power of ten, rather than as a product with Euler's number.
        thousands: Read `1,000` as one number, rather than as two.
    """
    text = text.strip().strip("*").strip()
    if thousands:
        text = _join_thousands(text)
    text = _unicode(text)
    if scientific:
        text = _SCIENTIFIC.sub(lambda m: rf"{m[1]}\times 10^{{{int(m[2])}}}", text)
    text = _math_delimiters(text)
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    text = _SCALE.sub(lambda m: rf"\times 10^{{{_SCALES[m[1].lower()]}}} ", text)
    text = _REPEATING.sub(_repeating_decimal, text)
    while True:
        bare = _strip(text)
        if bare == text:  # only now: `\mathrm{1 1/2}` is a mixed number, too
            return re.sub(r"\s+", " ", _MIXED.sub(r"\1\\frac{\2}{\3}", text))
        text = bare


def _join_thousands(text: str) -> str:
    """`1,000` to `1000`, except commas inside of brackets: those part the elements of a tuple or a set."""
    in_brackets = text[:1] in "([" or text.startswith((r"\left", r"\{", r"$(", r"$\{", r"$["))
    pattern = re.compile(_THOUSANDS.pattern.replace("(?:,|", "(?:")) if in_brackets else _THOUSANDS
    return pattern.sub(lambda m: m[1] + re.sub(r"\D", "", m[2]), text)


def may_be_a_list(text: str) -> bool:
    """Whether `100,200` may also be two numbers; `1,000` is one: nobody writes 000."""
    return bool(re.search(r"\d,(?!0)\d{3}(?!\d)", text))


def _unicode(text: str) -> str:
    text = re.sub("[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda m: "^{" + m[0].translate(_SUPERSCRIPTS) + "}", text)
    text = re.sub("[₀₁₂₃₄₅₆₇₈₉]+", lambda m: "_{" + m[0].translate(_SUBSCRIPTS) + "}", text)
    text = re.sub("[¼-¾⅐-⅞]", _vulgar_fraction, text)
    text = unicodedata.normalize("NFKC", text.translate(_SYMBOLS)).translate(_SYMBOLS)
    text = re.sub(r"√\s*(?=[({])", r"\\sqrt", text)
    text = re.sub(r"√\s*(\d+(?:\.\d+)?|\w)", r"\\sqrt{\1}", text)
    return re.sub("[α-ωΑ-Ω]", _greek, text) if re.search("[α-ωΑ-Ω]", text) else text


def _vulgar_fraction(match: re.Match[str]) -> str:
    numerator, _, denominator = unicodedata.normalize("NFKC", match[0]).partition("⁄")
    return rf"\frac{{{numerator}}}{{{denominator}}}"


def _greek(match: re.Match[str]) -> str:
    if match[0] in "Ωμ":  # ohm and micro
        return match[0]
    name = unicodedata.name(match[0]).rsplit(" ", 1)[-1].lower()
    return "\\" + (name.capitalize() if match[0].isupper() else name).replace("lamda", "lambda") + " "


def _repeating_decimal(match: re.Match[str]) -> str:
    whole, fixed, repeated = match[1] or "0", match[2], match[3]
    ninths = int("9" * len(repeated)) * 10 ** len(fixed)
    numerator = int(whole + fixed + repeated) - int(whole + fixed)
    return rf"\frac{{{numerator}}}{{{ninths}}}"


def _math_delimiters(text: str) -> str:
    """Without `$` and `\\(`; a `$` that closes nothing is money."""
    dollars = re.findall(r"(?<!\\)\$", text)
    text = re.sub(r"(?<!\\)\$", r"\\$" if len(dollars) % 2 else "", text)
    return re.sub(r"\\[()\[\]]", "", text)


def _strip(text: str) -> str:
    """Without one layer of what may stand around an answer: space, stops, quotes, braces, a text command."""
    text = _ANSWER_IS.sub("", re.sub(r"^([\"'`]+)(.*)\1$", r"\2", text.strip(), flags=re.DOTALL))
    text = re.sub(r"(?<=[^\s\\])(?:[.,;:\s]|\\\\)+$", "", text)
    for opening in (r"\text", r"\boxed", ""):
        if text.startswith(opening + "{") and closing_brace(text, len(opening)) == len(text) - 1:
            return text[len(opening) + 1 : -1].strip()
    return text.strip()


def closing_brace(text: str, opening: int) -> int | None:
    r"""The position of the `}` that closes the `{` at `opening`, or None; `\{` and `\}` are text."""
    depth, position = 0, opening
    while position < len(text):
        if text[position] == "\\":
            position += 1  # whatever follows is escaped
        elif text[position] == "{":
            depth += 1
        elif text[position] == "}":
            depth -= 1
            if depth == 0:
                return position
        position += 1
    return None
