"""What people read of an evaluation: page, tables and comparison, from stored answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from support.evaluations import store

from vppo.errors import InputError
from vppo.evaluation import run
from vppo.evaluation.comparison import compare_evaluations
from vppo.evaluation.published import PUBLISHED
from vppo.evaluation.report import headline, markdown, published, results, write_report
from vppo.evaluation.run import disagreements, read_evaluation, regrade

EIGHT = ["mathverse", "dynamath", "mmk12", "geo3k", "mathvision", "wemath", "logicvista", "mmmu_pro"]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return store(tmp_path_factory.mktemp("stored") / "first", sets=EIGHT)


def test_the_numbers_are_those_of_the_answers(stored: Any) -> None:
    answers, summary = stored.answers, stored.summary
    for name in EIGHT:
        seen = answers[(answers["benchmark"] == name) & (answers["view"] == "seen")]
        assert summary["benchmarks"][name]["accuracy"]["mean"] == pytest.approx(seen["correct"].mean())
        best = seen.groupby("question")["correct"].any().mean()
        assert summary["benchmarks"][name]["pass_at"]["4"]["mean"] == pytest.approx(best)
    means = [summary["benchmarks"][name]["accuracy"]["mean"] for name in EIGHT]
    assert summary["average"]["accuracy"]["mean"] == pytest.approx(sum(means) / 8)
    right = answers["text"].str.contains(r"\\boxed\{(?:12|0\.5|B|\\sqrt\{75\}|60|8)\}")
    assert (answers["correct"] == right).all()


def test_the_table(stored: Any) -> None:
    columns, rows = results(stored.summary)
    assert columns[:3] == ["avg@4 (95\N{NO-BREAK SPACE}%)", "pass@4", "blind"]
    assert [label for label, _ in rows][-2:] == ["MMMU-Pro", "average of the sets"]
    assert all(len(values) == len(columns) for _, values in rows)
    text = (stored.out / "results.md").read_text()
    assert text.count("\n") == 11 and "| Geo3k |" in text and "pass@4" in text
    assert markdown(["a|b"], [("x", ["1"])]) == "|  | a\\|b |\n| --- | ---: |\n| x | 1 |\n"
    assert "averaged over 8 sets" in headline(stored.summary) and "looking is worth" in headline(stored.summary)


def test_what_was_published_says_so(stored: Any, tmp_path: Path) -> None:
    page = (stored.out / "report.html").read_text()
    assert page.count("as published") >= len(PUBLISHED) and "not measured here" in page
    assert "57.5" in page and "this run, measured here" in page
    one = store(tmp_path / "one", sets=["geo3k"], subjects=False)
    page = (one.out / "report.html").read_text()
    assert "46.5" in page and "57.5" not in page and "By subject" not in page  # no average of eight beside one
    own = {**one.summary, "sets": {"geo3k": "geo3k"}}  # somebody's own file of that name
    assert published(own) is None and published(one.summary) is not None


def test_beside_the_published_average_stands_that_of_the_same_sets(stored: Any) -> None:
    summary = {**stored.summary, "sets": {**stored.summary["sets"], "mine": "mine"}}
    summary["benchmarks"] = {**summary["benchmarks"], "mine": {"accuracy": {"mean": 1.0}}}
    summary["average"] = {"accuracy": {"mean": 1.0}}  # which has one set more
    columns, ((_, values), *_) = published(summary)  # type: ignore[misc]
    assert columns[-1] == "average" and len(values) == len(columns) == 9
    assert values[-1] == f"{100 * stored.summary['average']['accuracy']['mean']:.1f}"


def test_every_knob_is_on_the_page(stored: Any) -> None:
    page = (stored.out / "report.html").read_text()
    for name in stored.summary["knobs"]:
        assert f"<dt>{name.replace('_', ' ')}</dt>" in page, name


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 420])
def test_the_page_fits(stored: Any, open_page: Callable[..., Any], scheme: str, width: int) -> None:
    page = open_page(stored.out / "report.html", viewport={"width": width, "height": 900}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator(".results table").count() >= 3
    shown = page.locator(".chart img").evaluate_all("all => all.every(one => one.complete && one.naturalWidth > 0)")
    assert shown
    if width == 1280:
        wide = page.locator(".results").first
        assert wide.evaluate("one => one.scrollWidth <= one.clientWidth")


def test_hostile_text_stays_text(stored: Any, tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>"
    summary = {
        **stored.summary,
        "model": bad,
        "warnings": [bad],
        "skipped": [{"benchmark": "geo3k", "question": 1, "reason": bad}],
        "knobs": {**stored.summary["knobs"], "graders": ["math-verify", "mathruler"]},
        "disagreements": [
            {"benchmark": "geo3k", "question": 1, "reference": bad, "answer": "x" * 5000, "math-verify": True,
             "mathruler": None, "answers": 3}
        ],
    }  # fmt: skip
    page = write_report(tmp_path, summary).read_text()
    assert bad not in page and page.count("&lt;script&gt;alert(1)") >= 4 and "x" * 200 not in page
    assert "undecided" in page


def test_graders_that_disagree_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    questions = pd.DataFrame({"benchmark": ["a"] * 2, "question": [0, 1], "reference": ["8 kg", "2"]})
    answers = pd.DataFrame(
        {
            "benchmark": "a",
            "question": [0, 0, 0, 1, 1],
            "answer": ["8", "8", "8.0", "2", None],
            "math-verify": pd.array([True, True, True, True, False], dtype="boolean"),
            "mathruler": pd.array([False, False, None, True, True], dtype="boolean"),
        }
    )
    found = disagreements(questions, answers, ["math-verify", "mathruler"])
    assert [(entry["answer"], entry["mathruler"], entry["answers"]) for entry in found] == [
        ("8", False, 2),
        ("8.0", None, 1),
    ]
    assert disagreements(questions, answers, ["math-verify"]) == []


# -- comparison --------------------------------------------------------------------------------------------------------


def test_two_runs(stored: Any, tmp_path: Path) -> None:
    better = store(tmp_path / "better", sets=EIGHT, skill=0.85, seed=1, model="other")
    found = compare_evaluations(stored.out, better.out, tmp_path / "both")
    assert json.loads((tmp_path / "both" / "eval_comparison.json").read_text()) == found
    for name in EIGHT:
        means = [
            run.groupby("question")["correct"].mean()
            for answers in (stored.answers, better.answers)
            for run in [answers[(answers["benchmark"] == name) & (answers["view"] == "seen")]]
        ]
        assert found["sets"][name]["difference"] == pytest.approx((means[1] - means[0]).mean())
    assert found["average"]["p"] < 0.001 and found["average"]["low"] > 0
    assert found["blind"]["questions"] == 8 * 12 and abs(found["blind"]["difference"]) < 0.2
    assert found["settings"]["model"] == ["some/model", "other"]
    page = (tmp_path / "both" / "report.html").read_text()
    assert "better is better than first by" in page and "MathVerse" in page


def test_a_run_beside_its_own_copy(stored: Any, tmp_path: Path) -> None:
    copy = store(tmp_path / "copy", sets=["geo3k", "wemath"], questions=8)
    other = store(tmp_path / "other", sets=["geo3k", "wemath"], questions=12, graders=("math-verify",))
    found = compare_evaluations(copy.out, other.out, tmp_path / "both")
    assert found["sets"]["geo3k"]["questions"] == 8  # those that both were asked
    assert found["sets"]["geo3k"]["difference"] == 0 and found["sets"]["geo3k"]["p"] == 1.0
    page = (tmp_path / "both" / "report.html").read_text()
    assert "are not told apart" in page


def test_what_cannot_be_compared(stored: Any, tmp_path: Path) -> None:
    def refused(message: str, first: Path, second: Path, out: Path = tmp_path / "out") -> None:
        with pytest.raises(InputError, match=message):
            compare_evaluations(first, second, out)

    other = store(tmp_path / "other", sets=["wemath"])
    one = store(tmp_path / "one", sets=["geo3k"])
    refused("twice, takes two evaluations", stored.out, stored.out)
    refused("share no question; takes evaluations on the same sets", one.out, other.out)
    refused("--out: .* is one of the evaluations", one.out, other.out, one.out)
    refused(r"nothing: is no folder; takes a folder that `vppo eval` has finished", one.out, tmp_path / "nothing")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "answers").mkdir()
    refused("has no summary.json, .*it holds the beginning of an evaluation", tmp_path / "begun", one.out)
    answers = other.out / "answers.parquet"
    pd.read_parquet(answers).drop(columns="correct").to_parquet(answers)
    refused("answers.parquet: has no column correct", other.out, one.out)
    answers.write_bytes(b"broken")
    refused("answers.parquet: is no whole parquet file", other.out, one.out)
    (other.out / "summary.json").write_text('{"model": "x"}')
    refused("summary.json: has no knobs, sets", other.out, one.out)


def test_grading_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing: is no folder; takes a folder that `vppo eval` has finished"):
        regrade(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_reading(stored: Any) -> None:
    summary, questions, answers = read_evaluation(stored.out)
    assert summary == stored.summary and len(questions) == 96
    assert list(answers.columns) == [*run.ANSWERS, "math-verify"]
