"""Several analyses side by side: the same figures over each other, a table, and what their shared questions say."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from vppo.analysis.figures import perception_plots
from vppo.analysis.folder import AnalysisFolder, read_analysis
from vppo.analysis.perception import (
    RESPONSE,
    Run,
    json_ready,
    overlap,
    rank_correlation,
    resampling_weights,
    response_starts,
    summarise_run,
)
from vppo.analysis.report import comparison_table, headline_of_several
from vppo.errors import InputError
from vppo.files import write_atomic
from vppo.pages.page import render, write_figures
from vppo.pages.plot import DASHED, Plot, nats, percent, prepare
from vppo.pages.theme import Theme, series_colours

QUESTION = ["sample", "question"]  # what names a question: the row of the data, and its text
_OUTCOMES = ("numbers", "skipped", "questions", "scored", "tokens", "machine")  # no settings of a run


@dataclass(frozen=True)
class Paired:
    """A run beside the first one, on what they share.

    Attributes:
        questions: How many both answered.
        difference: Mean over these of the run's mean dependency minus the first's; nats.
        low, high: Its 95 % interval, from a bootstrap over the questions.
        rank_correlation: Of the two runs' mean dependencies of the questions; NaN where one is constant.
        identical: Responses of the same tokens to the same question, under the same number.
        kept_overlap: Share of the first's kept tokens in these that the run keeps too; NaN without any.
    """

    questions: int
    difference: float
    low: float
    high: float
    rank_correlation: float
    identical: int
    kept_overlap: float


def compare(folders: Sequence[Path], out: Path) -> Path:
    """Writes `report.html`, `figures/*.png` and `comparison.json` about several analyses.

    Runs that share questions are compared on those alone.

    Args:
        folders: Folders that `vppo analyze` wrote; each model in one is a run of its own.
        out: Where to write.

    Returns:
        The path of the page.

    Raises:
        InputError: There are fewer than two runs, or a folder is not whole; the message names it.
    """
    analyses = [read_analysis(path) for path in folders]
    everything = labelled(analyses)
    if len(everything) < 2:
        raise InputError(f"compare: got {len(everything)} run, takes two or more: folders, or one with several models")
    if out.resolve() in [path.resolve() for path in folders]:
        raise InputError(f"--out: got {out}, which is one of the analyses; takes another folder")
    runs, shared = matched(everything)
    numbers = {run.label: summarise_run(run) for run in runs}
    pairs = {run.label: paired(runs[0], run) for run in runs[1:]} if shared else {}
    plots = perception_plots(runs) + ([question_plot(runs)] if shared else [])
    result = {
        "matched_questions": shared,
        "runs": numbers,
        "against_the_first": {label: json_ready(asdict(pair)) for label, pair in pairs.items()},
    }
    write_atomic(out / "comparison.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    page = render(
        "comparison.html",
        labels=list(numbers),
        headline=headline_of_several(numbers),
        matching=_matching(everything, shared),
        settings=settings(analyses),
        table=comparison_table(numbers),
        first=runs[0].label,
        pairs=paired_table(pairs),
        charts=write_figures(out, plots),
    )
    return write_atomic(out / "report.html", page)


def labelled(analyses: Sequence[AnalysisFolder]) -> list[Run]:
    """All runs, named after their folders: by as much of the path as tells them apart, and by model if it has several.

    Raises:
        InputError: A folder is named twice.
    """
    paths = [analysis.path.resolve() for analysis in analyses]
    for path in paths:
        if paths.count(path) > 1:
            raise InputError(f"compare: got {path} twice, takes each analysis once")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    runs = []
    for analysis, path in zip(analyses, paths, strict=True):
        name = "/".join(path.parts[-depth:])
        several = len(analysis.runs) > 1
        runs += [replace(run, label=f"{name}: {run.label}" if several else name) for run in analysis.runs]
    return runs


def matched(runs: Sequence[Run]) -> tuple[list[Run], int]:
    """The runs on the questions that all of them answered, and how many these are; whole and 0 if there are none."""
    keys = [set(run.trajectories[QUESTION].itertuples(index=False, name=None)) for run in runs]
    shared = set.intersection(*keys)
    if not shared:
        return list(runs), 0
    samples = {sample for sample, _ in shared}
    return [
        replace(
            run,
            tokens=run.tokens[run.tokens["sample"].isin(samples)].reset_index(drop=True),
            trajectories=run.trajectories[run.trajectories["sample"].isin(samples)].reset_index(drop=True),
        )
        for run in runs
    ], len(shared)


def paired(first: Run, other: Run) -> Paired:
    """Two runs on the same questions; see `Paired`."""
    means = per_question([first, other])
    differences = (means.iloc[:, 1] - means.iloc[:, 0]).to_numpy()
    resampled = resampling_weights(len(differences)) @ differences / len(differences)
    low, high = np.quantile(resampled, [0.025, 0.975]).tolist()
    identical, kept_overlap = _on_identical_responses(first.tokens, other.tokens)
    return Paired(
        questions=len(means),
        difference=float(differences.mean()),
        low=low,
        high=high,
        rank_correlation=rank_correlation(means.iloc[:, 0], means.iloc[:, 1]),
        identical=identical,
        kept_overlap=kept_overlap,
    )


def per_question(runs: Sequence[Run]) -> pd.DataFrame:
    """Mean of the responses' mean dependency, a row a question that all runs share, a column a run."""
    columns = [run.trajectories.groupby(QUESTION)["mean_dependency"].mean().astype(np.float64) for run in runs]
    return pd.concat(columns, axis=1, join="inner", keys=[run.label for run in runs])


