"""Where a model looks: how much each token of its responses depends on the image.

Problems go through in parts of a few responses. What a part gave is written before the next one begins, so a run that
was killed goes on where it was; and since nothing in a part depends on what was computed before it, the tables come out
the same.
"""

from __future__ import annotations

import io
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.progress import Progress

from vppo.analysis.model import Subject
from vppo.analysis.options import AnalysisOptions
from vppo.analysis.pictures import picture_path
from vppo.analysis.responses import Response, Skipped, read_responses
from vppo.analysis.sampling import Sampler, Sampling
from vppo.analysis.tables import (
    TOKENS,
    TRAJECTORIES,
    join_tables,
    read_table,
    token_rows,
    token_texts,
    trajectory_row,
    write_table,
)
from vppo.analysis.token_scores import Scoring, TokenScores, score_tokens
from vppo.contents import digest, digest_file, digest_problems
from vppo.data import Problem, Problems
from vppo.data.checks import placeholder_in, placeholders
from vppo.data.prompts import Prompts, prompts_of
from vppo.errors import InputError
from vppo.files import write_atomic
from vppo.folders import ELSEWHERE, enter, read_object
from vppo.locks import claimed
from vppo.perturbations import PixelLayout
from vppo.prefix_sharing import GIB
from vppo.processors import placeholder_tokens
from vppo.progress import columns, say
from vppo.rewards import accuracy_reward
from vppo.views import ImageViews

PART = 32  # responses between two writes
PACKAGES = ("torch", "transformers", "vppo-kernels")
_TABLES = (("tokens", TOKENS), ("trajectories", TRAJECTORIES))
_CONTENTS = ("weights", "processor", "rows")  # in the identity: what names stand for
_AGAIN = "remove that folder, and the same command makes it anew"


@dataclass(frozen=True)
class Analysis:
    """What `vppo.analyze` found; docs/analyze.md says what the columns mean.

    Attributes:
        tokens: A row a response token.
        trajectories: A row a response.
        summary: What was run, what it gave in numbers, and what was skipped and why.
        out: The folder of tables, figures and page; None where there is none.
    """

    tokens: pd.DataFrame
    trajectories: pd.DataFrame
    summary: dict[str, Any]
    out: Path | None


def analyze(
    model: str | Path | tuple[Any, Any],
    data: str | Path | Sequence[dict[str, Any]],
    *,
    responses: str | Path | Sequence[str | Path] | Sequence[dict[str, Any]] = (),
    out: str | Path | None = None,
    **options: Any,
) -> Analysis:
    """Measures how much each token of a model's responses depends on the image (VPPO, Eq. 3), without any training.

    A run in a folder that holds the beginning of the same run goes on with it: of the same weights and the same rows,
    not only under the same names.

    Args:
        model: A model on the hub, a folder as `save_pretrained` writes it, or a (model, processor) pair.
        data: Problems: a file, a folder or a dataset on the hub, or rows in memory; see `vppo.data.Problems`.
        responses: Responses to score, of one or several models: files or rows in memory, see
            `vppo.analysis.responses.read_responses`. Without any, the model's own are sampled.
        out: Folder for tables, figures and page; None returns the tables only.
        **options: The fields of `AnalysisOptions`.

    Raises:
        InputError: Something that was asked for cannot be done, or `out` holds something else. A problem or a response
            that cannot be scored does not raise: it is listed in the summary, under "skipped".
        TypeError: There is no such option.
    """
    chosen = AnalysisOptions(**options)
    given = [responses] if isinstance(responses, str | Path) else list(responses)
    try:
        if out is None:
            with TemporaryDirectory() as folder:
                return _Run(model, data, given, Path(folder), chosen, pages=False).finish()
        with claimed(Path(out), "--out"):
            return _Run(model, data, given, Path(out), chosen, pages=True).finish()
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"memory: got {chosen.memory} GiB, which is more than there is; the run goes on with less: {error}"
        ) from error


