r"""Which answers are right: the last box of a response against the reference, by one grader or by several."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from vppo.errors import InputError
from vppo.grading import mathruler
from vppo.grading.answers import option
from vppo.grading.child import GRADERS
from vppo.grading.pool import LONGEST_ANSWER, VerifierPool
from vppo.grading.spelling import clean
from vppo.rewards.accuracy import last_boxed

PART = 256  # pairs between two signs of progress
PATIENCE = 12.0  # nothing waits for a verdict, as training does: a busy machine must make no answer wrong
_MARK = re.compile(r"(?:(?<=\s)|^|(?<=[,;]))\(?([A-J])\s*[).:]\s*(?=\S)")
Pair = tuple[str, str]


@dataclass(frozen=True)
class Item:
    """One response: the question (for its choices), the reference answer, and what was written."""

    question: str
    reference: str
    response: str


def check_graders(names: Sequence[str]) -> None:
    """Raises an `InputError` where there is no such grader, or its package is not installed."""
    if not names:
        raise InputError(f"graders: got none, takes one or more of {', '.join(GRADERS)}; the first one counts")
    for name in names:
        if name not in GRADERS:
            raise InputError(f"graders: got {name!r}, takes one or more of {', '.join(GRADERS)}; the first one counts")
        if names.count(name) > 1:
            raise InputError(f"graders: got {name!r} twice, takes each once")
    missing = [package for package in mathruler.PACKAGES if importlib.util.find_spec(package) is None]
    if "mathruler" in names and missing:
        raise InputError(
            f"graders: 'mathruler' needs {', '.join(missing)}: pip install 'vppo-kernels[mathruler]'; or use --graders "
            "math-verify"
        )


def answer_of(grader: str, response: str) -> str | None:
    """The answer that a grader reads in a response; None where it finds no closed box."""
    return mathruler.boxed(response) if grader == "mathruler" else last_boxed(response)


def verdicts(
    grader: str, items: Sequence[Item], advance: Callable[[int], None] = lambda count: None
) -> list[bool | None]:
    """Whether each response is right.

    "math-verify": mathematical equality, by the rules of docs/rewards.md; a choice may be named by its letter or by its
    value. "mathruler": what the paper's own evaluation says, letters against letters.

    Args:
        grader: One of `vppo.grading.child.GRADERS`.
        items: The responses.
        advance: Is told, again and again, how many further items have been judged.

    Returns:
        A verdict each; None where it took longer than the five seconds of work that each comparison has. A response
        without a closed box is wrong.

    Raises:
        RuntimeError: The grader cannot be started.
    """
    asked = [_pairs(grader, item) for item in items]
    known: dict[Pair, bool | None] = {
        pair: at_once for pairs in asked for pair in pairs if (at_once := _at_once(pair)) is not None
    }
    waiting = list(dict.fromkeys(pair for pairs in asked for pair in pairs if pair not in known))
    share = len(items) / max(1, len(waiting))
    told = 0.0
    for start in range(0, len(waiting), PART):
        part = waiting[start : start + PART]
        known |= _judge(_pool(grader), part)
        told += share * len(part)
        advance(round(told) - round(told - share * len(part)))
    if not waiting:
        advance(len(items))
    return [_any([known[pair] for pair in pairs]) for pairs in asked]


@cache
def _pool(grader: str) -> VerifierPool:
    """Starting its processes takes seconds, so they are kept; they end with this one."""
    return VerifierPool(grader, PATIENCE)


def _judge(pool: VerifierPool, pairs: Sequence[Pair]) -> dict[Pair, bool | None]:
    """Every pair's own verdict.

    All pairs of a call have a limit together. What is left undecided by that is asked again, as many at once as there
    are children: each then has its own five seconds of work.
    """
    found = dict(zip(pairs, pool.equal(pairs), strict=True))
    open_pairs = [pair for pair in pairs if found[pair] is None]
    for start in range(0, len(open_pairs), pool.size):
        part = open_pairs[start : start + pool.size]
        found |= zip(part, pool.equal(part), strict=True)
    return found


def _any(found: Sequence[bool | None]) -> bool | None:
    return True if True in found else None if None in found else False


def _at_once(pair: Pair) -> bool | None:
    """The verdict where it needs no mathematics, else None."""
    reference, predicted = pair
    if not predicted:
        return False
    if reference == predicted:
        return True
    return False if max(map(len, pair)) > LONGEST_ANSWER else None


def _pairs(grader: str, item: Item) -> list[Pair]:
    """What is compared: the response is right where any of these pairs is equal."""
    reference = item.reference.strip()
    predicted = (answer_of(grader, item.response) or "").strip()
    if grader == "mathruler":
        return [(reference, predicted)]
    reference = last_boxed(reference) or reference
    found = [(reference, predicted)]
    texts = choices(item.question)
    if texts and predicted and len(predicted) <= LONGEST_ANSWER:
        right, chosen = option(clean(reference)), option(clean(predicted))
        if right and not chosen and right.letter in texts:
            found.append((texts[right.letter], predicted))  # the value of the right choice
        if chosen and not right and not chosen.text and chosen.letter in texts:
            found.append((reference, texts[chosen.letter]))  # the letter of the right value
    return found


def choices(question: str) -> dict[str, str]:
    """The choices of a multiple-choice question by their letters, in lower case; none where it names no two in order.

    `A. 30`, `A: 30`, `A) 30` and `(A) 30` are read, on lines of their own or one behind the other. Of two choices with
    the same text neither is returned: the text names none of them.
    """
    run: list[tuple[str, int, int]] = []  # letter, and where its mark begins and ends
    best: list[tuple[str, int, int]] = []
    for mark in _MARK.finditer(question):
        letter = mark[1]
        if letter == "A":
            run = []
        elif not run or ord(letter) != ord(run[-1][0]) + 1:
            continue
        run.append((letter, mark.start(), mark.end()))
        best = run if len(run) >= len(best) else best
    if len(best) < 2:
        return {}
    ends = [start for _, start, _ in best[1:]] + [len(question)]
    found = {
        letter.lower(): question[begin:end].split("\n")[0].strip().rstrip(";,.").strip()
        for (letter, _, begin), end in zip(best, ends, strict=True)
    }
    return {letter: text for letter, text in found.items() if text and list(found.values()).count(text) == 1}
