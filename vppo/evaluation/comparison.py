"""Two evaluations side by side: which is better, and whether that is more than chance."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vppo.errors import InputError
from vppo.evaluation.report import Rows, points, said
from vppo.evaluation.run import read_evaluation
from vppo.evaluation.scores import Paired, paired, paired_average
from vppo.evaluation.store import SEEN
from vppo.files import write_atomic
from vppo.pages.page import NBSP, render, write_figures
from vppo.pages.plot import DASHED, Plot, percent, prepare
from vppo.pages.theme import Theme


def compare_evaluations(first: str | Path, second: str | Path, out: str | Path) -> dict[str, Any]:
    """Compares two runs on the questions that both were asked, and writes `report.html` and `eval_comparison.json`.

    Args:
        first, second: Folders that `vppo eval` finished; differences are the second's minus the first's.
        out: Where to write.

    Returns:
        What `eval_comparison.json` holds.

    Raises:
        InputError: A folder is not whole, the two are one, `out` is one of them, or they share no question.
    """
    folders = [Path(first), Path(second)]
    if folders[0].resolve() == folders[1].resolve():
        raise InputError(f"compare: got {first} twice, takes two evaluations")
    if Path(out).resolve() in [folder.resolve() for folder in folders]:
        raise InputError(f"--out: got {out}, which is one of the evaluations; takes another folder")
    read = [read_evaluation(folder) for folder in folders]
    summaries = [summary for summary, _, _ in read]
    labels = _labels(folders)
    shared = {name: label for name, label in summaries[0]["sets"].items() if name in summaries[1]["sets"]}
    means = {name: found for name in shared if len(found := _paired_means(name, read))}
    if not means:
        raise InputError(f"compare: {first} and {second} share no question; takes evaluations on the same sets")
    pairs = {name: paired(*found[[0, 1]].to_numpy(dtype=float).T) for name, found in means.items()}
    columns = [[found[run].to_numpy(dtype=float) for found in means.values()] for run in (0, 1)]
    overall = paired_average(*columns)
    blind = _blind(read, list(means))
    result = {
        "runs": labels,
        "sets": {name: asdict(pair) for name, pair in pairs.items()},
        "average": asdict(overall),
        "blind": None if blind is None else asdict(blind),
        "settings": {name: values for name, values in _settings(summaries)},
    }
    write_atomic(Path(out) / "eval_comparison.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    names = {name: shared[name] for name in means}
    page = render(
        "evaluation_comparison.html",
        labels=labels,
        headline=headline(labels, overall, len(pairs)),
        rows=table({names[name]: pair for name, pair in pairs.items()}, overall),
        blind=_row(blind) if blind else None,
        also=_also(summaries, names),
        answers=ALSO,
        settings=_settings(summaries),
        charts=write_figures(Path(out), [difference_plot({names[name]: pair for name, pair in pairs.items()}, labels)]),
        columns=COLUMNS,
    )
    path = write_atomic(Path(out) / "report.html", page)
    _show(Console(), labels, table({names[name]: pair for name, pair in pairs.items()}, overall), path)
    return result


COLUMNS = ["questions", "first", "second", f"difference, points (95{NBSP}%)", "p", "better on", "worse on"]


def _labels(folders: list[Path]) -> list[str]:
    """The folders' names, with as much of their paths as tells them apart."""
    parts = [folder.resolve().parts for folder in folders]
    depth = next(depth for depth in range(1, 1 + max(map(len, parts))) if parts[0][-depth:] != parts[1][-depth:])
    return ["/".join(own[-depth:]) for own in parts]


def _paired_means(name: str, read: list[tuple[dict[str, Any], pd.DataFrame, pd.DataFrame]]) -> pd.DataFrame:
    """`[n, 2]` accuracies of the questions of a set that both runs were asked."""
    columns = []
    for _, questions, answers in read:
        keys = questions[questions["benchmark"] == name].set_index("question")["key"]
        own = answers[(answers["benchmark"] == name) & (answers["view"] == SEEN)]
        means = own.groupby("question")["correct"].mean()
        columns.append(means.rename(index=keys.to_dict()))
    return pd.concat(columns, axis=1, join="inner", keys=[0, 1])


def _blind(read: list[tuple[dict[str, Any], pd.DataFrame, pd.DataFrame]], names: list[str]) -> Paired | None:
    """The blind columns, where both runs have the same one."""
    shown = {summary["knobs"]["blind"] for summary, _, _ in read}
    if len(shown) != 1 or "none" in shown:
        return None
    turned = [
        (s, q, answers.assign(view=answers["view"].map(lambda view: "" if view == SEEN else SEEN)))
        for s, q, answers in read
    ]
    means = [found for name in names if len(found := _paired_means(name, turned))]
    return paired_average(*[[found[run].to_numpy(dtype=float) for found in means] for run in (0, 1)]) if means else None