class _Run:
    """One analysis in one folder."""

    def __init__(
        self,
        model: str | Path | tuple[Any, Any],
        data: str | Path | Sequence[dict[str, Any]],
        given: Sequence[Any],
        out: Path,
        options: AnalysisOptions,
        *,
        pages: bool,
    ) -> None:
        self.options, self.out, self.given, self.pages = options, out, given, pages
        self.subject = Subject(model, options)
        ImageViews.of(self.subject.processor)  # before anything is sampled
        self.placeholders = placeholders(self.subject.processor)
        self.problems = Problems(data, options.data)
        self.count = min(len(self.problems), options.limit or len(self.problems))
        self.identity = self._identity(data)
        self.console = Console()
        self._claim()

    # -- the folder ----------------------------------------------------------------------------------------------------

    def _identity(self, data: Any) -> dict[str, Any]:
        """What a run has in common with the one that it goes on with; the memory only changes the rounding."""
        chosen = {name: value for name, value in asdict(self.options).items() if name != "memory"}
        chosen |= {"device": self.subject.device, "sampler": self.subject.sampler}
        given = {str(source): digest_file(source) for source in self.given if not isinstance(source, dict)}
        if self.given and not given:
            given = {"in memory": digest(self.given)}
        return {
            "model": self.subject.name,
            "data": str(data) if isinstance(data, str | Path) else "in memory",
            "problems": len(self.problems),
            "responses": given,
            **chosen,
            **self._contents(),
        }

    def _contents(self) -> dict[str, str]:
        """Fingerprints of what the names of model and data stand for; of what no run can go on with, there are none."""
        if not self.pages:
            return {}
        return {**self.subject.contents(), "rows": digest_problems(self.problems, self.count)}

    def _claim(self) -> None:
        """Make the folder this run's, or find that it is another's."""
        keys = {"model", "data", "problems", "responses"}
        before = enter(self.out, self.identity, what="analysis", known_by=keys)
        for name, value in self.identity.items():
            if before is not None and before.get(name) != value:
                raise InputError(f"{self._difference(name, before)}; {ELSEWHERE}")

    def _difference(self, name: str, before: dict[str, Any]) -> str:
        """What is other than when the analysis in the folder was started."""
        since = f"than when the analysis in {self.out} was started"
        if name in _CONTENTS and name not in before:
            return f"--out: the analysis in {self.out} did not note the contents of its model and data"
        if name == "weights":
            return f"--model: {self.subject.name} has other weights {since}"
        if name == "processor":
            return f"--model: {self.subject.name} has another configuration, tokenizer or processor {since}"
        if name == "rows":
            return f"--data: {self.identity['data']} has other problems, answers or images {since}"
        return (
            f"--{name.replace('_', '-')}: got {self.identity[name]!r}, but the analysis in {self.out} was started with "
            f"{before.get(name)!r}"
        )

    def finish(self) -> Analysis:
        """Do what is still to be done."""
        if not (self.out / "summary.json").exists():
            responses, skipped = self._responses()
            self._score(responses)
            self._write_tables(skipped)
        summary = read_object(self.out / "summary.json", remedy=_AGAIN)
        missing = [name for name in ("model", "scored", "tokens", "skipped") if name not in summary]
        if missing:
            raise InputError(f"{self.out / 'summary.json'}: has no {', '.join(missing)}; {_AGAIN}")
        tables = [read_table(self.out / f"{name}.parquet", schema, _AGAIN).to_pandas() for name, schema in _TABLES]
        if self.pages:
            from vppo.analysis.report import write_analysis_pages

            page = write_analysis_pages(self.out)
            shutil.rmtree(self.out / "parts", ignore_errors=True)
            self._show(summary, page)
        return Analysis(tables[0], tables[1], summary, self.out if self.pages else None)

    def _show(self, summary: dict[str, Any], page: Path) -> None:
        counts = f"{summary['scored']} responses, {summary['tokens']:,} tokens"
        say(self.console, f"Scored {counts} of {summary['model']}.")
        if summary["skipped"]:
            first = summary["skipped"][0]
            say(
                self.console,
                f"Skipped {len(summary['skipped'])}, listed in {self.out / 'summary.json'}; the first is sample "
                f"{first['sample']}: {first['reason']}.",
            )
        say(self.console, f"Report: {page}")

    # -- responses -----------------------------------------------------------------------------------------------------

    def _responses(self) -> tuple[list[Response], list[Skipped]]:
        if self.given:
            responses, skipped = read_responses(self.given, self.problems, self.subject.processor.tokenizer)
            return [response for response in responses if response.sample < self.count], skipped
        size = max(1, PART // self.options.samples)
        parts = [range(start, min(start + size, self.count)) for start in range(0, self.count, size)]
        names = [f"responses-{number:05d}" for number in range(len(parts))]
        missing = [i for i, name in enumerate(names) if not self._part(name).exists()]
        if missing:
            with self.subject.sampling() as sampler, self._bar("sampling", self.count, parts[missing[0]].start) as bar:
                for index in missing:
                    self._sample(sampler, names[index], parts[index])
                    bar.advance(bar.task_ids[0], len(parts[index]))
        found = [self._read_part(name) for name in names]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for part in found for row in part["responses"]]
        write_atomic(self.out / "responses.jsonl", "".join(lines))
        skipped = [Skipped(**row) for part in found for row in part["skipped"]]
        if not lines:
            return [], skipped
        return read_responses([self.out / "responses.jsonl"], self.problems, None)[0], skipped

    def _sample(self, sampler: Sampler, name: str, samples: Sequence[int]) -> None:
        started = time.perf_counter()
        options = self.options
        prompts, places, skipped = self._read(samples)
        room = self.subject.context
        for sample, place in list(places.items()):
            length = prompts.lengths[place]
            if room is not None and length + options.max_tokens > room:
                reason = f"the prompt has {length:,} tokens, the model's context {room:,}: no room"
                skipped.append(Skipped(sample, f"{reason} for a response of {options.max_tokens:,}"))
                del places[sample]
        keys = [(sample, number) for sample in places for number in range(options.samples)]
        sampling = Sampling(
            options.max_tokens,
            options.temperature,
            options.seed,
            int(options.memory * GIB),
            placeholder_tokens(self.subject.config),
            self.subject.ends,
        )
        rows = [places[sample] for sample, _ in keys]
        responses = sampler(prompts, rows, keys, sampling) if keys else []
        decode = self.subject.processor.tokenizer.decode
        found = [
            {
                "model": self.subject.name,
                "sample": sample,
                "response": decode(ids, skip_special_tokens=True),
                "response_ids": ids,
                "truncated": bool(ids) and ids[-1] not in self.subject.ends,
            }
            for (sample, _), ids in zip(keys, responses, strict=True)
        ]
        self._write_part(name, skipped, started, responses=found)

    # -- scores --------------------------------------------------------------------------------------------------------

    def _score(self, responses: Sequence[Response]) -> None:
        parts = list(_parts(responses))
        missing = [i for i in range(len(parts)) if not self._part(f"scores-{i:05d}").exists()]
        if not missing:
            return
        scoring = Scoring(
            self.options.make_perturbation(PixelLayout.of(self.subject.processor.image_processor).patch_size),
            self.options.draws,
            self.options.divergence,
            self.options.keep_ratio,
            self.options.temperature or 1.0,
            self.options.seed,
        )
        done = sum(map(len, parts[: missing[0]]))
        with self._bar("scoring ", len(responses), done) as bar:
            for index in missing:
                self._score_part(f"scores-{index:05d}", parts[index], scoring)
                bar.advance(bar.task_ids[0], len(parts[index]))

    def _score_part(self, name: str, responses: Sequence[Response], scoring: Scoring) -> None:
        started = time.perf_counter()
        prompts, places, skipped = self._read(sorted({response.sample for response in responses}))
        good = []
        for response in responses:
            if response.sample in places:
                reason = self._fault(response, prompts.lengths[places[response.sample]])
                if reason:
                    skipped.append(Skipped(response.sample, reason, response.model, response.number))
                else:
                    good.append(response)
        ids = [response.ids.tolist() for response in good]
        rows = [places[response.sample] for response in good]
        scores: list[TokenScores] = []
        for start in range(0, len(good), PART):  # images are repeated for each response
            part = slice(start, start + PART)
            scores += score_tokens(self.subject.passes, prompts, rows[part], ids[part], list(places), scoring)
        texts = [token_texts(self.subject.processor.tokenizer, row) for row in ids]
        verdicts = self._verdicts(ids, [prompts.problems[row] for row in rows])
        pictures = {sample: self._write_pictures(sample, prompts, row, scoring) for sample, row in places.items()}
        tokens, trajectories = [TOKENS.empty_table()], []
        for response, row, words, score, correct in zip(good, rows, texts, scores, verdicts, strict=True):
            tokens.append(token_rows(response, words, score))
            trajectories.append(
                trajectory_row(
                    response,
                    words,
                    score,
                    prompts.problems[row],
                    correct=correct,
                    pictures=pictures[response.sample],
                    keep_ratio=scoring.keep_ratio,
                )
            )
        write_table(self._part(name, "-tokens.parquet"), pa.concat_tables(tokens))
        write_table(self._part(name, "-trajectories.parquet"), pa.Table.from_pylist(trajectories, TRAJECTORIES))
        self._write_part(name, skipped, started)  # last: it says that the part is whole

    def _fault(self, response: Response, prompt: int) -> str | None:
        """Why a response cannot be scored."""
        length, room = len(response.ids), self.subject.context
        known = self.subject.config.get_text_config().vocab_size
        if not length:
            return "the response is empty"
        if response.ids.min() < 0 or response.ids.max() >= known:
            return "the response has tokens that the model does not know"
        if np.isin(response.ids, placeholder_tokens(self.subject.config)).any():
            return "the response holds a token that stands for an image"
        if room is not None and prompt + length > room:
            return f"the prompt has {prompt:,} tokens, the response {length:,}, the model's context {room:,}"
        return None

    def _verdicts(self, ids: Sequence[list[int]], problems: Sequence[Problem]) -> list[bool | None]:
        texts = self.subject.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
        checked = [(text, problem.answer) for text, problem in zip(texts, problems, strict=True) if problem.answer]
        rewards = iter(accuracy_reward([text for text, _ in checked], [answer for _, answer in checked]))
        return [next(rewards) == 1.0 if problem.answer else None for problem in problems]

    def _write_pictures(self, sample: int, prompts: Prompts, row: int, scoring: Scoring) -> tuple[str, str]:
        """What the model saw in the clean and in the first perturbed view; returns where, relative to the folder."""
        draw = scoring.draw(sample, 0)
        for view, pictures in ((False, prompts.pictures(row)), (True, prompts.pictures(row, *draw))):
            for number, picture in enumerate(pictures):
                content = io.BytesIO()
                picture.save(content, "PNG")
                write_atomic(self.out / picture_path(sample, number, perturbed=view), content.getvalue())
        return picture_path(sample, 0, perturbed=False), picture_path(sample, 0, perturbed=True)

    # -- problems and parts --------------------------------------------------------------------------------------------

    def _read(self, samples: Sequence[int]) -> tuple[Prompts, dict[int, int], list[Skipped]]:
        """Problems that can be scored, the place of each sample among them, and the samples that cannot."""
        problems: dict[int, Problem] = {}
        skipped = []
        for sample in samples:
            try:
                problem = self.problems[sample]
                if not problem.images:
                    raise InputError("it has no image, so there is nothing that could be perturbed")
                reason = placeholder_in(problem.prompt, self.placeholders)
                if reason:
                    raise InputError(reason)
                problems[sample] = problem
            except InputError as error:
                skipped.append(Skipped(sample, str(error)))
        prompts, places, reasons = prompts_of(self.subject.processor, problems)
        return prompts, places, skipped + [Skipped(sample, reason) for sample, reason in reasons.items()]

    def _part(self, name: str, suffix: str = ".json") -> Path:
        return self.out / "parts" / f"{name}{suffix}"

    def _write_part(self, name: str, skipped: Sequence[Skipped], started: float, **content: Any) -> None:
        content |= {"skipped": [asdict(item) for item in skipped], "seconds": time.perf_counter() - started}
        write_atomic(self._part(name), json.dumps(content, ensure_ascii=False))

    def _read_part(self, name: str) -> dict[str, Any]:
        file = self._part(name)
        part = read_object(file, remedy=_anew(file))
        for key in ("skipped", "seconds", *(["responses"] if name.startswith("responses") else [])):
            if key not in part:
                raise InputError(f"{file}: has no {key}; {_anew(file)}")
        return part

    def _bar(self, title: str, total: int, done: int) -> Progress:
        # in a notebook a live bar needs ipywidgets, and a saved one is a hundred lines
        bar = Progress(*columns(), console=self.console, disable=self.console.is_jupyter)
        bar.add_task(title, total=total, completed=done)
        return bar

    # -- tables --------------------------------------------------------------------------------------------------------

    def _write_tables(self, skipped: Sequence[Skipped]) -> None:
        """The parts as whole tables, and the summary, whose presence says that they are there."""
        names = sorted(path.stem for path in (self.out / "parts").glob("scores-*.json"))
        found = {
            kind: [self._read_part(path.stem) for path in sorted((self.out / "parts").glob(f"{kind}-*.json"))]
            for kind in ("responses", "scores")
        }
        left_out = [*skipped, *(Skipped(**row) for part in found["scores"] for row in part["skipped"])]
        for table, schema in _TABLES:
            parts = [self._part(name, f"-{table}.parquet") for name in names]
            join_tables(self.out / f"{table}.parquet", parts, schema, _anew)
        tokens, trajectories = (
            pq.read_table(self.out / f"{name}.parquet").to_pandas() for name in ("tokens", "trajectories")
        )
        if not len(trajectories):
            raise InputError(
                f"no response could be scored; the first reason: {left_out[0].reason}" if left_out else "no response"
            )
        perturbation = asdict(
            self.options.make_perturbation(PixelLayout.of(self.subject.processor.image_processor).patch_size)
        )
        summary = {
            **self.identity,
            "perturbation": perturbation,
            "questions": int(trajectories["sample"].nunique()),
            "scored": len(trajectories),
            "tokens": len(tokens),
            "skipped": [
                {name: value for name, value in asdict(item).items() if value is not None} for item in left_out
            ],
            "seconds_sampling": sum(part["seconds"] for part in found["responses"]),
            "seconds_scoring": sum(part["seconds"] for part in found["scores"]),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {_device_name(self.subject.device)}",
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        }
        if self.pages:
            from vppo.analysis.perception import summarise

            summary["numbers"] = summarise(tokens, trajectories, self.options.keep_ratio, self.options.draws)
        write_atomic(self.out / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")


def _parts(responses: Sequence[Response]) -> Iterator[list[Response]]:
    """Neighbouring responses, those to one problem together."""
    part: list[Response] = []
    for response in responses:
        if len(part) >= PART and response.sample != part[-1].sample:
            yield part
            part = []
        part.append(response)
    if part:
        yield part


def _anew(part: Path) -> str:
    """What to do about a broken file of a part: its JSON file is the one that says that the part is whole."""
    name = part.stem.removesuffix("-tokens").removesuffix("-trajectories")
    return f"remove {part.with_name(name + '.json')}, and the same command makes that part anew"


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device != "cpu" and torch.cuda.is_available() else device
