"""An evaluation from the model to the report: answers, verdicts, numbers, page.

Answers are written as they come, so a run that was killed goes on behind them; and each is drawn from its own seed, so
the same answers come out.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.progress import Progress

from vppo.analysis.model import Subject
from vppo.contents import digest
from vppo.errors import InputError
from vppo.evaluation.benchmarks import PUBLISHED_SETS, Benchmark, load_benchmarks
from vppo.evaluation.graders import Item, answer_of, check_graders, verdicts
from vppo.evaluation.options import EvaluationOptions
from vppo.evaluation.scores import average, summarise_set
from vppo.evaluation.side_by_side import run_side_by_side
from vppo.evaluation.store import SEEN, Store
from vppo.evaluation.tokens import think_warning
from vppo.evaluation.work import Worker
from vppo.files import replacing, write_atomic
from vppo.folders import ELSEWHERE, enter, kind_of, read_object
from vppo.locks import claimed
from vppo.progress import columns, say
from vppo.rewards.format import has_format

SUMMARY = "summary.json"
QUESTIONS = ("benchmark", "question", "key", "text", "reference", "subject")
ANSWERS = (
    *("benchmark", "view", "question", "sample", "subject", "text", "tokens", "ended", "answer", "in_form", "correct"),
    *("undecided", "dependency"),
)
PACKAGES = ("torch", "transformers", "vllm", "math-verify", "mathruler", "vppo-kernels")


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found; docs/eval.md says what the columns mean.

    Attributes:
        summary: What was run, on what, and what it gave in numbers.
        answers: A row an answer.
        out: The folder.
    """

    summary: dict[str, Any]
    answers: pd.DataFrame
    out: Path


def evaluate(
    model: str | Path | tuple[Any, Any],
    *,
    out: str | Path,
    benchmarks: Sequence[str] | None = None,
    data: Sequence[str | Path] = (),
    protocol: str = "paper",
    **options: Any,
) -> Evaluation:
    """Measures how often a model is right, with the images and blind, and writes a report.

    A folder that holds the beginning of the same evaluation is gone on with; more samples, questions or sets may be
    asked for then.

    Args:
        model: A model on the hub, a folder as `save_pretrained` writes it, or a (model, processor) pair.
        out: Folder for answers, tables and page.
        benchmarks: Names of `vppo.evaluation.benchmarks.PUBLISHED_SETS`; None takes all, or none where there is `data`.
        data: Sets of one's own: files, folders or datasets on the hub, with an answer in every row.
        protocol: Whose presets the options have, see `vppo.evaluation.protocols`.
        **options: The fields of `EvaluationOptions`.

    Raises:
        InputError: Something that was asked for cannot be done, or `out` holds something else. A question that cannot
            be asked does not raise: it is listed in the summary, under "skipped".
    """
    chosen = EvaluationOptions.of(protocol, **options)
    names = list(benchmarks) if benchmarks is not None else [] if data else list(PUBLISHED_SETS)
    folder = Path(out)
    try:
        with claimed(folder, "--out"):
            return _Run(model, names, list(data), folder, chosen).finish()
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"memory: got {chosen.memory} GiB, which is more than there is; the run goes on with less: {error}"
        ) from error


