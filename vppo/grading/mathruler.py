r"""The grader of the paper's own evaluation: the package mathruler, and the box as PAPO-Eval looks for it.

mathruler simplifies by sympy without any limit of time, so only child processes of `vppo.grading.pool` call `equal`.
"""

from __future__ import annotations

import re

PACKAGES = ("mathruler", "pylatexenc", "tqdm")  # it needs the other two, and does not declare them
_BOX = r"\boxed{"


def equal(reference: str, predicted: str) -> bool:
    """Whether mathruler takes a predicted answer for the reference answer.

    Args:
        reference: As the data has it.
        predicted: What `boxed` found in a response.

    Raises:
        ImportError: One of `PACKAGES` is not installed.
    """
    from mathruler.grader import grade_answer

    return bool(grade_answer(predicted, reference))


def boxed(response: str) -> str | None:
    r"""What the last `\boxed{...}` of a response holds, as the published evaluation finds it; None without one.

    Space around `<`, `>` and `/` is dropped first, and every brace counts, also one that a backslash escapes.
    """
    text = re.sub(r"\s*([<>/])\s*", r"\1", response)
    start = text.rfind(_BOX)
    depth = 0
    for place in range(start + len(_BOX) - 1, len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start + len(_BOX) : place].strip()
    return None
