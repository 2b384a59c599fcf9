"""Broken folders: the message names the file and what is missing."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from support.analyses import write_analysis

from vppo.analysis.comparison import compare
from vppo.analysis.folder import read_analysis
from vppo.analysis.report import write_analysis_pages
from vppo.errors import InputError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    five = {0: ("What?", ["a", " b", "c", "d", "e"])}
    out = tmp_path_factory.mktemp("analysis")
    return write_analysis(out, samples=3, length=20, models=("b", "a"), replace=five, pictures=False)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "analysis"))


def change(name: str, edit: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable[[Path], Any]:
    """Rewrites a table of the folder."""
    return lambda folder: edit(pd.read_parquet(folder / name)).to_parquet(folder / name)


def settings(**changed: Any) -> Callable[[Path], Any]:
    """Rewrites entries of the summary."""

    def edit(folder: Path) -> None:
        file = folder / "summary.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changed))

    return edit


TOKENS, TRAJECTORIES = "tokens.parquet", "trajectories.parquet"
BROKEN: list[tuple[Callable[[Path], Any], str]] = [
    (shutil.rmtree, "analysis: is no folder; takes one that `vppo analyze` wrote"),
    (
        lambda f: (f / TOKENS).unlink(),
        "tokens.parquet: does not exist; takes a folder that `vppo analyze` has finished",
    ),
    (lambda f: (f / TRAJECTORIES).unlink(), "trajectories.parquet: does not exist"),
    (lambda f: (f / "summary.json").unlink(), "summary.json: does not exist"),
    (lambda f: (f / "summary.json").write_text("{"), "summary.json: is no JSON"),
    (lambda f: (f / "summary.json").write_text("[]"), "summary.json: got a list, takes an object"),
    (lambda f: (f / "summary.json").write_text(""), "summary.json: is no JSON"),
    (lambda f: (f / "summary.json").write_text("[" * 100_000), "summary.json: is no JSON of ours (nested too deeply)"),
    (lambda f: (f / "summary.json").write_bytes(b"\xff\xfe"), "summary.json: is no JSON ('utf-8'"),
    (lambda f: (f / "summary.json").write_text('{"draws": 1}'), "summary.json: has no keep_ratio; takes one that"),
    (settings(keep_ratio=True), "summary.json: keep_ratio: got True, takes a number above 0 and at most 1"),
    (settings(divergence=["kl"]), "summary.json: divergence: got ['kl'], takes one of kl"),
    (settings(draws="four"), "summary.json: draws: got 'four', takes a whole number from 1"),
    (settings(skipped=[1]), "summary.json: skipped: takes a list of objects"),
    (lambda f: (f / TOKENS).write_bytes((f / TOKENS).read_bytes()[:-40]), "tokens.parquet: is no parquet file (Could"),
    (lambda f: (f / TOKENS).write_bytes(b""), "tokens.parquet: is no parquet file ("),
    (change(TOKENS, lambda t: t.assign(sample="0")), "tokens.parquet: column sample: got str, takes whole numbers"),
    (change(TOKENS, lambda t: t.assign(kept=1.0)), "tokens.parquet: column kept: got float64, takes true and false"),
    (
        change(TRAJECTORIES, lambda t: t.assign(correct="yes")),
        "trajectories.parquet: column correct: got str, takes true, false and nothing",
    ),
    (settings(keep_ratio=0), "summary.json: keep_ratio: got 0, takes a number above 0 and at most 1"),
    (settings(divergence="tv"), "summary.json: divergence: got 'tv', takes one of kl, reverse_kl, jsd, k3"),
    (lambda f: (f / TOKENS).write_bytes(b"PAR1 no"), "tokens.parquet: is no parquet file"),
    (
        change(TOKENS, lambda t: t.drop(columns=["kl", "jsd"])),
        "tokens.parquet: has no column kl, jsd; takes all of model,",
    ),
    (
        change(TRAJECTORIES, lambda t: t.drop(columns="image")),
        "trajectories.parquet: has no column image; takes all of",
    ),
    (change(TOKENS, lambda t: t[:0]), "tokens.parquet: has no rows; nothing was analysed"),
    (change(TRAJECTORIES, lambda t: t[:0]), "trajectories.parquet: has no rows; nothing was analysed"),
    (change(TOKENS, lambda t: t.assign(k3="x")), "tokens.parquet: column k3: got str, takes numbers"),
    (
        change(TOKENS, lambda t: t[:5].assign(kl=[1, 2, np.inf, 3, 4])),
        "column kl: 1 of 5 rows are not finite",
    ),
    (
        change(TRAJECTORIES, lambda t: t.assign(question=None)),
        "trajectories.parquet: column question: row 0 is no text",
    ),
    (
        change(TOKENS, lambda t: t[1:]),
        "response 0 of sample 0 of model 'b' has 5 tokens by trajectories.parquet, 4 rows",
    ),
    (change(TOKENS, lambda t: t[t["model"] == "a"]), "model 'b' has 5 tokens by trajectories.parquet, 0 rows"),
    (change(TRAJECTORIES, lambda t: t[1:]), "of model 'b' has 0 tokens by trajectories.parquet, 5 rows"),
    (
        change(TOKENS, lambda t: t.assign(position=t["position"] + 1)),
        "has positions in tokens.parquet that are not 0 to",
    ),
    (change(TRAJECTORIES, lambda t: pd.concat([t, t])), "trajectories.parquet: row 6 repeats a response"),
]


@pytest.mark.parametrize(("break_it", "message"), BROKEN, ids=[message[:60] for _, message in BROKEN])
def test_a_broken_folder_is_named(folder: Path, break_it: Callable[[Path], Any], message: str) -> None:
    break_it(folder)
    with pytest.raises(InputError, match=re.escape(message)):
        write_analysis_pages(folder)
    assert not (folder / "figures").exists()


def holding(*names: str) -> Callable[[Path], None]:
    """Makes a folder with these files and folders."""

    def make(folder: Path) -> None:
        for name in names:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix:
                path.write_text("{}")
            else:
                path.mkdir()

    return make


OTHERS: list[tuple[Callable[[Path], Any], str]] = [
    (holding("options.json", "summary.json", "held_out.parquet", "warmup"), "this is a run of `vppo demo`: vppo"),
    (holding("options.json", "parts"), "this is the beginning of an analysis: the command that began it goes on with"),
    (holding("comparison.json", "report.html"), "this holds a comparison of analyses"),
    (holding("checkpoint-5/trainer_state.json"), "this holds a training run"),
    (holding("config.json", "model.safetensors"), "this holds a model"),
    (holding("thesis.tex"), "this holds other files"),
    (Path.mkdir, "this holds nothing"),
]


@pytest.mark.parametrize(("make", "message"), OTHERS, ids=[message[:40] for _, message in OTHERS])
def test_a_folder_of_another_kind_is_named_with_what_it_lacks(
    whole: Path, tmp_path: Path, make: Callable[[Path], Any], message: str
) -> None:
    other = tmp_path / "other"
    make(other)
    with pytest.raises(InputError, match=re.escape(message)) as raised:
        compare([whole, other], tmp_path / "comparison")
    assert f"{other}: has no " in str(raised.value) and "tokens.parquet, trajectories.parquet" in str(raised.value)
    assert not (tmp_path / "comparison").exists()


def test_any_truncated_or_damaged_table_is_an_input_error(whole: Path, tmp_path: Path) -> None:
    content = (whole / TOKENS).read_bytes()
    rng = np.random.default_rng(0)
    damaged = [content[:end] for end in rng.integers(0, len(content), 20)]
    for _ in range(60):
        changed = bytearray(content)
        for place in rng.integers(0, len(content), 8):
            changed[place] = rng.integers(256)
        damaged.append(bytes(changed))
    folder, refused = Path(shutil.copytree(whole, tmp_path / "analysis")), 0
    for broken in damaged:
        (folder / TOKENS).write_bytes(broken)
        try:
            read_analysis(folder)
        except InputError:
            refused += 1
    assert refused >= 40  # damage that only changes a number cannot be seen


def test_a_whole_folder_is_read(whole: Path) -> None:
    found = read_analysis(whole)
    assert [run.label for run in found.runs] == ["b", "a"]  # as they stand, not by the alphabet
    assert sum(len(run.tokens) for run in found.runs) == len(pd.read_parquet(whole / TOKENS))
    assert {(run.keep_ratio, run.draws) for run in found.runs} == {(0.4, 4)}


def test_more_columns_and_another_order_do_no_harm(folder: Path, whole: Path) -> None:
    change(TOKENS, lambda t: t.sample(frac=1, random_state=0).assign(more=1))(folder)
    for found, expected in zip(read_analysis(folder).runs, read_analysis(whole).runs, strict=True):
        pd.testing.assert_frame_equal(found.tokens.drop(columns="more"), expected.tokens)


def test_one_draw_and_no_reference_are_whole(tmp_path: Path) -> None:
    (run,) = read_analysis(write_analysis(tmp_path, samples=2, draws=1, judged=False, pictures=False)).runs
    assert run.tokens["dependency_se"].isna().all()
    assert run.trajectories["correct"].isna().all()
