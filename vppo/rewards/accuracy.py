r"""The verified reward: is the last boxed answer of a completion the right one?"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vppo.grading.pool import LONGEST_ANSWER, SECONDS_PER_ANSWER, VerifierPool
from vppo.grading.spelling import clean, closing_brace

_REMEMBERED = 1 << 16

_pool = VerifierPool()
_verdicts: dict[tuple[str, str], bool] = {}
_lock = threading.Lock()


def accuracy_reward(completions: Sequence[Any], answer: Sequence[Any], **kwargs: Any) -> list[float]:
    r"""1.0 where the last `\boxed{...}` of a completion equals the reference answer, else 0.0.

    Equality is mathematical, by math-verify: `\frac12` is `0.5`, `x = 5` is `5`, `5 cm` is `5`, though not `5 kg`.
    Words are text, and the letter of a choice may come with its text. docs/rewards.md has the rules. A completion
    without a closed box is wrong, and so, this time and with a warning, is an answer that takes longer than five
    seconds to compare. May be called from any thread.

    Args:
        completions: `n` completions: strings, or lists of messages whose `content` is a string or a list of parts. Of
            messages, only the assistant's count.
        answer: `n` reference answers, as text or numbers; LaTeX, with or without `$` or `\boxed{}`.
        **kwargs: What else TRL passes to a reward; not used.

    Returns:
        `n` rewards.

    Raises:
        TypeError: `answer` is one text.
        ValueError: `completions` and `answer` differ in length, or no completion could ever meet one of the answers.
        RuntimeError: math-verify cannot be started.
    """
    if isinstance(answer, str):
        raise TypeError(f"answer: got the text {answer!r}, takes a list with one reference answer per completion")
    if len(completions) != len(answer):
        raise ValueError(f"answer must have one entry per completion: got {len(answer)} for {len(completions)}")
    references = [_reference(value, row) for row, value in enumerate(answer)]
    predicted = [last_boxed(response_text(completion)) for completion in completions]
    return [float(v) for v in equal_answers([(r, p or "") for r, p in zip(references, predicted, strict=True)])]


def equal_answers(pairs: Sequence[tuple[str, str]]) -> list[bool]:
    r"""Which predicted answers equal their reference answers, by the rules of docs/rewards.md.

    Judged in parallel, in child processes; equal pairs once, and what was judged is remembered. A pair that takes
    longer than five seconds counts as different; so do all that are left when no verdict came for ten seconds, or when
    the call has taken ten seconds plus 0.5 s a pair. Those are not remembered, and a warning says how many they were.
    May be called from any thread.

    Args:
        pairs: Reference and predicted answer, as LaTeX or text, without the box. An empty answer equals nothing.

    Returns:
        One verdict per pair.

    Raises:
        RuntimeError: math-verify cannot be started.
    """
    verdicts = {pair: verdict for pair in dict.fromkeys(pairs) if (verdict := _at_once(*pair)) is not None}
    with _lock:
        verdicts |= {pair: _verdicts[pair] for pair in pairs if pair in _verdicts}
    open_pairs = [pair for pair in dict.fromkeys(pairs) if pair not in verdicts]
    judged = {p: v for p, v in zip(open_pairs, _pool.equal(open_pairs), strict=True) if v is not None}
    with _lock:
        _verdicts.update(judged)
        while len(_verdicts) > _REMEMBERED:
            del _verdicts[next(iter(_verdicts))]
    if late := len(open_pairs) - len(judged):
        warnings.warn(
            f"{late} of {len(pairs)} answers could not be compared with their references (limit: "
            f"{SECONDS_PER_ANSWER:g} s an answer, and memory): they count as wrong this time",
            RuntimeWarning,
            stacklevel=2,
        )
    verdicts |= judged
    return [verdicts.get(pair, False) for pair in pairs]


def last_boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` of a text holds, or None where there is none or its brace is never closed.

    Args:
        text: Any text. Braces may nest; `\{` and `\}` are text, not braces.
    """
    start = text.rfind(r"\boxed")
    if start < 0 or not text[start + 6 :].lstrip().startswith("{"):
        return None
    opening = text.index("{", start)
    closing = closing_brace(text, opening)
    return None if closing is None else text[opening + 1 : closing].strip()


def _at_once(reference: str, predicted: str) -> bool | None:
    """The verdict where it needs no mathematics, else None."""
    if not predicted.strip():
        return False
    if predicted.strip() == reference.strip():
        return True
    return False if max(len(reference), len(predicted)) > LONGEST_ANSWER else None


def response_text(completion: Any) -> str:
    """What the assistant wrote, of whatever a completion holds."""
    if isinstance(completion, str):
        return completion
    messages = [completion] if isinstance(completion, Mapping) else completion
    if not isinstance(messages, Iterable):
        return ""
    spoken = [m for m in messages if isinstance(m, Mapping) and m.get("role", "assistant") == "assistant"]
    return "\n".join(_content(message.get("content")) for message in spoken)


def _content(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, Iterable) else []
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    return "".join(text for text in texts if isinstance(text, str))


def _reference(value: Any, row: int) -> str:
    """A reference answer as text."""
    given = value
    if hasattr(value, "tolist"):  # of numpy, torch or a column of a table
        value = value.tolist()
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    text = str(value).strip()
    if isinstance(value, float) and math.isinf(value):
        return r"\infty" if value > 0 else r"-\infty"
    number_or_text = isinstance(value, str) or (hasattr(value, "__float__") and value == value)
    boxed = last_boxed(text)
    text = text if boxed is None else boxed
    if not number_or_text or not clean(text):
        raise ValueError(f"answer: got {given!r} in row {row}, takes text or a number that a completion can give")
    return text
