"""The page of a study, its figures and its table."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.study import run

from vppo.pages.plot import percent
from vppo.study.options import StudyOptions
from vppo.study.report import DASH, NBSP, difference, headline, plus_minus, results, show, write_report
from vppo.study.summary import summarise

ARMS = ("dapo", "tgf", "gate")


def study(out: Path, seeds: int = 3, task: str = "narrated") -> dict[str, Any]:
    options = StudyOptions(out, ARMS, seeds=seeds, task=task, steps=2)
    scores = {"dapo": 0.5, "tgf": 0.52, "gate": 0.48}
    runs = [run(arm, seed, scores[arm] + 0.02 * ((seed + len(arm)) % 3)) for seed in range(seeds) for arm in ARMS]
    if task == "guess":
        runs = [{**row, "guess_rate": 0.25} for row in runs]
    warm = [
        {"seed": seed, "steps": 400, "learned": seed > 0, "seconds": 60.0, "read_loss": 0.05, "computed_loss": 0.06,
         "sampled": 0.3, "reads": 0.4, "adds": 0.75, "greedy": 0.35} for seed in range(seeds)
    ]  # fmt: skip
    about = {"machine": "one", "versions": {"torch": "2"}, "date": "2026-11-27", "command": "vppo study --out <b>"}
    return {**summarise(options, runs), "warm": warm, **about}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study")
    return write_report(out, study(out))


def test_numbers_and_errors_as_a_person_writes_them() -> None:
    assert plus_minus({"mean": 0.402, "se": 0.012}, percent) == f"40.2{NBSP}%{NBSP}±{NBSP}1.2"
    assert plus_minus({"mean": 0.402, "se": None}, percent) == f"40.2{NBSP}%"
    assert difference({"mean": -0.015, "se": 0.012}).replace(NBSP, " ") == "\N{MINUS SIGN}1.5 ± 1.2"
    assert difference({"mean": 0.004, "se": None}) == "+0.4"
    assert difference(None) == "0"
    assert difference({"mean": None, "se": None}) == "–"  # noqa: RUF001


def test_the_table(tmp_path: Path) -> None:
    columns, rows = results(study(tmp_path))
    assert next(label for label, _ in rows).startswith("DAPO") and len(rows) == 3
    assert all(len(values) == len(columns) for _, values in rows)
    assert "guesses" not in columns
    assert rows[1][1][columns.index("reads minus DAPO")].startswith("+0.0")
    assert rows[1][1][columns.index("adds, having read")].startswith("90.0")
    columns, rows = results(study(tmp_path, task="guess"))
    assert rows[1][1][columns.index("guesses")].startswith("25.0")


def test_one_seed_shows_no_error(tmp_path: Path) -> None:
    summary = study(tmp_path, seeds=1)
    assert not any("±" in value for _, values in results(summary)[1] for value in values)
    assert "1 seed each" in headline(summary)
    write_report(tmp_path, summary)


def test_a_policy_that_reads_nothing_has_no_drift_there(tmp_path: Path) -> None:
    """As one that only guesses: NaN is measured, dashes are shown, and the figures leave the point out."""
    runs = [run(arm, seed, 0.5) for seed in range(2) for arm in ARMS]
    runs[1] |= {"drift_read": math.nan, "adds": math.nan}
    summary = {**study(tmp_path, seeds=2), **summarise(StudyOptions(tmp_path, ARMS, seeds=2, steps=2), runs)}
    json.dumps(summary, allow_nan=False)
    columns, rows = results(summary)
    for column in ("drift, read tokens", "adds, having read"):
        assert [values[columns.index(column)] == DASH for _, values in rows] == [False, True, False]
    write_report(tmp_path, summary)


def test_the_terminal_shows_every_arm(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=160)
    show(console, study(tmp_path))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(label in text for label, _ in results(study(tmp_path))[1])


def test_the_page_is_whole(page: Path) -> None:
    html = page.read_text()
    for text in ("Which tokens carry the learning", "seed 0, not learned", "seed 1", "vppo study --out &lt;b&gt;"):
        assert text in html
    assert "<b>" not in html and html.count("<figure") == 4
    assert (page.parent / "results.md").read_text().count("\n") == 2 + 3
    for name in ("difference", "drift", "products", "reward"):
        assert (page.parent / "figures" / f"{name}.png").exists()


def test_the_page_works_in_a_browser(page: Path, open_page: Callable[..., Any]) -> None:
    opened = open_page(page)
    assert opened.locator("tbody tr").count() == 3 + 3
    assert opened.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert all(opened.evaluate("[...document.images].map(image => image.naturalWidth > 0)"))
