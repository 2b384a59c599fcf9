"""The report of a study: a page in one file, a table in Markdown, and a table in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vppo.evaluation.report import markdown
from vppo.files import write_atomic
from vppo.pages.page import NBSP, render, write_figures
from vppo.pages.plot import nats, percent
from vppo.study.arms import BASE
from vppo.study.figures import plots
from vppo.study.options import WARM_TARGET

DASH = "–"  # noqa: RUF001
MINUS = "\N{MINUS SIGN}"
Found = Mapping[str, float | None]


def write_report(out: Path, summary: Mapping[str, Any]) -> Path:
    """Writes `report.html`, `figures/*.png` and `results.md` from what `study.json` holds.

    Returns:
        The path of the page.
    """
    columns, rows = results(summary)
    write_atomic(out / "results.md", markdown(columns, rows))
    page = render(
        "study.html",
        task=summary["task"],
        headline=headline(summary),
        columns=columns,
        rows=rows,
        odd=summary["task"] == "guess",
        steps=summary["steps"],
        held_out=summary["held_out"],
        target=WARM_TARGET,
        charts=write_figures(out, plots(summary)),
        warm=warm(summary),
        about=about(summary),
    )
    return write_atomic(out / "report.html", page)


def plus_minus(found: Found, form: Any) -> str:
    """A mean with its standard error, where it has one: `40.2 % ± 1.2`."""
    mean, error = found["mean"], found["se"]
    if mean is None:
        return DASH
    after = "" if error is None else f" ± {form(error).removesuffix(f'{NBSP}%')}"
    return f"{form(mean)}{after}".replace(" ", NBSP)


def difference(found: Found | None) -> str:
    """A difference of two shares in points, with its standard error: `+1.5 ± 1.2`."""
    if found is None:
        return "0"
    if found["mean"] is None:
        return DASH
    after = "" if found["se"] is None else f" ± {100 * found['se']:.1f}"
    return f"{100 * found['mean']:+.1f}{after}".replace("-", MINUS).replace(" ", NBSP)


def drift(value: float) -> str:
    """Nats to three decimals: the fourth says nothing with a handful of seeds."""
    return f"{value:.3f}"


def results(summary: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """A row an arm: titles of the columns, and the rows."""
    base = summary["arms"][BASE]
    guess = summary["task"] == "guess"
    columns = ["sampled, avg@8", "minus DAPO, points", "greedy minus DAPO", "mean reward minus DAPO"]
    columns += ["reads minus DAPO", "adds, having read"]
    columns += ["guesses"] if guess else []
    columns += [
        "tokens kept",
        "drift, other tokens, nats",
        "drift, read tokens",
        "head, training",
        "head, all",
        "s",
        "seeds",
    ]
    rows = []
    for arm in summary["arms"].values():
        values = [plus_minus(arm["sampled"], percent)]
        values += [difference(arm.get(f"{key}_difference")) for key in ("sampled", "greedy", "reward", "reads")]
        values += [plus_minus(arm["adds"], percent)]
        values += [plus_minus(arm["guess_rate"], percent)] if guess else []
        values += [percent(arm["kept"]["mean"]), plus_minus(arm["drift"], drift), plus_minus(arm["drift_read"], drift)]
        values += [percent(part(arm) / part(base)) for part in (training, products)]
        values += [f"{arm['seconds']['mean']:.0f}", str(arm["seeds"])]
        rows.append((arm["label"], values))
    return columns, rows


def training(arm: Mapping[str, Any]) -> float:
    """Head products of the training passes, for each response token."""
    return float(arm["products"]["forward"] + arm["products"]["backward"])


def products(arm: Mapping[str, Any]) -> float:
    """Those, and the ones that measure dependency or entropy."""
    return training(arm) + float(arm["products"]["scoring"])


def headline(summary: Mapping[str, Any]) -> str:
    """What was run, and how far DAPO came."""
    arms, base = summary["arms"], summary["arms"][BASE]
    seeds = summary["seeds"]
    return (
        f"{len(arms)} ways to choose the tokens that carry gradient, {seeds} seed{'s' if seeds > 1 else ''} each, "
        f"{summary['steps']} steps from the same warm policy of a seed. DAPO, which trains on all tokens, is right in "
        f"{plus_minus(base['sampled'], percent)} of its sampled answers, the warm policies in "
        f"{percent(_warm_mean(summary))}."
    )


def _warm_mean(summary: Mapping[str, Any]) -> float:
    return sum(float(row["sampled"]) for row in summary["warm"]) / len(summary["warm"])


def warm(summary: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """A row a seed: how long its warm-up took, and what came of it."""
    columns = ["steps", "read, nats", "computed, nats", "sampled, avg@8", "reads", "adds, having read", "greedy"]
    rows = [
        (
            f"seed {row['seed']}" + ("" if row["learned"] else ", not learned"),
            [
                f"{row['steps']:,}",
                nats(row["read_loss"]),
                nats(row["computed_loss"]),
                *(
                    percent(row[name]) if row[name] is not None else DASH
                    for name in ("sampled", "reads", "adds", "greedy")
                ),
            ],
        )
        for row in summary["warm"]
    ]
    return columns, rows


def about(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How it was run, and where."""
    rows = [(name, str(summary[name])) for name in ("command", "machine", "date")]
    return rows + list(summary["versions"].items())


def show(console: Console, summary: Mapping[str, Any]) -> None:
    """The table in the terminal."""
    columns, rows = results(summary)
    shown = [
        "sampled, avg@8",
        "minus DAPO, points",
        "guesses",
        "tokens kept",
        "drift, other tokens, nats",
        "head, training",
        "seeds",
    ]
    kept = [place for place, title in enumerate(columns) if title in shown]
    table = Table(title=Text(f"Task {summary['task']}, {summary['steps']} steps; ± one standard error", "table.title"))
    table.title_justify = "left"
    table.add_column("")
    for place in kept:
        table.add_column(columns[place], justify="right")
    for label, values in rows:
        table.add_row(Text(label), *(Text(values[place]) for place in kept))
    console.print(table)
