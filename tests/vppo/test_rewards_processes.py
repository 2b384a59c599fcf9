"""The processes that compare answers: time, memory, interrupts, threads, forks and the end."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vppo.grading import pool as pools
from vppo.grading.pool import VerifierPool
from vppo.rewards import accuracy, accuracy_reward, equal_answers

TOWER = r"{}^{{9^{{9^{{9}}}}}}"


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    pool = VerifierPool()
    yield pool
    pool.close()


def processes(pool: VerifierPool) -> list[int]:
    return [child._process.pid for child in pool._idle]


def running(pid: int) -> bool:
    """Whether there is such a process, a zombie included."""
    return Path(f"/proc/{pid}").exists()


def gone(pid: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True  # a child of a killed process is for the init process to reap
        time.sleep(0.05)
    return False


@pytest.mark.slow
def test_slow_answers_share_a_bound_and_plain_ones_do_not_wait_for_them(pool: VerifierPool) -> None:
    pool.equal([("1/2", "x")])  # started
    plain = [(str(i), f"{2 * i}/2") for i in range(40)]
    start = time.monotonic()
    verdicts = pool.equal([("5", TOWER.format(i)) for i in range(2, 10)] + plain)
    assert time.monotonic() - start < 8 * pools.SECONDS_PER_ANSWER  # what the slow ones take one after the other
    assert verdicts == [None] * 8 + [True] * 40


def test_what_was_not_judged_in_time_is_judged_again(monkeypatch: pytest.MonkeyPatch) -> None:
    equal_answers([("1", "2")])
    monkeypatch.setattr(pools, "SECONDS_PER_ANSWER", 0.0)
    pair = (r"\sqrt{50}", r"5\sqrt{2}")
    with pytest.warns(RuntimeWarning, match=r"^1 of 1 answers could not be compared"):
        assert equal_answers([pair]) == [False]
    monkeypatch.undo()
    assert equal_answers([pair]) == [True]


def test_a_batch_warns_once_and_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    equal_answers([("1", "2")])
    monkeypatch.setattr(pools, "SECONDS_PER_ANSWER", 0.0)
    with pytest.warns(RuntimeWarning) as caught:
        accuracy_reward([rf"\boxed{{{i}\sqrt{{7}}}}" for i in range(3)], [rf"\sqrt{{{i}}}" for i in range(3)])
    assert [str(w.message).split(" answers")[0] for w in caught] == ["3 of 3"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_after_an_interrupt_every_verdict_is_its_own(
    pool: VerifierPool, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    pool.equal([("1", "x")])

    def interrupted(child: pools._Child) -> None:
        raise error

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(pools._Child, "receive", interrupted)
        pool.equal([("1/2", "0.5"), (r"\sqrt 2", "x+1")])
    pairs = [(str(i), str(i + i % 2)) for i in range(12)]
    assert pool.equal(pairs) == [i % 2 == 0 for i in range(12)]


def test_a_real_interrupt(tmp_path: Path) -> None:
    program = """
