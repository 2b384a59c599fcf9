r"""Who says that an answer is right: pairs of known truth, choices by letter or value, and the paper's own grader."""

from __future__ import annotations

import importlib.util
import time

import pytest
from support.answer_pairs import KINDS, Pair, pairs

from vppo.errors import InputError
from vppo.evaluation import graders
from vppo.evaluation.graders import Item, answer_of, check_graders, choices, verdicts
from vppo.grading import mathruler
from vppo.grading import pool as pools
from vppo.grading.spelling import clean

QUESTION = "What is x?\nChoices:\nA: 3\nB: 4.5\nC: \\sqrt{2}\nD: 3"
has_mathruler = all(importlib.util.find_spec(package) for package in mathruler.PACKAGES)


def graded(found: list[Pair]) -> list[Pair]:
    """Those that the grader gets wrong."""
    items = [Item("", pair.reference, rf"\boxed{{{pair.predicted}}}") for pair in found]
    judged = verdicts("math-verify", items)
    return [pair for pair, verdict in zip(found, judged, strict=True) if bool(verdict) != pair.equal]


def test_pairs_of_known_truth() -> None:
    """10,000 of them are graded by `make fuzz`."""
    found = list(pairs(450, seed=1))
    assert {pair.kind for pair in found} == set(KINDS)
    assert 0.4 < sum(pair.equal for pair in found) / len(found) < 0.6
    wrong = graded(found)
    assert len(wrong) <= 0.005 * len(found), wrong


def test_an_answer_that_takes_for_ever_costs_its_neighbours_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """All pairs of a call share a limit; whoever was cut off by it is asked again."""
    calls: list[int] = []

    class Pool:
        size = 2

        def equal(self, asked: list[tuple[str, str]]) -> list[bool | None]:
            calls.append(len(asked))
            if len(asked) > self.size:
                return [None] * len(asked)  # the first ones took the time of all
            return [None if "tower" in reference else reference == predicted[:1] for reference, predicted in asked]

    monkeypatch.setattr(graders, "_pool", lambda grader: Pool())
    told: list[int] = []
    items = [Item("", "tower", r"\boxed{2}"), *(Item("", str(i % 5), rf"\boxed{{{i % 5}.0}}") for i in range(5))]
    found = verdicts("math-verify", [*items, Item("", "3", r"\boxed{4.0}"), items[1]], told.append)
    assert found == [None, *[True] * 5, False, True]
    assert calls == [7, 2, 2, 2, 1] and sum(told) == 8


@pytest.mark.slow
def test_five_seconds_are_of_work_and_not_of_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the machine is busy, an answer may take long by the clock; what works too long is ended all the same."""
    monkeypatch.setattr(pools, "SECONDS_PER_ANSWER", 0.4)
    pool = pools.VerifierPool(patience=1000.0)
    try:
        begin = time.monotonic()
        assert pool.equal([("5", r"8^{9^{9^{9}}}"), ("0.5", r"\frac{1}{2}"), ("1", "2")]) == [None, True, False]
        assert time.monotonic() - begin < 200  # by the clock it had 400 seconds
    finally:
        pool.close()


def test_what_needs_no_mathematics() -> None:
    long = "9" * 3000
    items = [Item("", "7", "no box"), Item("", "7", r"\boxed{}"), Item("", "7", rf"\boxed{{{long}}}")]
    told: list[int] = []
    assert verdicts("math-verify", [*items, Item("", long, rf"\boxed{{{long}}}")], told.append) == [False] * 3 + [True]
    assert told == [4]


CHOSEN = [
    ("B", "B", True),
    ("B", "(b)", True),
    ("B", "4.5", True),
    ("B", r"\frac{9}{2}", True),
    ("B", "B: 4.5", True),
    ("B", "3", False),
    ("B", "C", False),
    ("A", "3", False),  # which D is, too
    ("C", r"\sqrt{2}", True),
    ("4.5", "B", True),
    ("4.5", "C", False),
    (r"\sqrt2", "C", True),
    ("E", "4.5", False),
    ("7", "B", False),
]


def test_a_choice_by_its_letter_or_its_value() -> None:
    items = [Item(QUESTION, reference, rf"so \boxed{{{answer}}}") for reference, answer, _ in CHOSEN]
    assert verdicts("math-verify", items) == [right for _, _, right in CHOSEN]


@pytest.mark.parametrize(
    ("question", "found"),
    [
        (QUESTION, {"b": "4.5", "c": r"\sqrt{2}"}),
        ("Which? (A) 30 (B) 45 (C) 60", {"a": "30", "b": "45", "c": "60"}),
        ("Which?\nA. red; \nB. blue.", {"a": "red", "b": "blue"}),
        ("Which?\nA) red\nB) blue", {"a": "red", "b": "blue"}),
        ("Points A: and B. lie on AB", {"a": "and", "b": "lie on AB"}),  # no harm: no such value is ever right
        ("A: 3\nC: 4", {}),
        ("In triangle ABC, A. Find B.", {}),
        ("no choices", {}),
        ("A. in the text. Choices: A. 1 B. 2", {"a": "1", "b": "2"}),
    ],
)
def test_choices(question: str, found: dict[str, str]) -> None:
    assert choices(question) == found


def test_a_full_stop_after_a_number_changes_nothing() -> None:
    r"""`1.3e-7.` was a product with Euler's number, and `1 23/31.` one of 1 and 23/31."""
    assert clean("1.3e-7.") == clean("1.3e-7") == r"1.3\times 10^{-7}"
    assert clean("1 23/31.") == clean("1 23/31") == r"1\frac{23}{31}"
    assert clean("5e-05.") == clean("5e-05") and clean("2e3.5") == "2e3.5"


