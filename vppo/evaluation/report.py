"""The report of an evaluation: a page in one file, a table in Markdown, and a table in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vppo.evaluation.benchmarks import PUBLISHED_SETS
from vppo.evaluation.published import AVERAGE, PUBLISHED, SOURCE
from vppo.files import write_atomic
from vppo.pages.page import NBSP, duration, render, write_figures
from vppo.pages.plot import Plot, nats, percent, prepare
from vppo.pages.theme import Theme, series_colours
from vppo.progress import say

DASH = "–"  # noqa: RUF001
SHOWN = 100  # disagreements on the page
LONGEST = 160  # characters of an answer there
Rows = list[tuple[str, list[str]]]


def write_report(out: Path, summary: Mapping[str, Any]) -> Path:
    """Writes `report.html`, `figures/*.png` and `results.md` from the summary of an evaluation.

    Returns:
        The path of the page.
    """
    columns, rows = results(summary)
    write_atomic(out / "results.md", markdown(columns, rows))
    page = render(
        "evaluation.html",
        model=summary["model"],
        headline=headline(summary),
        warnings=summary["warnings"],
        columns=columns,
        rows=rows,
        published=published(summary),
        source=SOURCE,
        lengths=lengths(summary),
        dependency=dependency(summary),
        subjects=subjects(summary),
        graders=summary["knobs"]["graders"],
        disagreements=_disagreements(summary),
        more=max(0, len(summary["disagreements"]) - SHOWN),
        blind=summary["knobs"]["blind"],
        about=knobs(summary),
        skipped=[(f"{row['benchmark']}, question {row['question']}", row["reason"]) for row in summary["skipped"]],
        charts=write_figures(out, plots(summary)),
    )
    return write_atomic(out / "report.html", page)


# -- tables ------------------------------------------------------------------------------------------------------------


def interval(found: Mapping[str, float] | None, form: Any = percent) -> str:
    """A mean with its interval: `57.5 % (55.9 to 59.1)`."""
    if found is None or found["mean"] is None:
        return DASH
    low, high = (form(found[end]).removesuffix(f"{NBSP}%") for end in ("low", "high"))
    return f"{form(found['mean'])} ({low} to {high})".replace(" ", NBSP)


def signed(found: Mapping[str, float] | None) -> str:
    """A difference of two shares in points, with its interval."""
    if found is None:
        return DASH
    return points(found["mean"], found["low"], found["high"])


def points(mean: float, low: float, high: float) -> str:
    """A difference of two shares in points, with its interval: `+2.0 (−3.9 to +7.4)`."""
    text = f"{100 * mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
    return text.replace("-", "\N{MINUS SIGN}").replace(" ", NBSP)


def results(summary: Mapping[str, Any]) -> tuple[list[str], Rows]:
    """A row a set and one for their average; the titles of the columns, and the rows."""
    samples, blind = summary["knobs"]["samples"], summary["knobs"]["blind"] != "none"
    columns = [f"avg@{samples} (95{NBSP}%)", f"pass@{samples}"]
    columns += ["blind", "seen minus blind, points"] if blind else []
    columns += ["no box", "in the form asked", "cut off", "questions"]
    rows, sets = [], summary["benchmarks"].values()
    for name, found in summary["benchmarks"].items():
        best = found["pass_at"].get(str(found["samples"]))
        values = [interval(found["accuracy"]), percent(best["mean"]) if best else DASH]
        if blind:
            values += [percent(found["blind"]["mean"]) if found["blind"] else DASH, signed(found["seen_minus_blind"])]
        values += [percent(found[name]) for name in ("no_box", "in_form", "cut")] + [f"{found['questions']:,}"]
        rows.append((summary["sets"][name], values))
    if len(rows) > 1:
        overall = summary["average"]
        values = [interval(overall["accuracy"]), ""]
        values += [percent(overall["blind"]["mean"]) if overall["blind"] else DASH, ""] if blind else []
        rows.append(("average of the sets", [*values, "", "", "", f"{sum(s['questions'] for s in sets):,}"]))
    return columns, rows


def published(summary: Mapping[str, Any]) -> tuple[list[str], Rows] | None:
    """This run beside the paper's table, on the sets that both have; None where there is none."""
    labels, sets = summary["sets"], PUBLISHED_SETS
    # a file of one's own may have the name of a published set, but not its label
    names = [name for name in summary["benchmarks"] if name in sets and labels[name] == sets[name].label]
    if not names:
        return None
    whole = len(names) == len(sets)
    columns = [labels[name] for name in names] + (["average"] if whole else [])
    means = [summary["benchmarks"][name]["accuracy"]["mean"] for name in names]
    means += [float(np.mean(means))] if whole else []  # of these sets alone
    keys = [*names, *([AVERAGE] if whole else [])]
    rows = [(f"{model}, as published", [f"{values[key]:.1f}" for key in keys]) for model, values in PUBLISHED.items()]
    return columns, [("this run, measured here", [f"{100 * mean:.1f}" for mean in means]), *rows]


