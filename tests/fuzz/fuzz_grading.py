"""Random answers for the verifier: it neither fails nor takes for ever, and is the same both ways round."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vppo.grading.pool import LONGEST_ANSWER, VerifierPool

pytestmark = pytest.mark.fuzz

PIECES = [
    *"0123456789abcxyzABCDEπ°√∞≤×·{}()[]<>,.;:|/\\^_=+-*%$€&# \n\t\0é中",  # noqa: RUF001
    "\\frac", "\\sqrt", "\\text{", "\\left(", "\\right)", "\\pi", "\\infty", "\\cdot",
    "\\times", "\\pm", "\\cup", "\\boxed{",
    "\\begin{pmatrix}", "\\end{pmatrix}", "\\int", "\\sum", "\\log", "\\sin", "10^{", "9^9^9", "1e5",
    "1,000", "1/3", "0.5",
    " cm", " kg", "km/h", "^2", "x=", " and ", " or ", "true", "False", "A.", "(B)", "NaN", "inf",
]  # fmt: skip
ANSWERS = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
    st.text(max_size=30),
    st.floats().map(str),
    st.integers().map(str),
    st.sampled_from(PIECES).flatmap(lambda piece: st.integers(1, 400).map(lambda n: (piece * n)[:LONGEST_ANSWER])),
)


def test_random_answers(for_a_while: Callable[[Callable[[], None]], None]) -> None:
    pool = VerifierPool()
    assert pool.equal([("1", "1.0")]) == [True]  # its processes have started

    @settings(max_examples=10, deadline=None, derandomize=False, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.tuples(ANSWERS, ANSWERS), min_size=8, max_size=8))
    def examples(pairs: list[tuple[str, str]]) -> None:
        asked = [*pairs, *((b, a) for a, b in pairs), *((a, a) for a, _ in pairs)]
        begin = time.monotonic()
        verdicts = pool.equal(asked)
        assert time.monotonic() - begin < 10 + 0.5 * len(asked) + 5  # what is promised, and a busy machine
        for (a, b), one, other in zip(pairs, verdicts[:8], verdicts[8:16], strict=True):
            if a.strip() and b.strip() and None not in (one, other):
                assert one == other, (a, b, one, other)

    try:
        for_a_while(examples)
    finally:
        pool.close()