def test_a_mixed_number_may_be_set_as_text() -> None:
    r"""`\text{1 1/2}` stayed a text, which is 1 times 1/2."""
    assert clean(r"\text{1 1/2}") == clean(r"\( \text{1 1/2}. \)") == clean("1 1/2") == r"1\frac{1}{2}"
    assert clean(r"\mathbf{1 1/2}") == clean(r"\boxed{\mathrm{ 1 1 / 2 }}") == clean("1 1/2")
    assert verdicts("math-verify", [Item("", r"\frac{3}{2}", r"\boxed{\text{1 1/2}}")]) == [True]


def test_the_published_box() -> None:
    assert mathruler.boxed(r"\boxed{1} then \boxed{ \frac{1}{2} }") == r"\frac{1}{2}"
    assert mathruler.boxed(r"\boxed{1 / 2} < 3") == "1/2"
    assert mathruler.boxed(r"\boxed{\{1, 2\}}") == r"\{1, 2\}"
    assert mathruler.boxed(r"\boxed{\}}") == "\\"  # every brace counts
    assert mathruler.boxed(r"\boxed{1") is None and mathruler.boxed("none") is None
    assert answer_of("mathruler", r"\boxed{1 / 2}") == "1/2" and answer_of("math-verify", r"\boxed{1 / 2}") == "1 / 2"


@pytest.mark.skipif(not has_mathruler, reason="mathruler is not installed")
def test_mathruler() -> None:
    """As the package itself says, in child processes: stricter than ours about units, and about letters."""
    asked = [("12", "12.0"), (r"\frac{1}{2}", "0.5"), ("12 kg", "12"), ("5 cm", "5"), ("2/4", "1/2"), ("B", "B. 60")]
    asked += [(r"5\sqrt{3}", r"5 \sqrt { 3 }"), ("x", "9^{9^{9^{9}}}")]
    items = [Item(QUESTION, reference, rf"\boxed{{{answer}}}") for reference, answer in asked]
    found = verdicts("mathruler", [*items, Item("", "4", "no box"), Item(QUESTION, "B", r"\boxed{4.5}")])
    assert found == [True, True, False, True, False, False, True, False, False, False]


def test_a_grader_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for names, message in (([], "got none"), (["sympy"], "got 'sympy', takes one or more of math-verify, mathruler")):
        with pytest.raises(InputError, match=message):
            check_graders(names)
    with pytest.raises(InputError, match="'math-verify' twice"):
        check_graders(["math-verify", "math-verify"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_graders(["math-verify"])
    with pytest.raises(InputError, match=r"needs mathruler, pylatexenc, tqdm: pip install 'vppo-kernels\[mathruler\]'"):
        check_graders(["math-verify", "mathruler"])
