import threading
import time
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from vppo.rewards import accuracy, accuracy_reward, last_boxed


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
    assert time.monotonic() - start < 60  # it would take for ever without the bound
    assert reward(r"\boxed{\frac{10}{4}}", "2.5") == 1.0


def test_a_batch_is_graded_quickly() -> None:
    assert reward(r"\boxed{1/3}", "2") == 0.0  # the verifier is started
    accuracy._verdicts.clear()
    completions = [rf"{i} \boxed{{{i * 7 % 28}}}" for i in range(128)]
    start = time.monotonic()
    graded = accuracy_reward(completions, [str(i % 27) for i in range(128)])
    assert time.monotonic() - start < 1.0  # 0.1 s measured on a quiet machine
    assert graded == [float(i * 7 % 28 == i % 27) for i in range(128)]


@pytest.mark.parametrize("role", ["user", "tool", "system"])
def test_only_the_assistant_answers(role: str) -> None:
    tool_knows = [
        {"role": "assistant", "content": "let me look it up"},
        {"role": role, "content": r"\boxed{5}"},
        {"role": "assistant", "content": [{"type": "text", "text": "I do not know"}]},
    ]
    assert reward(tool_knows, "5") == 0.0
    assert reward([{"role": "assistant", "content": r"\boxed{5}"}, {"role": role, "content": r"\boxed{6}"}], "5") == 1.0
    assert reward([*tool_knows, {"role": "assistant", "content": r"\boxed{5}"}], "5") == 1.0


def test_a_box_does_not_span_messages() -> None:
    halves = [{"role": "assistant", "content": r"\boxed{5"}, {"role": "user", "content": "}"}]
    assert reward(halves, "5") == 0.0


@pytest.mark.parametrize(
    "completion",
    [
        None,
        5,
        5.0,
        "",
        [],
        [None],
        [5],
        {"role": "assistant"},
        [{"role": "assistant"}],
        [{"role": "assistant", "content": 5}],
        [{"role": "assistant", "content": {"text": 5}}],
        [{"role": "assistant", "content": [None, 5, {"type": "image"}, {"type": "text", "text": None}]}],
        [{"role": "assistant", "content": [{"type": "text", "text": ["a"]}], "tool_calls": [{}]}],
        "x" * 1_000_000,
        r"\boxed{" * 100_000,
        r"\boxed{" + "{" * 100_000 + "}" * 100_000 + "}",
        r"\boxed{" + "{" * 900 + "5" + "}" * 900,
        r"\boxed{" + "(" * 900 + "}",
        r"\boxed{" + "(" * 300 + "6" + ")" * 300 + "}",
        r"\boxed{" + r"\frac{1}{" * 150 + "2" + "}" * 150 + "}",
        r"\boxed{" + r"\sqrt{" * 200 + "2" + "}" * 200 + "}",
        r"\boxed{" + "1+" * 900 + "1}",
        r"\boxed{" + "a" * 1_900 + "}",
        r"\boxed{6 " + "a" * 1_900 + "!}",
        r"\boxed{" + "1," * 900 + "}",
        r"\boxed{" + "9" * 1_900 + "}",
        r"\boxed{" + "9" * 1_000_000 + "}",
        r"\boxed{" + r"\text{" * 300 + "}" * 300 + "}",
        "\\boxed{\x00}",
        "\\boxed{6\x00}",
        "\\boxed{\ud800}",
        "\\boxed{6\udfff}",
        "\\boxed{\n\n}",
        r"\boxed{1e999999999}",
        r"\boxed{__import__('os').system('touch /tmp/owned')}",
        r"\boxed{\%\$\#\&}",
    ],
    ids=lambda completion: repr(completion)[:30] if len(repr(completion)) < 200 else None,
)
@pytest.mark.filterwarnings("ignore:.*could not be compared:RuntimeWarning")
def test_any_completion_gets_a_reward_in_bounded_time(completion: object) -> None:
    start = time.monotonic()
    assert reward(completion, "5") == 0.0
    assert time.monotonic() - start < 60  # it would take for ever without the bound


def test_long_equal_answers_are_equal() -> None:
    text = "word " * 10_000
    assert reward(rf"\boxed{{{text}}}", text) == 1.0


@pytest.mark.parametrize(
    "answer",
    [
        {"a": 1},
        ["a", "b"],
        [],
        float("nan"),
        None,
        "",
        "  ",
        r"\boxed{}",
        "$$",
        b"5",
        {5},
        [None],
        range(2),
        np.array(["a", "b"]),
        np.float32("nan"),
    ],
    ids=repr,
)
def test_an_answer_that_nothing_can_meet_is_an_error(answer: object) -> None:
    with pytest.raises(ValueError, match=r"answer: got .* in row 1, takes text or a number"):
        accuracy_reward([r"\boxed{5}", r"\boxed{5}"], ["5", answer])


@pytest.mark.parametrize(
    ("answer", "met_by"),
    [
        (5, "5"),
        (0.00005, "0.00005"),
        (1e22, "10^{22}"),
        (["B"], "B) 30"),
        (np.float32(0.5), r"\frac12"),
        (np.int64(7), "7"),
        (Fraction(1, 3), r"\frac{1}{3}"),
        (Decimal("0.10"), "0.1"),
        (np.array(5), "5"),
        (np.array(["B"]), "(B)"),
        (torch.tensor(5), "5"),
        (True, "true"),
        (float("inf"), r"\infty"),
        (-float("inf"), r"-\infty"),
    ],
)
def test_numbers_as_answers(answer: object, met_by: str) -> None:
    assert reward(rf"\boxed{{{met_by}}}", answer) == 1.0
    assert reward(r"\boxed{17}", answer) == 0.0


def test_one_text_is_no_list_of_answers() -> None:
    with pytest.raises(TypeError, match="answer: got the text '55', takes a list"):
        accuracy_reward([r"\boxed{5}", r"\boxed{5}"], "55")