def headline(labels: list[str], overall: Paired, sets: int) -> str:
    """Which run is better, and how sure that is."""
    gap, found = 100 * overall.difference, points(overall.difference, overall.low, overall.high)
    where = f"the {overall.questions:,} questions that both were asked" + (
        f", {sets} sets with equal weight" if sets > 1 else ""
    )
    interval = (
        f"{found} points with 95{NBSP}% confidence, p {_p(overall.p) if overall.p <= 0.0001 else f'= {_p(overall.p)}'}"
    )
    if overall.p >= 0.05:
        return (
            f"{labels[1]} and {labels[0]} are not told apart on {where}: {percent(overall.second)} against "
            f"{percent(overall.first)}; {interval}."
        )
    return (
        f"{labels[1]} is {'better' if gap > 0 else 'worse'} than {labels[0]} by {abs(gap):.1f} points on {where}: "
        f"{percent(overall.second)} against {percent(overall.first)}; {interval}."
    )


def _p(value: float) -> str:
    return f"{value:.2g}" if value > 0.0001 else "≤ 0.0001"


def _row(pair: Paired) -> list[str]:
    gap = points(pair.difference, pair.low, pair.high)
    counts = [f"{pair.better:,}", f"{pair.worse:,}"]
    return [f"{pair.questions:,}", percent(pair.first), percent(pair.second), gap, _p(pair.p), *counts]


def table(pairs: Mapping[str, Paired], overall: Paired) -> Rows:
    """A row a set, and one for their average."""
    rows = [(label, _row(pair)) for label, pair in pairs.items()]
    return rows + ([("average of the sets", _row(overall))] if len(pairs) > 1 else [])


ALSO = ["tokens: first", "second", "no box: first", "second", "in the form asked: first", "second"]


def _also(summaries: list[dict[str, Any]], names: Mapping[str, str]) -> Rows:
    """What else differs between the answers, a row a set."""
    rows = []
    for name, label in names.items():
        found = [summary["benchmarks"][name] for summary in summaries]
        values = [f"{one['tokens']['mean']:,.0f}" for one in found]
        rows.append((label, values + [percent(one[key]) for key in ("no_box", "in_form") for one in found]))
    return rows


def _settings(summaries: list[dict[str, Any]]) -> Rows:
    """The knobs that differ."""
    rows = [("model", [str(summary["model"]) for summary in summaries])]
    for name in summaries[0]["knobs"]:
        values = [summary["knobs"].get(name) for summary in summaries]
        if values[0] != values[1]:
            rows.append((name.replace("_", " "), [said(value) for value in values]))
    return rows


def difference_plot(pairs: Mapping[str, Paired], labels: list[str]) -> Plot:
    """Each set's difference with its interval."""
    places = np.arange(len(pairs))[::-1]

    def draw(figure: Figure, theme: Theme) -> None:
        ax = prepare(
            figure.subplots(), f"{labels[1]} minus {labels[0]}" if len("".join(labels)) < 40 else "Second minus first"
        )
        gaps = 100 * np.array([pair.difference for pair in pairs.values()])
        ends = 100 * np.array([[pair.low for pair in pairs.values()], [pair.high for pair in pairs.values()]])
        ax.axvline(0, color=theme.ink, linewidth=1, linestyle=DASHED)
        ax.errorbar(gaps, places, xerr=np.abs(ends - gaps), fmt="o", color=theme.outcome, elinewidth=1.5, capsize=3)
        ax.set_yticks(places, list(pairs))
        ax.set_ylim(-0.6, len(pairs) - 0.4)
        ax.tick_params(axis="y", labelcolor=theme.ink)
        ax.grid(axis="y", visible=False)
        ax.grid(axis="x", visible=True)
        ax.set_xlabel("points of accuracy")

    told = [f"{label}: {100 * pair.difference:+.1f} points" for label, pair in pairs.items()]
    return Plot(
        "difference",
        f"Differences of the accuracies, paired by question, with 95{NBSP}% intervals from a bootstrap over the "
        "questions.",
        f"{len(pairs)} differences. {'; '.join(told)}.",
        draw,
        (5.2, 1.5 + 0.32 * len(pairs)),
    )


def _show(console: Console, labels: list[str], rows: Rows, page: Path) -> None:
    from vppo.progress import say

    shown = Table(title=Text(f"first: {labels[0]}; second: {labels[1]}", "table.title"))
    shown.title_justify = "left"
    shown.add_column("")
    for column in COLUMNS[:5]:
        shown.add_column(column, justify="right")
    for label, values in rows:
        shown.add_row(Text(label), *(Text(value) for value in values[:5]))
    console.print(shown)
    say(console, f"Report: {page}")