def lengths(summary: Mapping[str, Any]) -> tuple[list[str], Rows]:
    columns = ["mean", "median", f"95{NBSP}% below", "right answers", "wrong answers"]
    names = ("mean", "median", "p95", "mean_right", "mean_wrong")
    rows = []
    for name, found in summary["benchmarks"].items():
        values = [found["tokens"][key] for key in names]
        rows.append((summary["sets"][name], [DASH if value is None else f"{value:,.0f}" for value in values]))
    return columns, rows


def dependency(summary: Mapping[str, Any]) -> tuple[list[str], Rows] | None:
    """What `vppo analyze` measures, on a sample of the answers; None where nothing was measured."""
    measured = {name: found["dependency"] for name, found in summary["benchmarks"].items() if found["dependency"]}
    if not measured:
        return None
    columns = [
        "answers",
        f"mean, nats (95{NBSP}%)",
        "right",
        "wrong",
        f"right minus wrong (95{NBSP}%)",
        "told apart (AUC)",
    ]
    rows = []
    for name, found in measured.items():
        values = [f"{found['answers']:,}", interval(found, nats)]
        outcome = found["right_against_wrong"]
        if outcome is None:
            values += [DASH] * 4
        else:
            gap = {"mean": outcome["difference"], "low": outcome["low"], "high": outcome["high"]}
            values += [nats(outcome["mean_correct"]), nats(outcome["mean_wrong"]), interval(gap, nats)]
            values.append(f"{outcome['auc']:.2f}")
        rows.append((summary["sets"][name], values))
    return columns, rows


def subjects(summary: Mapping[str, Any]) -> list[tuple[str, Rows]]:
    """For each set that says what its questions are about: accuracy by subject."""
    return [
        (
            summary["sets"][name],
            [(subject, [f"{own['questions']:,}", interval(own)]) for subject, own in found["subjects"].items()],
        )
        for name, found in summary["benchmarks"].items()
        if found["subjects"]
    ]


