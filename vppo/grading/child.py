"""The other side of `vppo.grading.pool`: reads pairs of answers, one a line, and answers one byte for each."""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import sys

from vppo.grading.verdicts import DIFFERENT, EQUAL, READY, TOO_LARGE

# who compares: the module whose `equal` is asked, and the package that is slow to import
GRADERS = {
    "math-verify": ("vppo.grading.equality", "math_verify"),
    "mathruler": ("vppo.grading.mathruler", "mathruler.grader"),
}


def serve() -> None:
    """Answer until the input ends.

    Arguments of the process: search path, seconds that an answer may take by the clock and of work, bytes of memory,
    and who compares.
    """
    seconds, work, memory, grader = float(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever a parser prints is no answer
    own, package = GRADERS[grader]
    importlib.import_module(package)  # before the parent starts its clock
    equal = importlib.import_module(own).equal

    logging.disable(logging.WARNING)
    _limit_memory(memory)
    equal("x^2+1/2", r"\frac{2x^2+1}{2}")  # the parser builds its tables at the first formula
    os.write(answers, READY)
    for line in sys.stdin.buffer:
        # The parent ends a slow process itself; this is for when the parent is gone. One second more, so that it wins.
        signal.setitimer(signal.ITIMER_REAL, seconds + 1)
        signal.setitimer(signal.ITIMER_PROF, work)  # ends this process, also within a C call
        reference, predicted = json.loads(line)
        try:
            verdict = EQUAL if equal(reference, predicted) else DIFFERENT
        except MemoryError:
            verdict = TOO_LARGE
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.write(answers, verdict)


def _limit_memory(limit: int) -> None:
    try:
        import resource
    except ImportError:  # Windows has none
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
