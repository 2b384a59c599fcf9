import threading
import time

import pytest

from vppo import rewards
from vppo.rewards import accuracy_reward, last_boxed


def reward(completion: object, answer: object) -> float:
    return accuracy_reward([completion], [answer])[0]


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"so \boxed{9}.", "9"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}} done}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\left\{1, 2\right\}}", r"\left\{1, 2\right\}"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed {4}", "4"),
        (r"\boxed{ 5 }", "5"),
        (r"\boxed{}", ""),
        (r"\boxed 7", None),
        (r"\boxed{7", None),
        (r"\boxed{7} then \boxed{8", None),
        ("\\boxed{7\\", None),
        ("7", None),
    ],
)
def test_last_boxed(text: str, boxed: str | None) -> None:
    assert last_boxed(text) == boxed


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        (r"\boxed{9}", "9", 1.0),
        (r"\boxed{10}", "9", 0.0),
        ("9", "9", 0.0),
        (r"\boxed{}", "9", 0.0),
        (r"\boxed{0.5}", r"\frac{1}{2}", 1.0),
        (r"\boxed{\frac12}", r"$\frac{1}{2}$", 1.0),
        (r"\boxed{\frac12}", r"\boxed{0.5}", 1.0),
        (r"\boxed{1,000}", 1000, 1.0),
        (r"\boxed{2^{1/2}}", r"\sqrt{2}", 1.0),
        (r"\boxed{\text{B}}", "B", 1.0),
        (r"\boxed{B}", "C", 0.0),
        (r"\boxed{3+5+1=9}", "9", 1.0),
        (r"\boxed{no LaTeX } here \{}", "9", 0.0),
        ([{"role": "assistant", "content": r"\boxed{9}"}], "9", 1.0),
        ([{"role": "assistant", "content": [{"type": "text", "text": r"\boxed{9}"}]}], "9", 1.0),
        ([{"role": "assistant", "content": None}], "9", 0.0),
    ],
)
def test_reward(completion: object, answer: object, expected: float) -> None:
    assert reward(completion, answer) == expected


def test_one_answer_per_completion() -> None:
    with pytest.raises(ValueError, match="answer must have one entry per completion: got 1 for 2"):
        accuracy_reward(["a", "b"], ["a"])


def test_works_in_a_worker_thread() -> None:
    results: list[float] = []
    worker = threading.Thread(target=lambda: results.extend(accuracy_reward([r"\boxed{0.25}"], [r"\frac{1}{4}"])))
    worker.start()
    worker.join(timeout=30)
    assert results == [1.0]


def test_an_endless_comparison_is_wrong_and_the_next_one_still_works() -> None:
    start = time.monotonic()
    assert reward(r"\boxed{9^{9^{9^{9}}}}", "5") == 0.0
    assert time.monotonic() - start < 2 * rewards.SECONDS_PER_ANSWER + 5
    assert reward(r"\boxed{\frac{10}{4}}", "2.5") == 1.0


def test_a_batch_is_graded_quickly() -> None:
    assert reward(r"\boxed{1/3}", "2") == 0.0  # the verifier is started
    rewards._verdicts.clear()
    completions = [rf"{i} \boxed{{{i * 7 % 28}}}" for i in range(128)]
    start = time.monotonic()
    graded = accuracy_reward(completions, [str(i % 27) for i in range(128)])
    assert time.monotonic() - start < 1.0  # 0.1 s measured on a quiet machine
    assert graded == [float(i * 7 % 28 == i % 27) for i in range(128)]