def _on_identical_responses(first: pd.DataFrame, other: pd.DataFrame) -> tuple[int, float]:
    """How many responses two tables of tokens share, and the overlap of their kept sets on these."""
    by = [*RESPONSE[1:], "position"]
    columns = [*by, "token_id", "kept"]
    both = first[columns].merge(other[columns], how="outer", on=by, suffixes=("", "_other")).sort_values(by)
    same = (both["token_id"] == both["token_id_other"]).groupby([both["sample"], both["response"]]).transform("all")
    both = both[same].assign(model="", kept=lambda t: t["kept"].astype(bool)).reset_index(drop=True)
    if both.empty:
        return 0, math.nan
    starts = response_starts(both)
    return len(starts) - 1, overlap(both["kept"].to_numpy(), both["kept_other"].to_numpy(dtype=bool), starts)


def question_plot(runs: Sequence[Run]) -> Plot:
    """The questions that all runs share: mean dependency in the first run against that in each other."""
    means = per_question(runs)
    top = float(means.to_numpy().max()) * 1.04 or 1.0

    def draw(figure: Figure, theme: Theme) -> None:
        ax = prepare(figure.subplots(), "Mean dependency of questions")
        ax.plot([0, top], [0, top], color=theme.muted, linewidth=1, linestyle=DASHED)
        colours = series_colours(theme, len(runs))
        for run, colour in list(zip(runs, colours, strict=True))[1:]:
            ax.plot(means.iloc[:, 0], means[run.label], "o", color=colour, markersize=4, alpha=0.6, label=run.label)
        ax.set(xlim=(0, top), ylim=(0, top))
        ax.set_xlabel(f"nats, {runs[0].label}")
        ax.set_ylabel("nats, the others")
        figure.legend(loc="outside lower left", ncols=2)

    alts = [f"{run.label}: rank correlation {paired(runs[0], run).rank_correlation:.2f}" for run in runs[1:]]
    return Plot(
        "questions",
        f"Each of the {len(means):,} shared questions by the mean dependency of its responses, in {runs[0].label} and "
        "in the other runs. Above the dashed line the other run depends more on the image.",
        f"Scatter of {len(means):,} questions against {runs[0].label}. {'; '.join(alts)}.",
        draw,
        (5.2, 3.8),
    )


def settings(analyses: Sequence[AnalysisFolder]) -> list[tuple[str, list[str]]]:
    """What the folders were run with, where it differs: a row a setting, a value a run."""
    names = dict.fromkeys(name for analysis in analyses for name in analysis.summary)
    rows = []
    for name in names:
        if name in _OUTCOMES or name.startswith("seconds"):
            continue
        values = [_setting(analysis.summary.get(name)) for analysis in analyses for _ in analysis.runs]
        if len(set(values)) > 1:
            rows.append((name.replace("_", " "), values))
    return rows


def _setting(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {entry}" for key, entry in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "–" if value is None else str(value)  # noqa: RUF001


def paired_table(pairs: dict[str, Paired]) -> list[tuple[str, list[str]]]:
    """The runs after the first beside it, a row a measure."""
    if not pairs:
        return []

    def known(value: float, text: str) -> str:
        return "–" if math.isnan(value) else text  # noqa: RUF001

    every = list(pairs.values())
    return [
        ("shared questions", [f"{pair.questions:,}" for pair in every]),
        (
            "mean dependency minus the first's, nats (95 %)",
            [f"{nats(pair.difference)} ({nats(pair.low)} to {nats(pair.high)})" for pair in every],
        ),
        (
            "rank correlation of the questions",
            [known(pair.rank_correlation, f"{pair.rank_correlation:.2f}") for pair in every],
        ),
        ("identical responses", [f"{pair.identical:,}" for pair in every]),
        ("kept tokens shared on these", [known(pair.kept_overlap, percent(pair.kept_overlap)) for pair in every]),
    ]


def _matching(runs: Sequence[Run], shared: int) -> str:
    """What is compared with what."""
    if not shared:
        return "The runs share no question, so all that each of them has is shown; differences may be the data's."
    most = max(len(run.trajectories[QUESTION].drop_duplicates()) for run in runs)
    rest = "" if most == shared else f"; up to {most - shared:,} that only some have are left out"
    return f"All numbers are of the {shared:,} questions that every run answered{rest}."
