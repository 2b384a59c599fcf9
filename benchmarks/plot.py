"""The picture of a result: a chart per case, time over the floor's; or curves, where presets differ in a number."""

from __future__ import annotations

import re
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.contest import Record
from benchmarks.report import MIB, CaseResult, Result, duration
from vppo.pages.plot import Plot
from vppo.pages.theme import LIGHT, Theme

FLOOR_LINE = (0, (2, 2))


def png(result: Result) -> bytes:
    """A PNG: cases with the same head and mode side by side, ordered by rows."""
    curves: dict[str, list[CaseResult]] = {}
    for case in result.cases:
        numbered = re.fullmatch(r"(\w+)-\d+", case.labels["preset"])
        if numbered:
            curves.setdefault(numbered[1], []).append(case)
    return _curves(result, curves) if curves else _bars(result)


def _bars(result: Result) -> bytes:
    lines: dict[tuple, list[CaseResult]] = {}
    for case in result.cases:
        lines.setdefault((case.labels["preset"], case.labels["backward"]), []).append(case)
    columns = max(len(line) for line in lines.values())
    bars = max(len(case.records) for case in result.cases)

    def draw(figure: Figure, theme: Theme) -> None:
        _title(figure, result, f"{result.suite}: time over the floor", theme)
        axes = figure.subplots(len(lines), columns, squeeze=False)
        for row, line in zip(axes, lines.values(), strict=True):
            end = max([1.0, *(case.over_floor(record) or 0.0 for case in line for record in case.records)])
            for ax, case in zip(row, line, strict=False):
                _draw_case(ax, case, end, theme)
            for ax in row[len(line) :]:
                ax.set_axis_off()

    size = (max(6.4, 4.6 * columns), 0.9 + (0.95 + 0.36 * bars) * len(lines))
    return Plot(f"benchmark-{result.suite}", "", "", draw, size).png(LIGHT)


def _title(figure: Figure, result: Result, title: str, theme: Theme) -> None:
    """What is shown, and on which machine."""
    figure.suptitle(f"{title}\n", x=0.012, ha="left", size=13, weight="bold", color=theme.ink)
    threads = "" if result.device == "cuda" else f", torch threads: {result.machine['threads']}"
    where = f"{result.machine['device']}{threads}, torch {result.versions['torch']}, {result.date[:10]}"
    figure.text(0.012, 0.985, f"\n\n{where}", va="top", color=theme.muted, size=9)


def _curves(result: Result, curves: dict[str, list[CaseResult]]) -> bytes:
    """How many times as fast ours is as the plain way, or a step as GRPO's, and how many times less has to be done."""
    names = {
        "prompt": "tokens of the prompt",
        "rollouts": "responses to a prompt",
        "group": "responses to a prompt",
        "active": "rows that carry gradient, %",
    }
    loss = result.suite == "loss"
    steps = not loss and any(case.labels["backward"] for cases in curves.values() for case in cases)
    title = f"times as fast as {'all logits' if loss else 'GRPO by TRL' if steps else 'the plain pass'}"

    def draw(figure: Figure, theme: Theme) -> None:
        _title(figure, result, f"{result.suite}: {title}", theme)
        for ax, (name, cases) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
            timed = [case for case in cases if all(record.seconds for record in case.records)]
            numbers = [int(case.labels["preset"].rsplit("-", 1)[1]) for case in timed]
            bound = [_less(case) for case in timed]
            other = "plain" if loss else "floor" if steps else "peer"
            fast = [_least(case, other) / _least(case, "ours") for case in timed]
            fewer = f"fewer {'rows' if loss else 'tokens'}, times"
            ax.plot(numbers, bound, color=theme.muted, linestyle=FLOOR_LINE, label=fewer)
            ax.plot(numbers, fast, color=theme.dependency, marker="o", label="as fast, times, measured")
            for number, value in zip(numbers, fast, strict=True):
                ax.annotate(f"{value:.1f}", (number, value), (0, 7), textcoords="offset points", ha="center", size=8)
            ax.set_title(_same(timed[0].labels, name), loc="left", size=10)
            ax.set_xscale("log", base=2)
            ax.set_xticks(numbers, [f"{number:,}" for number in numbers])
            ax.minorticks_off()
            ax.set(xlabel=names.get(name, name), ylim=(0, 1.15 * max(bound + fast)))
            ax.legend(loc="upper right" if loss else "upper left", frameon=False, fontsize=8)

    return Plot(f"benchmark-{result.suite}", "", "", draw, (4.6 * len(curves), 4.0)).png(LIGHT)


def _less(case: CaseResult) -> float:
    """How many times less is to be done than in the plain way."""
    labels = case.labels
    if "active_rows" in labels:
        return float(labels["rows"] / labels["active_rows"])
    return float(labels["tokens_whole"] / labels["tokens_shared"])


def _same(labels: dict[str, Any], name: str) -> str:
    """What the cases of a curve have in common."""
    if "active_rows" in labels:
        return f"{labels['rows']:,} rows, {labels['vocab']:,} x {labels['width']:,}"
    each = f"{labels['rows'] // labels['prompts']} responses" if name == "prompt" else f"prompt {labels['prompt']}"
    return f"{each}, {labels['response']} tokens a response"


def _least(case: CaseResult, which: str) -> float:
    """Least CPU time of the first of a role, or of a name; the median of results that are older than its measurement.
    Of ours it is that of the backend which `auto` takes, the last of the table.
    """
    found = [record for record in case.records if which in (record.role, record.name)]
    record: Record = found[-1 if which == "ours" else 0]
    return min(record.cpu_seconds, default=record.median)


def _draw_case(ax: Axes, case: CaseResult, end: float, theme: Theme) -> None:
    """Bars up to `end` times the floor, which the cases of a line share."""
    ax.set_title(f"{case.title}\n", loc="left", size=10)
    ax.annotate(case.sizes, (0, 1), (0, 8), "axes fraction", "offset points", color=theme.muted, size=8)
    shown = [record for record in case.records if record.role != "floor"]
    ratios = [case.over_floor(record) for record in shown]
    for place, (record, ratio) in enumerate(zip(shown, ratios, strict=True)):
        ours = record.role == "ours"
        label, start = str(record.status), 0.0
        if ratio is not None:
            ax.barh(place, ratio, height=0.62, color=theme.dependency if ours else theme.faint)
            memory = "" if record.workspace is None else f" · {record.workspace / MIB:,.0f} MiB"
            label, start = f"{ratio:.2f} x · {duration(record.median)}{memory}", ratio
        ax.annotate(
            label,
            (start, place),
            (4, 0),
            textcoords="offset points",
            va="center",
            size=8,
            color=theme.ink if ratio else theme.muted,
            bbox={"facecolor": theme.surface, "edgecolor": "none", "pad": 1.0},  # above the floor's line
            weight="bold" if ours and ratio else "normal",
        )
    ax.axvline(1.0, color=theme.ink, linewidth=1.0, linestyle=FLOOR_LINE)
    ax.set_yticks(range(len(shown)), [record.name for record in shown])
    ax.set(xlim=(0, end * 1.6), ylim=(len(shown) - 0.4, -0.6), xticks=[0, 1])
    ax.set_xticklabels(["0", "floor"])
    ax.grid(visible=False)
    ax.tick_params(axis="y", labelcolor=theme.ink)
