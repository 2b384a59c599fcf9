"""Benchmarks while a model trains: a subset of them every so many steps, by the trainer's own model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vppo.analysis.sampling import Sampling, end_tokens, with_transformers
from vppo.data.prompts import prompts_of
from vppo.errors import InputError
from vppo.evaluation.benchmarks import Benchmark
from vppo.evaluation.graders import Item, verdicts
from vppo.prefix_sharing import GIB, quiet
from vppo.processors import placeholder_tokens
from vppo.rewards.accuracy import last_boxed

PART = 32  # answers at once
PREFIX = "eval_benchmarks"
WHOLE = (
    f"{PREFIX}: takes a model that is whole in each process, not one that FSDP or ZeRO-3 shards; run vppo eval on its "
    "checkpoints"
)


class BenchmarkCallback(TrainerCallback):
    """Evaluates before the first step, then every `steps` steps and at the end, and logs `eval_benchmarks/SET`.

    Each process answers its share of the questions by `generate`; the answers of one evaluation and the next are drawn
    from the same seeds, and training's random numbers are left alone.

    Args:
        trainer: Whose model it is.
        benchmarks: The sets.
        steps: Between two evaluations, from 1.
        limit: Questions of each set, spread evenly over it.
        samples: Answers to each question.
        memory: GiB for caches and activations.

    Raises:
        InputError: The trainer shards its weights, so that no process could answer alone; or a number is out of range.
    """

    def __init__(
        self,
        trainer: Any,
        benchmarks: Sequence[Benchmark],
        *,
        steps: int = 50,
        limit: int = 64,
        samples: int = 1,
        memory: float = 4.0,
    ) -> None:
        for name, value in (("steps", steps), ("limit", limit), ("samples", samples)):
            if value < 1:
                raise InputError(f"{PREFIX}_{name}: got {value}, takes a whole number from 1")
        accelerator = trainer.accelerator
        if getattr(accelerator.state, "fsdp_plugin", None) is not None:
            raise InputError(WHOLE)
        plugin = getattr(accelerator.state, "deepspeed_plugin", None)
        if plugin is not None and plugin.zero_stage == 3:
            raise InputError(WHOLE)
        self._trainer, self._benchmarks = trainer, list(benchmarks)
        self._steps, self._limit, self._samples, self._memory = steps, limit, samples, int(memory * GIB)
        self._evaluated: int | None = None  # the step of the latest evaluation

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            self._evaluate(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self._steps == 0:
            self._evaluate(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._evaluate(state.global_step)

    def _evaluate(self, step: int) -> None:
        if self._evaluated == step:
            return
        self._evaluated = step
        model = self._trainer.accelerator.unwrap_model(self._trainer.model_wrapped)
        with quiet(model):
            answers = [self._answers(model, number, benchmark) for number, benchmark in enumerate(self._benchmarks)]
        found = gather_object([row for own in answers for row in own])
        if self._trainer.accelerator.is_main_process:
            Trainer.log(self._trainer, self._numbers(found))

    def _answers(self, model: Any, number: int, benchmark: Benchmark) -> list[tuple[int, Item, int]]:
        """This process's share of a set: its number, what was answered, and how many tokens that took."""
        accelerator, processor = self._trainer.accelerator, self._trainer.processing_class
        chosen = benchmark.chosen(self._limit)[accelerator.process_index :: accelerator.num_processes]
        ends = end_tokens(model.generation_config, processor.tokenizer)
        args = self._trainer.args
        sampling = Sampling(
            args.max_completion_length,
            args.temperature,
            args.seed,
            self._memory,
            placeholder_tokens(model.config),
            ends,
        )
        sample, found = with_transformers(model), []
        size = max(1, PART // self._samples)
        for start in range(0, len(chosen), size):
            part = {question: benchmark.problems[question] for question in chosen[start : start + size]}
            for some in ({q: p for q, p in part.items() if bool(p.images) is pictured} for pictured in (True, False)):
                prompts, places, refused = prompts_of(processor, some)
                for question, reason in refused.items():
                    raise InputError(f"{PREFIX}: {benchmark.name}, question {question}: {reason}")
                keys = [(question, k) for question in places for k in range(self._samples)]
                written = sample(prompts, [places[question] for question, _ in keys], keys, sampling) if keys else []
                for (question, _), ids in zip(keys, written, strict=True):
                    text = processor.tokenizer.decode(ids, skip_special_tokens=True)
                    problem = some[question]
                    found.append((number, Item(problem.question, str(problem.answer), text), len(ids)))
        return found

    def _numbers(self, found: Sequence[tuple[int, Item, int]]) -> dict[str, float]:
        """Accuracy, length and missing boxes of each set, and the sets' mean accuracy."""
        right = verdicts("math-verify", [item for _, item, _ in found])
        numbers: dict[str, float] = {}
        for number, benchmark in enumerate(self._benchmarks):
            own = [(bool(v), item, n) for (of, item, n), v in zip(found, right, strict=True) if of == number]
            mean = {
                "accuracy": sum(v for v, _, _ in own),
                "tokens": sum(n for _, _, n in own),
                "no_box": sum(last_boxed(item.response) is None for _, item, _ in own),
            }
            numbers |= {f"{PREFIX}/{benchmark.name}/{name}": value / len(own) for name, value in mean.items()}
        accuracies = [value for name, value in numbers.items() if name.endswith("/accuracy")]
        return {**numbers, f"{PREFIX}/accuracy": sum(accuracies) / len(accuracies)}
