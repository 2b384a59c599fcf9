"""Several analyses side by side: matched on what they share, and paired."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from support.analyses import write_analysis
from typer.testing import CliRunner

from vppo.analysis.comparison import compare, labelled, matched, paired, per_question
from vppo.analysis.folder import read_analysis
from vppo.analysis.perception import summarise_run
from vppo.cli import main
from vppo.errors import InputError


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two analyses whose first eight questions are the same."""
    parent = tmp_path_factory.mktemp("analyses")
    return [
        write_analysis(parent / "before", samples=8, length=40, responses=2, pictures=False),
        write_analysis(parent / "after", samples=10, length=40, seed=1, draws=1, pictures=False),
    ]


@pytest.fixture(scope="module")
def out(folders: list[Path]) -> Path:
    out = folders[0].parent / "comparison"
    assert compare(folders, out) == out / "report.html"
    return out


def test_runs_are_compared_on_the_questions_they_share(folders: list[Path], out: Path) -> None:
    result = json.loads((out / "comparison.json").read_text())
    assert result["matched_questions"] == 8
    before, after = (read_analysis(folder).runs[0] for folder in folders)
    cut = replace(
        after,
        tokens=after.tokens[after.tokens["sample"] < 8].reset_index(drop=True),
        trajectories=after.trajectories[after.trajectories["sample"] < 8].reset_index(drop=True),
    )
    assert result["runs"] == {"before": summarise_run(before), "after": summarise_run(cut)}
    html = (out / "report.html").read_text(encoding="utf-8")
    assert (
        "All numbers are of the 8 questions that every run answered; up to 2 that only some have are left out." in html
    )
    assert len(list((out / "figures").iterdir())) == 28


def test_pairs_are_of_questions(folders: list[Path]) -> None:
    first, other = (pd.read_parquet(folder / "trajectories.parquet") for folder in folders)
    means = [table.groupby("sample")["mean_dependency"].mean().astype(float)[:8] for table in (first, other)]
    gaps = (means[1] - means[0]).to_numpy()
    runs, _ = matched(labelled([read_analysis(folder) for folder in folders]))
    found = paired(*runs)
    assert found.questions == 8
    assert found.difference == pytest.approx(gaps.mean())
    assert found.rank_correlation == pytest.approx(means[0].corr(means[1], method="spearman"))
    drawn = np.random.default_rng(3).choice(gaps, (4000, 8)).mean(1)
    assert found.high - found.low == pytest.approx(np.ptp(np.quantile(drawn, [0.025, 0.975])), rel=0.15)
    assert found.low < found.difference < found.high
    assert (found.identical, np.isnan(found.kept_overlap)) == (0, True)
    assert per_question(runs).shape == (8, 2)


def test_kept_sets_are_compared_on_identical_responses(tmp_path: Path) -> None:
    """The same responses, scored again with other perturbations; one of them was cut."""
    first = write_analysis(tmp_path / "a", samples=4, length=30, pictures=False)
    second = Path(shutil.copytree(first, tmp_path / "b"))
    tokens = pd.read_parquet(second / "tokens.parquet")
    flipped = tokens.assign(kept=np.where(tokens["sample"] == 1, ~tokens["kept"], tokens["kept"]))
    flipped.loc[flipped["sample"] == 3, "token_id"] += 1
    flipped.to_parquet(second / "tokens.parquet")
    runs = labelled([read_analysis(path) for path in (first, second)])
    found = paired(*runs)
    assert found.identical == 3
    assert found.kept_overlap == pytest.approx(2 / 3)  # all, none, all
    assert (found.difference, found.low, found.high) == (0, 0, 0)
    shorter = replace(runs[1], tokens=runs[1].tokens[1:])
    assert paired(runs[0], shorter).identical == 2


def test_runs_without_a_common_question_are_shown_whole(tmp_path: Path) -> None:
    first = write_analysis(tmp_path / "a", samples=2, length=20, pictures=False)
    second = write_analysis(
        tmp_path / "b", samples=2, length=20, pictures=False, replace={s: (f"Else {s}?", ["4", "2"]) for s in (0, 1)}
    )
    html = compare([first, second], tmp_path / "out").read_text(encoding="utf-8")
    assert "The runs share no question" in html and "Beside a" not in html
    assert not (tmp_path / "out" / "figures" / "questions.png").exists()
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["against_the_first"] == {}


def test_labels_tell_folders_and_models_apart(tmp_path: Path) -> None:
    paths = [tmp_path / "x" / "run", tmp_path / "y" / "run", tmp_path / "z" / "other"]
    for path in paths:
        models = ("m1", "m2") if path.name == "other" else ("m1",)
        write_analysis(path, samples=1, length=10, models=models, pictures=False)
    analyses = [read_analysis(path) for path in paths]
    assert [run.label for run in labelled(analyses)] == ["x/run", "y/run", "z/other: m1", "z/other: m2"]
    assert [run.label for run in labelled(analyses[1:])] == ["run", "other: m1", "other: m2"]


def test_the_page_in_a_browser(out: Path, open_page: Callable[..., Any]) -> None:
    for scheme in ("light", "dark"):
        for width in (1280, 420):
            page = open_page(out / "report.html", color_scheme=scheme, viewport={"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator("thead").first.locator("th").all_text_contents() == ["before", "after"]
    rows = dict(
        zip(
            page.locator("tbody th").all_text_contents(),
            [row.locator("td").all_text_contents() for row in page.locator("tbody tr").all()],
            strict=True,
        )
    )
    numbers = json.loads((out / "comparison.json").read_text())["runs"]
    assert rows["responses"] == ["16", "8"]
    assert rows["Gini coefficient"] == [f"{run['gini']:.2f}" for run in numbers.values()]
    assert rows["draws"] == ["4", "1"] and rows["seed"] == ["0", "1"]  # what was run differently
    assert "keep ratio" not in rows
    assert rows["kept by one draw as by the mean"][1] == "–"  # noqa: RUF001
    assert page.locator(".chart").count() == 14


def test_the_command(folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vppo.analysis.comparison.perception_plots", lambda runs: [])  # drawing takes seconds
    result = CliRunner().invoke(main, ["compare", *map(str, folders), "--out", str(tmp_path / "c")])
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'c' / 'report.html'}\n"


def test_what_cannot_be_compared_is_named(folders: list[Path], tmp_path: Path) -> None:
    for arguments, message in [
        (([folders[0]], tmp_path), "compare: got 1 run, takes two or more"),
        (([folders[0], folders[0]], tmp_path), f"compare: got {folders[0].resolve()} twice"),
        ((folders, folders[1]), f"--out: got {folders[1]}, which is one of the analyses"),
        (([folders[0], tmp_path], tmp_path / "c"), f"{tmp_path}: has no summary.json"),
    ]:
        with pytest.raises(InputError, match=re.escape(message)):
            compare(*arguments)
    assert not list(tmp_path.iterdir())
    result = CliRunner().invoke(main, ["compare", str(folders[0])])
    assert result.exit_code == 2 and result.stderr.startswith("Error: compare: got 1 run")
