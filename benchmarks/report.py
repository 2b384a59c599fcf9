"""The result of a run: as JSON, as tables, and beside another result."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from benchmarks.contest import Record
from vppo.errors import InputError
from vppo.files import write_atomic

MIB = 1 << 20


@dataclass
class CaseResult:
    """The records of a case, with the labels that tell it from others."""

    labels: dict[str, Any]
    records: list[Record]
    predicted: float | None = None  # seconds, by the model of this GPU; see `benchmarks.prediction`

    @property
    def title(self) -> str:
        labels = self.labels
        mode = labels.get("mode") or ("forward + backward" if labels["backward"] else "forward")
        return f"{labels['preset']}, {labels['rows']:,} rows, {mode}"

    @property
    def sizes(self) -> str:
        labels = self.labels
        if "prompts" in labels:
            rollouts = f"{labels['prompts']} x {labels['rows'] // labels['prompts']} responses"
            return f"{rollouts}, {labels['prompt']:,} + {labels['response']:,} tokens, {labels['dtype']}"
        if "vocab" not in labels:
            return f"{labels['rows']:,} x {labels['length']:,}, {labels['dtype']}"
        active = f", {labels['active_rows']:,} rows active" if "active_rows" in labels else ""
        width = f"{labels['width']:,}"
        if "teacher_width" in labels:
            width = f"({width} and {labels['teacher_width']:,}), {labels['divergence']}"
        return f"{labels['vocab']:,} x {width}, {labels['dtype']}{active}"

    def over_floor(self, record: Record) -> float | None:
        """The median over the floor's median; None where either was not timed."""
        floor = next((r for r in self.records if r.role == "floor" and r.seconds), None)
        return record.median / floor.median if floor and record.seconds else None


@dataclass
class Result:
    """A run, as it is stored.

    Attributes:
        suite, device, presets: What was asked for.
        date: ISO 8601, UTC.
        command: What was typed.
        machine, versions: See `benchmarks.machine`.
        cases: In the order of the run.
    """

    suite: str
    device: str
    presets: list[str]
    date: str
    command: str
    machine: dict[str, Any]
    versions: dict[str, Any]
    cases: list[CaseResult] = field(default_factory=list)

    @property
    def stem(self) -> str:
        few = len(self.presets) < 4
        presets = "+".join(self.presets) if few else f"{self.presets[0]}-to-{self.presets[-1]}"
        return "-".join([self.suite, self.device, presets, self.date[:19].replace(":", "")])

    def save(self, path: Path) -> None:
        """As JSON, with the medians, minima and ratios that follow from the samples spelled out."""
        content = asdict(self)
        for case, stored in zip(self.cases, content["cases"], strict=True):
            for record, line in zip(case.records, stored["records"], strict=True):
                line["median_seconds"] = record.median if record.seconds else None
                line["min_seconds"] = min(record.seconds, default=None)
                line["min_cpu_seconds"] = min(record.cpu_seconds, default=None)
                line["over_floor"] = case.over_floor(record)
        write_atomic(path, json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Result:
        """What `save` wrote.

        Raises:
            InputError: The file is not there or not such a result.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            known = Record.__dataclass_fields__
            cases = [
                CaseResult(
                    case["labels"],
                    [Record(**{key: line[key] for key in known if key in line}) for line in case["records"]],
                    case.get("predicted"),
                )
                for case in content.pop("cases")
            ]
            return cls(**content, cases=cases)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is not a benchmark result: {error}") from error


def case_view(case: CaseResult) -> Group:
    """What a person reads: a line per contestant, and below what has to be known of each."""
    table = _table(
        "", "median", "min", "CPU", "x floor", "MiB", "error", *(["grad error"] if case.labels["backward"] else [])
    )
    notes = Text(style="dim")
    for record in case.records:
        timed = record.status == "timed"
        table.add_row(
            record.name,
            (duration(record.median) + ("" if timed else ", wrong")) if record.seconds else record.status,
            duration(min(record.seconds)) if record.seconds else "",
            duration(min(record.cpu_seconds)) if record.cpu_seconds else "",
            _number(case.over_floor(record), ".2f"),
            "" if record.workspace is None else f"{record.workspace / MIB:,.0f}",
            _number(record.error, ".2g"),
            *([_number(record.gradient_error, ".2g")] if case.labels["backward"] else []),
            style={"ours": "bold", "floor": "dim"}.get(record.role, "") if timed else "yellow",
        )
        if record.note and timed:
            notes.append(f"  {record.name}: {record.note}\n")
        if not timed:
            notes.append(f"  {record.name}: {record.status}, {record.reason}\n", style="yellow")
    if case.predicted is not None:
        notes.append(f"  predicted for ours: {duration(case.predicted)}\n")
    return Group(Text(case.title, style="bold"), Text(case.sizes, style="dim"), table, notes)


LEGEND = (
    "CPU: the least time that its processes had on all cores, whatever else the machine does. "
    "MiB: working memory beyond inputs and outputs. Errors: the largest, against float64, as a multiple of the bound "
    "that our own backends are held to."
)


def compare_view(a: Result, b: Result) -> Group:
    """Medians of the contestants that both results timed, and how they changed."""
    table, title = _table("", "A", "B", "B / A", "A x floor", "B x floor"), ""
    for case in a.cases:
        other = next((c for c in b.cases if c.labels == case.labels), None)
        for record in case.records:
            match = next((r for r in other.records if r.name == record.name), None) if other else None
            if other is None or match is None or not (record.seconds and match.seconds):
                continue
            if title != case.title:
                title = case.title
                table.add_row(Text(title, style="bold"))
            table.add_row(
                record.name,
                duration(record.median),
                duration(match.median),
                f"{match.median / record.median:.3f}",
                _number(case.over_floor(record), ".2f"),
                _number(other.over_floor(match), ".2f"),
            )
    if not title:
        raise InputError("the two results have no timed contestant of the same case in common")
    return Group(f"A: {_where(a)}\nB: {_where(b)}", table)


def duration(seconds: float) -> str:
    """Three digits: `812 us`, `3.41 ms`, `2.05 s`."""
    size, unit = next((u for u in ((1.0, "s"), (1e-3, "ms")) if seconds >= u[0]), (1e-6, "us"))
    value = seconds / size
    return f"{value:.{max(0, 3 - len(str(int(value))))}f} {unit}"


def _where(result: Result) -> str:
    return f"{result.suite} on {result.machine['device']}, {result.date[:10]}, commit {result.versions['commit']}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _table(first: str, *headings: str) -> Table:
    table = Table(first, box=box.SIMPLE_HEAD)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