class _Run:
    """One evaluation in one folder."""

    def __init__(
        self,
        model: str | Path | tuple[Any, Any],
        names: Sequence[str],
        data: Sequence[str | Path],
        out: Path,
        options: EvaluationOptions,
    ) -> None:
        if isinstance(model, tuple) and options.processes > 1:
            raise InputError(f"processes: got {options.processes}, takes 1 for a model in memory")
        self.options, self.out, self.names, self.data = options, out, names, data
        self.console = Console()
        self.subject = _subject(model, options)
        self.benchmarks = load_benchmarks(names, data, options.data, options.mirror)
        self.store = Store(out)
        self.warnings = self._warnings()
        self._claim()

    def _warnings(self) -> list[str]:
        found = [think_warning(self.subject.processor.tokenizer, self.options.instruction)]
        for benchmark in self.benchmarks:
            if benchmark.published not in (None, len(benchmark.problems)):
                count = len(benchmark.problems)
                found.append(f"{benchmark.label} has {count:,} questions here, {benchmark.published:,} as published")
        return [warning for warning in found if warning]

    # -- the folder ----------------------------------------------------------------------------------------------------

    def _claim(self) -> None:
        """Make the folder this evaluation's, or find that it is another's."""
        contents = self.subject.contents()
        sets = {benchmark.name: benchmark.fingerprint for benchmark in self.benchmarks}
        identity: dict[str, Any] = {"model": self.subject.name, **contents, **self.options.identity(), "sets": sets}
        before = enter(self.out, identity, what="evaluation", known_by={"model", "sets"})
        if before is None:
            return
        for name, value in identity.items():
            if name != "sets" and before.get(name) != value:
                raise InputError(f"{self._difference(name, value, before.get(name))}; {ELSEWHERE}")
        for name, value in sets.items():
            if before["sets"].get(name, value) != value:
                since = f"when the evaluation in {self.out} was started"
                raise InputError(f"{name}: has other questions, answers or images than {since}; {ELSEWHERE}")
        identity["sets"] = {**before["sets"], **sets}
        write_atomic(self.out / "options.json", json.dumps(identity, indent=2) + "\n")

    def _difference(self, name: str, now: Any, before: Any) -> str:
        since = f"than when the evaluation in {self.out} was started"
        if name == "weights":
            return f"--model: {self.subject.name} has other weights {since}"
        if name == "processor":
            return f"--model: {self.subject.name} has another configuration, tokenizer or processor {since}"
        return f"--{name.replace('_', '-')}: got {now!r}, but the evaluation in {self.out} was started with {before!r}"

    # -- the work ------------------------------------------------------------------------------------------------------

    def finish(self) -> Evaluation:
        """Do what is still to be done."""
        for warning in self.warnings:
            say(self.console, f"Warning: {warning}.")
        started = time.perf_counter()
        self._sample()
        seconds = time.perf_counter() - started
        questions, answers = self._tables()
        write_table(self.out / "questions.parquet", questions)
        about = {
            "model": self.subject.name,
            "sampler": self.subject.sampler,
            "device": self.subject.device,
            "knobs": self.options.knobs(),
            "sets": {benchmark.name: benchmark.label for benchmark in self.benchmarks},
            "skipped": self._skipped(),
            "warnings": self.warnings,
            "seconds_sampling": seconds,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": _versions(),
        }
        return grade_and_report(self.out, questions, answers, about, self.console)

    def _sample(self) -> None:
        options = self.options
        whole = Worker(self.subject, self.benchmarks, replace(options, processes=1), self.store)
        asked = [(benchmark, view) for benchmark in self.benchmarks for view in whole.views]
        missing = sum(len(samples) for one in asked for samples in whole.missing(*one).values())
        unmeasured = sum(len(whole.unmeasured(benchmark)) * options.samples for benchmark in self.benchmarks)
        if not missing and not unmeasured:
            return
        lines, measured = self.store.lines(), self.store.lines("dependency")
        with _bar(self.console) as bar:
            tasks = {"sampled": bar.add_task("answering", total=missing + lines, completed=lines)}
            if options.dependency:
                total = unmeasured + measured
                tasks["measured"] = bar.add_task("measuring", total=total, completed=measured)
            if options.processes == 1:
                whole.run(lambda what, count: bar.advance(tasks[what], count))
                return

            def watch() -> None:
                bar.update(tasks["sampled"], completed=self.store.lines())
                if "measured" in tasks:
                    bar.update(tasks["measured"], completed=self.store.lines("dependency"))

            run_side_by_side(self.subject.name, self.names, self.data, options, self.out, watch)

    def _skipped(self) -> list[dict[str, Any]]:
        found = []
        for benchmark in self.benchmarks:
            chosen = set(benchmark.chosen(self.options.limit))
            reasons = self.store.skipped(benchmark.name)
            found += [
                {"benchmark": benchmark.name, "question": question, "reason": reason}
                for question, reason in sorted(reasons.items())
                if question in chosen
            ]
        return found

    def _tables(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The questions that were asked, and the answers to them; verdicts come later."""
        questions, answers = [], []
        for benchmark in self.benchmarks:
            skipped = self.store.skipped(benchmark.name)
            asked = [question for question in benchmark.chosen(self.options.limit) if question not in skipped]
            questions += [self._question(benchmark, question) for question in asked]
            answers += self._answers(benchmark, set(asked))
        if not questions:
            reasons = self._skipped()
            raise InputError(f"no question could be asked; the first reason: {reasons[0]['reason']}")
        return pd.DataFrame(questions, columns=list(QUESTIONS)), pd.DataFrame(answers)

    def _question(self, benchmark: Benchmark, question: int) -> dict[str, Any]:
        problem = benchmark.problems.without_images(question)
        text = problem.question.removesuffix(self.options.instruction).strip()
        return {
            "benchmark": benchmark.name,
            "question": question,
            "key": digest([question, text, problem.answer]),
            "text": text,
            "reference": problem.answer,
            "subject": None if benchmark.subjects is None else benchmark.subjects[question],
        }

    def _answers(self, benchmark: Benchmark, asked: set[int]) -> list[dict[str, Any]]:
        options, dependencies = self.options, self.store.dependencies(benchmark.name)
        if not options.dependency:
            dependencies = {}
        found: dict[tuple[str, int, int], dict[str, Any]] = {}
        views = {SEEN: options.samples} | ({} if options.blind == "none" else {options.blind: options.blind_samples})
        for view, samples in views.items():
            for answer in self.store.answers(benchmark.name, view):
                if answer.question not in asked or answer.sample >= samples:
                    continue
                found[view, answer.question, answer.sample] = {
                    "benchmark": benchmark.name,
                    "view": view,
                    "question": answer.question,
                    "sample": answer.sample,
                    "subject": None if benchmark.subjects is None else benchmark.subjects[answer.question],
                    "text": answer.text,
                    "tokens": len(answer.ids),
                    "ended": answer.ended,
                    "dependency": dependencies.get((answer.question, answer.sample)) if view == SEEN else None,
                }
        return [found[key] for key in sorted(found, key=lambda key: (key[0] != SEEN, *key[1:]))]


def _subject(model: str | Path | tuple[Any, Any], options: EvaluationOptions) -> Subject:
    try:
        return Subject(model, options.analysis)
    except InputError as error:
        if str(error).startswith(("min_pixels", "max_pixels")):  # which a protocol may have set
            raise InputError(f"{error}; --min-pixels 0 --max-pixels 0 keeps what it has") from error
        raise


# -- from answers to the report ----------------------------------------------------------------------------------------


def regrade(out: str | Path, graders: Sequence[str] | None = None) -> Evaluation:
    """Grades the stored answers of a finished evaluation anew, and writes its report anew; no model is needed.

    Args:
        out: Folder that `evaluate` wrote.
        graders: Who grades; None takes those that graded before.

    Raises:
        InputError: The folder is not whole, or there is no such grader.
    """
    folder = Path(out)
    read_evaluation(folder)  # before a folder is made for the claim
    with claimed(folder, "grade"):
        summary, questions, answers = read_evaluation(folder)
        knobs = summary["knobs"]
        if graders is not None:
            check_graders(graders)
            knobs["graders"] = list(graders)
        check_graders(knobs["graders"])
        about = {name: summary[name] for name in summary if name not in ("benchmarks", "average", "disagreements")}
        return grade_and_report(folder, questions, answers, about, Console())


def grade_and_report(
    out: Path, questions: pd.DataFrame, answers: pd.DataFrame, about: dict[str, Any], console: Console
) -> Evaluation:
    """Verdicts, numbers and page, from the tables of questions and answers."""
    graders = about["knobs"]["graders"]
    with _bar(console) as bar:
        task = bar.add_task("grading  ", total=len(answers) * len(graders))
        answers = graded(questions, answers, graders, lambda count: bar.advance(task, count))
    write_table(out / "answers.parquet", answers)
    sets = {name: summarise_set(answers[answers["benchmark"] == name]) for name in about["sets"]}
    sets = {name: numbers for name, numbers in sets.items() if numbers["questions"]}
    summary = {**about, "benchmarks": sets, "average": averages(answers, list(sets))}
    summary["disagreements"] = disagreements(questions, answers, graders)
    write_atomic(out / SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    from vppo.evaluation.report import show, write_report

    page = write_report(out, summary)
    show(console, summary)
    say(console, f"Report: {page}")
    return Evaluation(summary, answers, out)


def graded(
    questions: pd.DataFrame,
    answers: pd.DataFrame,
    graders: Sequence[str],
    advance: Callable[[int], None] = lambda n: None,
) -> pd.DataFrame:
    """The answers with every grader's verdict, and the first one's as "correct"; an undecided one counts as wrong."""
    of = questions.set_index(["benchmark", "question"])
    rows = of.loc[list(zip(answers["benchmark"], answers["question"], strict=True))]
    items = [
        Item(question, reference, text)
        for question, reference, text in zip(rows["text"], rows["reference"], answers["text"], strict=True)
    ]
    answers = answers.copy()
    for grader in graders:
        answers[grader] = pd.array(verdicts(grader, items, advance), dtype="boolean")
    first = answers[graders[0]]
    answers["answer"] = [answer_of(graders[0], text) for text in answers["text"]]
    answers["in_form"] = [has_format(text) for text in answers["text"]]
    answers["correct"] = first.fillna(False).astype(bool)
    answers["undecided"] = first.isna()
    answers["dependency"] = answers["dependency"].astype("float64")
    return answers[[*ANSWERS, *graders]]


def averages(answers: pd.DataFrame, names: Sequence[str]) -> dict[str, Any]:
    """Over the sets, each with the same weight, with images and blind."""
    found: dict[str, Any] = {}
    for title, seen in (("accuracy", True), ("blind", False)):
        chosen = answers[(answers["view"] == SEEN) == seen]
        values = [
            own.groupby("question")["correct"].mean().to_numpy(dtype=float)
            for name in names
            if len(own := chosen[chosen["benchmark"] == name])
        ]
        found[title] = asdict(average(values)) if len(values) == len(names) else None
    return found


def disagreements(questions: pd.DataFrame, answers: pd.DataFrame, graders: Sequence[str]) -> list[dict[str, Any]]:
    """What two graders see differently, the most frequent first: an entry a pair of reference and answer."""
    if len(graders) < 2:
        return []
    boxed = answers[answers["answer"].notna()]
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    references = questions.set_index(["benchmark", "question"])["reference"]
    apart = boxed[[*graders]].nunique(axis=1, dropna=False) > 1
    for _, row in boxed[apart].iterrows():
        reference = str(references.loc[(row["benchmark"], row["question"])])
        said = {grader: None if pd.isna(row[grader]) else bool(row[grader]) for grader in graders}
        key = (row["benchmark"], reference, row["answer"], json.dumps(said))
        entry = {"benchmark": row["benchmark"], "question": int(row["question"]), "reference": reference}
        entry |= {"answer": row["answer"], **said, "answers": 0}
        found.setdefault(key, entry)["answers"] += 1
    return sorted(found.values(), key=lambda entry: -entry["answers"])


# -- files -------------------------------------------------------------------------------------------------------------


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Writes a whole parquet file or none."""
    with replacing(path) as file:
        table.to_parquet(file, index=False)


def read_evaluation(folder: Path) -> tuple[dict[str, Any], pd.DataFrame, pd.DataFrame]:
    """The summary, the questions and the answers of a finished evaluation.

    Raises:
        InputError: The folder lacks a file, or one is broken; the message names it.
    """
    missing = [name for name in (SUMMARY, "questions.parquet", "answers.parquet") if not (folder / name).is_file()]
    if missing:
        what = "is no folder" if not folder.is_dir() else f"has no {', '.join(missing)} (it holds {kind_of(folder)})"
        raise InputError(f"{folder}: {what}; takes a folder that `vppo eval` has finished")
    summary = read_object(folder / SUMMARY)
    lacking = [name for name in ("model", "knobs", "sets", "benchmarks", "average") if name not in summary]
    if lacking:
        raise InputError(f"{folder / SUMMARY}: has no {', '.join(lacking)}; takes one that `vppo eval` wrote")
    tables = []
    for name, wanted in (("questions", QUESTIONS), ("answers", ANSWERS)):
        path = folder / f"{name}.parquet"
        try:
            table = pd.read_parquet(path)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: is no whole parquet file ({error})") from None
        lacking = [column for column in wanted if column not in table.columns]
        if lacking:
            raise InputError(f"{path}: has no column {', '.join(lacking)}; takes one that `vppo eval` wrote")
        tables.append(table)
    return summary, tables[0], tables[1]


@contextmanager
def _bar(console: Console) -> Any:
    with Progress(*columns(), console=console, disable=console.is_jupyter) as bar:
        yield bar


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
