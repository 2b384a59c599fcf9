"""One process's share of an evaluation: its questions are answered, seen and blind, and some answers are measured."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from vppo.analysis.model import Subject
from vppo.analysis.sampling import Sampler, Sampling, with_transformers, with_vllm
from vppo.analysis.token_scores import Scoring, score_tokens
from vppo.data import Problem
from vppo.data.checks import placeholder_in, placeholders
from vppo.data.prompts import prompts_of
from vppo.errors import InputError
from vppo.evaluation.benchmarks import Benchmark
from vppo.evaluation.blind import blinded
from vppo.evaluation.options import EvaluationOptions
from vppo.evaluation.store import SEEN, Answer, Key, Store
from vppo.perturbations import PixelLayout
from vppo.prefix_sharing import GIB
from vppo.processors import placeholder_tokens

PART = {"transformers": 32, "vllm": 1024}  # answers between two writes; vLLM wants many to choose its batches from
Missing = dict[int, list[int]]  # question to samples


class Worker:
    """Answers what is missing of one share of the questions.

    Args:
        subject: The model.
        benchmarks: The sets.
        options: How they are evaluated.
        store: Where answers are kept.
        number: Of this process; it takes every `options.processes`-th question from this one on.
        parent: Process without which this one stops; None where it is itself.
    """

    def __init__(
        self,
        subject: Subject,
        benchmarks: Sequence[Benchmark],
        options: EvaluationOptions,
        store: Store,
        number: int = 0,
        parent: int | None = None,
    ) -> None:
        self._subject, self._benchmarks, self._options, self._store = subject, benchmarks, options, store
        self._number, self._parent = number, parent
        self._placeholders = placeholders(subject.processor)

    # -- what is to be done --------------------------------------------------------------------------------------------

    def missing(self, benchmark: Benchmark, view: str) -> Missing:
        """The answers of this share that are not there yet."""
        wanted = self._options.samples if view == SEEN else self._options.blind_samples
        there, skipped = self._store.keys(benchmark.name, view), self._store.skipped(benchmark.name)
        found = {
            question: [sample for sample in range(wanted) if (question, sample) not in there]
            for question in self._share(benchmark.chosen(self._options.limit))
            if question not in skipped
        }
        return {question: samples for question, samples in found.items() if samples}

    def unmeasured(self, benchmark: Benchmark) -> list[int]:
        """The questions of this share some of whose answers have no dependency yet, though they should."""
        there, skipped = self._store.dependencies(benchmark.name), self._store.skipped(benchmark.name)
        chosen = benchmark.chosen(self._options.limit)
        count = min(self._options.dependency, len(chosen))
        measured = {chosen[i * len(chosen) // count] for i in range(count)} & set(self._share(chosen))
        keys = {q: [(q, sample) for sample in range(self._options.samples)] for q in sorted(measured - skipped.keys())}
        return [question for question, own in keys.items() if not all(key in there for key in own)]

    def _share(self, chosen: Sequence[int]) -> Sequence[int]:
        return chosen[self._number :: self._options.processes]

    @property
    def views(self) -> list[str]:
        return [SEEN] if self._options.blind == "none" else [SEEN, self._options.blind]

    # -- answers -------------------------------------------------------------------------------------------------------

    def run(self, advance: Callable[[str, int], None] = lambda what, count: None) -> None:
        """Does it all; `advance` is told how many further answers are "sampled" or "measured"."""
        todo = [
            (benchmark, view, self.missing(benchmark, view)) for benchmark in self._benchmarks for view in self.views
        ]
        if any(missing for _, _, missing in todo):
            with self._sampling() as sampler:
                for benchmark, view, missing in todo:
                    for part in _parts(missing, PART[self._subject.sampler]):
                        self._stop_alone()
                        self._answer(sampler, benchmark, view, part)
                        advance("sampled", sum(map(len, part.values())))
        for benchmark in self._benchmarks:
            questions = self.unmeasured(benchmark)
            size = max(1, PART["transformers"] // self._options.samples)
            for start in range(0, len(questions), size):
                self._stop_alone()
                some = questions[start : start + size]
                self._measure(benchmark, some)
                advance("measured", len(some) * self._options.samples)

    def _sampling(self) -> AbstractContextManager[Sampler]:
        options, subject = self._options, self._subject
        if subject.sampler == "transformers":
            return nullcontext(with_transformers(subject.model))
        limits = {"min_pixels": options.min_pixels, "max_pixels": options.max_pixels}
        return with_vllm(
            subject.name,
            subject.processor,
            {name: value for name, value in limits.items() if value is not None},
            dtype=options.dtype,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
            tensor_parallel_size=options.tensor_parallel,
        )

    def _answer(self, sampler: Sampler, benchmark: Benchmark, view: str, missing: Missing) -> None:
        problems, reasons = self._read(benchmark, list(missing), view)
        for some in ({q: p for q, p in problems.items() if bool(p.images) is pictured} for pictured in (True, False)):
            if not some:  # a processor takes a batch with images in every row, or in none
                continue
            prompts, places, refused = prompts_of(self._subject.processor, some)
            reasons |= refused
            for question, place in list(places.items()):
                if reason := self._no_room(prompts.lengths[place]):
                    reasons[question] = reason
                    del places[question]
            keys = [(question, sample) for question in places for sample in missing[question]]
            if keys:
                found = sampler(prompts, [places[question] for question, _ in keys], keys, self._sampling_options())
                self._store.add(
                    benchmark.name, view, [self._written(*key, ids) for key, ids in zip(keys, found, strict=True)]
                )
        self._store.skip(benchmark.name, reasons)

    def _written(self, question: int, sample: int, ids: list[int]) -> Answer:
        text = self._subject.processor.tokenizer.decode(ids, skip_special_tokens=True)
        return Answer(question, sample, text, list(ids), bool(ids) and ids[-1] in self._subject.ends)

    def _sampling_options(self) -> Sampling:
        options = self._options
        return Sampling(
            options.max_tokens,
            options.temperature,
            options.seed,
            int(options.memory * GIB),
            placeholder_tokens(self._subject.config),
            self._subject.ends,
            options.top_p,
            options.top_k,
        )

    def _read(
        self, benchmark: Benchmark, questions: Sequence[int], view: str
    ) -> tuple[dict[int, Problem], dict[int, str]]:
        """Problems as a view shows them, and why some cannot be asked."""
        problems, reasons = {}, {}
        for question in questions:
            try:
                problem = benchmark.problems[question]
                if reason := placeholder_in(problem.prompt, self._placeholders):
                    raise InputError(reason)
                problems[question] = problem if view == SEEN else blinded(problem, view)
            except InputError as error:
                reasons[question] = str(error)
        return problems, reasons

    def _no_room(self, length: int) -> str | None:
        room = self._subject.context
        if room is None or length + self._options.max_tokens <= room:
            return None
        return (
            f"the prompt has {length:,} tokens, the model's context {room:,}: no room for an answer of "
            f"{self._options.max_tokens:,}"
        )

    # -- dependency ----------------------------------------------------------------------------------------------------

    def _measure(self, benchmark: Benchmark, questions: Sequence[int]) -> None:
        answers = {
            (answer.question, answer.sample): answer.ids
            for answer in self._store.answers(benchmark.name, SEEN)
            if answer.question in questions and answer.sample < self._options.samples and answer.ids
        }
        problems, _ = self._read(benchmark, questions, SEEN)
        prompts, places, _ = prompts_of(self._subject.processor, {q: p for q, p in problems.items() if p.images})
        keys = sorted(key for key in answers if key[0] in places)
        found: dict[Key, float] = {}
        if keys:
            scores = score_tokens(
                self._subject.passes,
                prompts,
                [places[question] for question, _ in keys],
                [answers[key] for key in keys],
                list(places),
                self._scoring(),
            )
            means = [float(score.dependency.mean(dtype=np.float64)) for score in scores]
            found = dict(zip(keys, means, strict=True))
        wanted = [(question, sample) for question in questions for sample in range(self._options.samples)]
        self._store.measure(benchmark.name, {key: found.get(key) for key in wanted})

    def _scoring(self) -> Scoring:
        patch = PixelLayout.of(self._subject.processor.image_processor).patch_size
        perturbation = self._options.analysis.make_perturbation(patch)
        return Scoring(perturbation, temperature=self._options.temperature or 1.0, seed=self._options.seed)

    def _stop_alone(self) -> None:
        """Ends this process where the one that started it is gone: another may go on in its place."""
        if self._parent is not None and os.getppid() != self._parent:
            raise SystemExit(1)


def _parts(missing: Missing, size: int) -> Iterator[Missing]:
    """Neighbouring questions, with all that is missing of each, about `size` answers at a time."""
    part: Missing = {}
    for question, samples in missing.items():
        part[question] = samples
        if sum(map(len, part.values())) >= size:
            yield part
            part = {}
    if part:
        yield part
