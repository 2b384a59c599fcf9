"""Child processes that compare answers, side by side, and that are ended when an answer takes too long.

What a policy writes can keep sympy busy for ever inside of one C call, where no timeout of Python's reaches it, or fill
the memory: so a comparison runs in a process of its own, with a limit on memory, and the operating system ends it.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from vppo.grading.verdicts import DIFFERENT, EQUAL

SECONDS_PER_ANSWER = 5.0
SECONDS_TO_START = 120.0  # importing sympy, on a machine that is busy with something else
SECONDS_PER_ORDINARY_ANSWER = 0.5  # a formula takes 30 ms on a quiet machine; a busy one must not make it wrong
MEMORY_PER_PROCESS = 2 << 30  # address space, in bytes; sympy and math-verify take 0.2 GiB of it
LONGEST_ANSWER = 2000  # characters; two of them fit into a pipe's buffer, so that no write can block


class VerifierPool:
    """Compares answers in as many child processes as there are cores, at least two.

    May be used from several threads at once (each gets children of its own) and after a fork (the forked process
    starts its own). The children end with `close`, at exit, and by themselves when this process is gone.

    Args:
        grader: One of `vppo.grading.child.GRADERS`.
        patience: All times by the clock are so many times as long. On a busy machine an answer then still has its five
            seconds of work, and no more than these on any.
    """

    def __init__(self, grader: str = "math-verify", patience: float = 1.0) -> None:
        self.grader, self._patience = grader, patience
        self.size = max(2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2)
        self._lock = threading.Lock()
        self._idle: list[_Child] = []
        self._all: set[_Child] = set()
        atexit.register(self.close)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._after_fork)

    def equal(self, pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
        """Whether the answers of each pair are equal; None for those that could not be judged in time.

        A pair gets five seconds. All of them together get ten seconds after the last verdict, and at most ten seconds
        plus 0.5 s each; time in which every child is still starting does not count.

        Args:
            pairs: Reference and predicted answer; none longer than `LONGEST_ANSWER`.

        Raises:
            RuntimeError: A child does not start: the grader's package cannot be imported.
        """
        verdicts: list[bool | None] = [None] * len(pairs)
        # Plain answers first: they must not wait for towers of powers.
        waiting = deque(sorted(range(len(pairs)), key=lambda i: _effort(*pairs[i])))
        tried_again: set[int] = set()
        children: list[_Child] = []
        each = SECONDS_PER_ANSWER * self._patience
        left = 2 * each + SECONDS_PER_ORDINARY_ANSWER * self._patience * len(pairs)  # seconds, of the whole call
        left_without_verdict = 2 * each
        try:
            with selectors.DefaultSelector() as selector:
                while waiting or any(child.pair is not None for child in children):
                    while len(children) < min(self.size, len(waiting) + sum(c.pair is not None for c in children)):
                        children.append(self._take())
                        selector.register(children[-1].answers, selectors.EVENT_READ, children[-1])
                    for child in children:
                        if child.ready and child.pair is None and waiting:
                            child.send(waiting.popleft(), pairs)
                    now, started = time.monotonic(), any(child.ready for child in children)
                    end = now + min(left, left_without_verdict) if started else float("inf")
                    until = min(end, *(child.deadline for child in children))
                    events = selector.select(max(0.0, until - now))
                    if started:
                        elapsed = time.monotonic() - now
                        left, left_without_verdict = left - elapsed, left_without_verdict - elapsed
                    for key, _ in events:
                        child = key.data
                        pair, verdict = child.receive()
                        if verdict in (EQUAL, DIFFERENT):
                            verdicts[pair], left_without_verdict = verdict == EQUAL, 2 * each
                        elif verdict == b"":  # it was ended: by a lack of memory, by somebody, or by its own alarm
                            self._end(child, children, selector)
                            if pair is None and not child.ready:
                                raise RuntimeError(
                                    f"{self.grader} did not start in {sys.executable}: see its error above"
                                )
                            if child.worked_too_long():
                                continue
                            self.close()  # whoever ended it may have ended those that wait, too
                            if pair is not None and pair not in tried_again:
                                tried_again.add(pair)
                                waiting.append(pair)
                    now = time.monotonic()
                    if min(left, left_without_verdict) <= 0:
                        break
                    for child in [c for c in children if now >= c.deadline]:
                        if not child.ready:
                            seconds = SECONDS_TO_START * self._patience
                            raise RuntimeError(f"{self.grader} did not start within {seconds:.0f} s")
                        self._end(child, children, selector)
            return verdicts
        finally:  # after an interrupt, too: a child that still owes an answer must never be asked again
            for child in children:
                self._give_back(child)

    def close(self) -> None:
        """End the children that wait for work."""
        with self._lock:
            idle, self._idle = self._idle, []
        for child in idle:
            child.end()

    def _take(self) -> _Child:
        with self._lock:
            child = self._idle.pop() if self._idle else _Child(self.grader, self._patience)
            self._all.add(child)
        return child

    def _give_back(self, child: _Child) -> None:
        with self._lock:
            keep = child.ready and child.pair is None and child.alive() and len(self._idle) < self.size
            if keep:
                self._idle.append(child)
            else:
                self._all.discard(child)
        if not keep:
            child.end()

    def _end(self, child: _Child, children: list[_Child], selector: selectors.BaseSelector) -> None:
        selector.unregister(child.answers)
        children.remove(child)
        with self._lock:
            self._all.discard(child)
        child.end()

    def _after_fork(self) -> None:
        for child in self._all:  # the children see the end of their input when the parent is gone, not when we are
            child.let_go()
        self._lock, self._idle, self._all = threading.Lock(), [], set()


# The child finds this very package, and after its own search path whatever else this process can import.
_ROOT = str(Path(__file__).parents[2])
_SERVE = """
import json, sys
root, *paths = json.loads(sys.argv[1])
sys.path.insert(0, root)
sys.path.extend(path for path in paths if path not in sys.path)
from vppo.grading.child import serve
serve()
"""


class _Child:
    """One process. `pair` is the index of the pair that it compares, None while it waits."""

    def __init__(self, grader: str = "math-verify", patience: float = 1.0) -> None:
        self._patience = patience
        limits = [str(SECONDS_PER_ANSWER * patience), str(SECONDS_PER_ANSWER), str(MEMORY_PER_PROCESS), grader]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _SERVE, json.dumps([_ROOT, *sys.path]), *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            process_group=0,  # Ctrl-C is the trainer's to handle
        )
        assert self._process.stdin and self._process.stdout
        self._requests, self.answers = self._process.stdin, self._process.stdout
        self.ready = False
        self.pair: int | None = None
        self.deadline = time.monotonic() + SECONDS_TO_START * patience

    def send(self, index: int, pairs: Sequence[tuple[str, str]]) -> None:
        self.pair = index
        self.deadline = time.monotonic() + SECONDS_PER_ANSWER * self._patience
        # A process that was ended while it waited breaks the pipe; `receive` sees that and the pair is sent again.
        with contextlib.suppress(BrokenPipeError):
            self._requests.write(json.dumps(pairs[index]).encode() + b"\n")

    def receive(self) -> tuple[int | None, bytes]:
        """The pair and the verdict on it, which is empty if the process has ended."""
        byte = self.answers.read(1) or b""
        pair = self.pair
        if byte:
            self.ready, self.pair, self.deadline = True, None, float("inf")
        return pair, byte

    def alive(self) -> bool:
        return self._process.poll() is None

    def worked_too_long(self) -> bool:
        """Whether it has ended because its five seconds of work were over."""
        return self._process.poll() == -signal.SIGPROF

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self.let_go()

    def let_go(self) -> None:
        for pipe in (self._requests, self.answers):
            pipe.close()


def _effort(reference: str, predicted: str) -> tuple[int, int]:
    """What sorts plain answers before those that may take long."""
    text = reference + predicted
    return sum(text.count(mark) for mark in ("^", "!", "**", r"\binom", r"\sum", r"\int", r"\prod")), len(text)