import os, signal, threading, warnings
from vppo.rewards import accuracy_reward
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
accuracy_reward([r"\\boxed{1}"], ["x"])
threading.Timer(0.7, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    accuracy_reward([r"\\boxed{9^{9^{9^{9}}}}"], ["5"])
except KeyboardInterrupt:
    print("interrupted")
print(accuracy_reward([rf"\\boxed{{{i}}}" for i in range(8)], [str(i + i % 2) + ".0" for i in range(8)]))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.stdout.splitlines() == ["interrupted", str([1.0, 0.0] * 4)], result.stderr


def test_processes_that_were_killed_are_replaced(pool: VerifierPool) -> None:
    pool.close()
    for _ in range(2):  # two that wait: the second must not be asked in the place of the first
        child = pools._Child()
        child.receive()
        pool._idle.append(child)
    for pid in processes(pool):
        os.kill(pid, signal.SIGKILL)
    assert pool.equal([("1/2", "0.5")]) == [True]


def test_a_process_killed_while_it_is_written_to_is_replaced(
    pool: VerifierPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool.equal([("1/2", "0.5")])
    pid = processes(pool)[-1]  # the next to be taken
    send = pools._Child.send

    def killed_first(child: pools._Child, index: int, pairs: list[tuple[str, str]]) -> None:
        if child._process.pid == pid:
            os.kill(pid, signal.SIGKILL)
            child._process.wait()
        send(child, index, pairs)

    monkeypatch.setattr(pools._Child, "send", killed_first)
    assert pool.equal([("1/2", "0.5")]) == [True]


def test_a_process_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = VerifierPool()
    monkeypatch.setattr(pools, "_SERVE", "raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="math-verify did not start"):
        pool.equal([("1/2", "0.5")])


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited on Linux")
def test_memory_is_limited(pool: VerifierPool) -> None:
    pool.equal([("1", "x")])
    for pid in processes(pool):
        limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
        (line,) = [line for line in limits if line.startswith("Max address space")]
        assert str(pools.MEMORY_PER_PROCESS) in line


def test_threads_get_their_own_verdicts(pool: VerifierPool) -> None:
    results: dict[int, list[bool | None]] = {}

    def work(name: int) -> None:
        results[name] = pool.equal([(str(i), str(i * (1 + (i % 4 == name)))) for i in range(1, 30)])

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert results == {name: [i % 4 != name for i in range(1, 30)] for name in range(4)}
    assert len(processes(pool)) <= pool.size


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_has_children_of_its_own() -> None:
    program = """
import os
from vppo.rewards import accuracy
print(accuracy.accuracy_reward([r"\\boxed{0.5}"], [r"\\frac12"]), flush=True)
before = {c._process.pid for c in accuracy._pool._idle}
forked = os.fork()
pairs = [rf"\\boxed{{{i}.0}}" for i in range(9)], [str(i + i % 2) for i in range(9)]
verdicts = accuracy.accuracy_reward(*pairs)
own = {c._process.pid for c in accuracy._pool._idle}
assert verdicts == [1.0, 0.0] * 4 + [1.0], verdicts
if forked == 0:
    assert own and not own & before
    accuracy._pool.close()
    os._exit(0)
assert os.waitpid(forked, 0)[1] == 0
print("both", flush=True)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.stdout.splitlines() == ["[1.0]", "both"], result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("end", ["exit", "SIGKILL", "SIGKILL with a forked process left", "SIGKILL while it compares"])
def test_nothing_is_left_of_the_processes(end: str) -> None:
    program = """
import json, os, sys, time, threading
from vppo.rewards import accuracy
accuracy.equal_answers([("1/2", "x"), ("1/3", "y")])
children = [c._process.pid for c in accuracy._pool._idle]
if "forked" in sys.argv[1] and os.fork() == 0:
    sys.stdout.close(); os.close(1); os.close(2); time.sleep(20); os._exit(0)
if "compares" in sys.argv[1]:
    threading.Timer(0.3, lambda: print(json.dumps(children), flush=True)).start()
    accuracy.equal_answers([("5", r"9^{9^{9^{9}}}"), ("5", r"8^{9^{9^{9}}}")])
print(json.dumps(children), flush=True)
if sys.argv[1] != "exit":
    time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", program, end], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    children = json.loads(parent.stdout.readline())
    assert children
    if end == "exit":
        assert parent.wait(timeout=30) == 0
        assert not any(running(pid) for pid in children)  # ended and reaped
    else:
        assert all(running(pid) for pid in children)
        parent.kill()
        parent.wait(timeout=30)
        assert all(gone(pid, seconds=pools.SECONDS_PER_ANSWER + 5) for pid in children)


def test_the_newest_verdicts_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "_REMEMBERED", 3)
    equal_answers([("7", f"{i}.5") for i in range(5)])
    assert list(accuracy._verdicts) == [("7", "2.5"), ("7", "3.5"), ("7", "4.5")]
