"""The verified reward: is the last boxed answer of a completion the right one?

Symbolic verification can hang for good on what a policy writes (a tower of powers), and math-verify's own timeout works
in the main thread only. So it runs in a child process that the operating system ends when an answer takes too long.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

SECONDS_PER_ANSWER = 5


def accuracy_reward(completions: Sequence[Any], answer: Sequence[Any], **kwargs: Any) -> list[float]:
    r"""1.0 where the last `\boxed{...}` of a completion equals the reference answer, else 0.0.

    Equality is mathematical, by math-verify: `\frac12` is `0.5`. A completion without a closed box, or whose answer
    takes longer than five seconds to compare, is wrong. May be called from any thread.

    Args:
        completions: `n` completions: strings, or lists of messages whose `content` is a string or a list of parts.
        answer: `n` reference answers, as text or numbers; LaTeX, with or without `$` or `\boxed{}`.
        **kwargs: What else TRL passes to a reward; not used.

    Returns:
        `n` rewards.

    Raises:
        ValueError: `completions` and `answer` differ in length.
    """
    if len(completions) != len(answer):
        raise ValueError(f"answer must have one entry per completion: got {len(answer)} for {len(completions)}")
    return [float(_is_correct(last_boxed(_text(c)), str(a).strip())) for c, a in zip(completions, answer, strict=True)]


def last_boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` of a text holds, or None where there is none or its brace is never closed.

    Args:
        text: Any text. Braces may nest; `\{` and `\}` are text, not braces.
    """
    start = text.rfind(r"\boxed")
    if start < 0 or not text[start + 6 :].lstrip().startswith("{"):
        return None
    opening = text.index("{", start)
    depth, position = 0, opening
    while position < len(text):
        if text[position] == "\\":
            position += 1  # whatever follows is escaped
        elif text[position] == "{":
            depth += 1
        elif text[position] == "}":
            depth -= 1
            if depth == 0:
                return text[opening + 1 : position].strip()
        position += 1
    return None


def _text(completion: Any) -> str:
    if isinstance(completion, str):
        return completion
    contents = [message["content"] for message in completion]
    parts = [part for content in contents for part in ([content] if isinstance(content, str) else content or [])]
    return "".join(part if isinstance(part, str) else part.get("text") or "" for part in parts)


@lru_cache(maxsize=1 << 16)
def _is_correct(predicted: str | None, answer: str) -> bool:
    if not predicted:
        return False
    reference = last_boxed(answer) or answer
    return predicted == reference or _verifier.equal(reference, predicted)


class _Verifier:
    """A child process that compares one pair of expressions a line; started at first use and after it was ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def equal(self, reference: str, predicted: str) -> bool:
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = self._start()
            process = self._process
            assert process.stdin and process.stdout
            process.stdin.write(json.dumps([reference, predicted]) + "\n")
            process.stdin.flush()
            verdict = process.stdout.readline()
            if not verdict:  # its alarm ended it: too slow, so not equal
                process.communicate()
            return verdict == "1\n"

    def _start(self) -> subprocess.Popen[str]:
        # -P: this folder's module names must not shadow those that math-verify imports.
        command = [sys.executable, "-P", __file__]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"math-verify did not start in {sys.executable}: its error is printed above")
        return process


_verifier = _Verifier()


def _serve() -> None:
    """The child: reads `[reference, predicted]` lines, answers `1` or `0`, dies by SIGALRM on a slow pair."""
    import logging
    import signal

    from math_verify import parse, verify

    logging.disable(logging.WARNING)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle
    print("ready", flush=True)
    for line in sys.stdin:
        signal.alarm(SECONDS_PER_ANSWER)
        reference, predicted = (parse(rf"\boxed{{{text}}}", parsing_timeout=None) for text in json.loads(line))
        equal = verify(reference, predicted, timeout_seconds=None)
        signal.alarm(0)
        print(int(equal), flush=True)


if __name__ == "__main__":
    _serve()