def knobs(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Everything that the run was told, and where it ran."""
    rows = [("model", summary["model"])]
    rows += [(name.replace("_", " "), said(value)) for name, value in summary["knobs"].items()]
    rows += [("sampled by", summary["sampler"]), ("on", summary["device"]), ("machine", summary["machine"])]
    rows.append(("sampling, this time", duration(summary["seconds_sampling"])))
    return rows + list(summary["versions"].items())


def said(value: Any) -> str:
    if value is None or value == "":
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _disagreements(summary: Mapping[str, Any]) -> list[tuple[str, str, str, list[str], str]]:
    said = {True: "right", False: "wrong", None: "undecided"}
    return [
        (
            f"{summary['sets'][entry['benchmark']]}, {entry['question']}",
            _short(entry["reference"]),
            _short(entry["answer"]),
            [said[entry[grader]] for grader in summary["knobs"]["graders"]],
            f"{entry['answers']:,}",
        )
        for entry in summary["disagreements"][:SHOWN]
    ]


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def markdown(columns: Sequence[str], rows: Rows) -> str:
    """The table as Markdown."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace(NBSP, " ").replace("|", r"\|") for cell in cells) + " |\n"

    head = line(["", *columns]) + line(["---", *["---:"] * len(columns)])
    return head + "".join(line([label, *values]) for label, values in rows)


def show(console: Console, summary: Mapping[str, Any]) -> None:
    """The table in the terminal."""
    columns, rows = results(summary)
    kept = [place for place, title in enumerate(columns) if title in (*columns[:2], "blind", "no box", "questions")]
    table = Table(title=Text(f"{summary['model']}, protocol {summary['knobs']['protocol']}", "table.title"))
    table.title_justify = "left"
    table.add_column("")
    for place in kept:
        table.add_column(columns[place], justify="right")
    for label, values in rows:
        table.add_row(Text(label), *(Text(values[place]) for place in kept))
    console.print(table)
    if summary["skipped"]:
        first = summary["skipped"][0]
        count = f"{len(summary['skipped'])} question{'s' if len(summary['skipped']) > 1 else ''}"
        say(console, f"{count} could not be asked; the first: {first['benchmark']}, {first['reason']}")


# -- words and figures -------------------------------------------------------------------------------------------------


def headline(summary: Mapping[str, Any]) -> str:
    """What the run showed, in a few sentences."""
    overall, sets, samples = summary["average"], summary["benchmarks"], summary["knobs"]["samples"]
    accuracy, blind = overall["accuracy"], overall["blind"]
    where = f"on {summary['sets'][next(iter(sets))]}" if len(sets) == 1 else f"averaged over {len(sets)} sets"
    answers = f"{samples} answers to each question" if samples > 1 else "one answer to each question"
    text = (
        f"Right in {percent(accuracy['mean'])} of its answers, {where} (95{NBSP}% confidence: "
        f"{percent(accuracy['low'])} to {percent(accuracy['high'])}), from {answers}."
    )
    if blind:
        how = {"grey": "With grey in place of the images", "removed": "Without the images"}[summary["knobs"]["blind"]]
        gap = 100 * (accuracy["mean"] - blind["mean"])
        text += f" {how} it is right in {percent(blind['mean'])}: looking is worth {gap:.1f} points."
    boxless = np.mean([found["no_box"] for found in sets.values()])
    if boxless >= 0.05:
        text += f" {percent(float(boxless))} of the answers had no box, and so were wrong."
    return text


def plots(summary: Mapping[str, Any]) -> list[Plot]:
    found = [accuracy_plot(summary)]
    return found + ([pass_plot(summary)] if summary["knobs"]["samples"] > 1 else [])


def accuracy_plot(summary: Mapping[str, Any]) -> Plot:
    """Each set's accuracy with its interval, and what is left of it blind."""
    sets = summary["benchmarks"]
    labels = [summary["sets"][name] for name in sets]
    blind = [found["blind"] for found in sets.values()]
    places = np.arange(len(labels))[::-1]

    def draw(figure: Figure, theme: Theme) -> None:
        ax = prepare(figure.subplots(), "Accuracy, with the images and blind")
        means = np.array([found["accuracy"]["mean"] for found in sets.values()])
        ends = np.array([[found["accuracy"][end] for found in sets.values()] for end in ("low", "high")])
        ax.barh(places, means, height=0.55, color=theme.outcome, label="with the images")
        ax.errorbar(means, places, xerr=np.abs(ends - means), fmt="none", ecolor=theme.ink, elinewidth=1.2, capsize=3)
        if any(blind):
            values = [found["mean"] if found else np.nan for found in blind]
            ax.barh(places, values, height=0.26, color=theme.faint, label="blind")
        ax.set_yticks(places, labels)
        ax.grid(axis="y", visible=False)
        ax.grid(axis="x", visible=True)
        ax.tick_params(axis="y", labelcolor=theme.ink)
        ax.set_xlim(0, min(1.0, max(0.1, float(ends[1].max()) * 1.15)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g} %"))
        figure.legend(loc="outside lower left", ncols=2)

    told = []
    for label, found in zip(labels, sets.values(), strict=True):
        left = f", blind {percent(found['blind']['mean'])}" if found["blind"] else ""
        told.append(f"{label}: {percent(found['accuracy']['mean'])}{left}")
    return Plot(
        "accuracy",
        f"Mean over the questions of the share of right answers; whiskers: 95{NBSP}% intervals, from a bootstrap over "
        "the questions. What the blind bar covers was answered without looking.",
        f"Bars of {len(labels)} sets. {'; '.join(told)}.",
        draw,
        (5.2, 1.7 + 0.36 * len(labels)),
    )


def pass_plot(summary: Mapping[str, Any]) -> Plot:
    """The chance that one of k answers is right."""
    sets = summary["benchmarks"]

    def draw(figure: Figure, theme: Theme) -> None:
        ax = prepare(figure.subplots(), "Right at least once in k answers")
        for (name, found), colour in zip(sets.items(), series_colours(theme, len(sets)), strict=True):
            ks = [int(k) for k in found["pass_at"]]
            values = [point["mean"] for point in found["pass_at"].values()]
            ax.plot(ks, values, marker="o", markersize=4, color=colour, label=summary["sets"][name])
        ticks = sorted({int(k) for found in sets.values() for k in found["pass_at"]})
        ax.set_xscale("log", base=2)
        ax.set_xticks(ticks, [str(tick) for tick in ticks])
        ax.minorticks_off()
        ax.set_ylim(0, 1.03)
        ax.set_xlabel("k")
        ax.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g} %"))
        figure.legend(loc="outside lower left", ncols=3)

    told = [
        f"{summary['sets'][name]}: "
        + ", ".join(f"{percent(point['mean'])} at {k}" for k, point in found["pass_at"].items())
        for name, found in sets.items()
    ]
    return Plot(
        "pass_at_k",
        "The chance that at least one of k answers to a question is right, unbiased from all its answers. Where it "
        "rises far, training has something to reinforce.",
        f"Lines of {len(sets)} sets. {'; '.join(told)}.",
        draw,
        (5.2, 3.2 + 0.2 * ((len(sets) + 2) // 3)),
    )
