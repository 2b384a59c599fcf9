"""One arm with one seed, from the warm policy to its row of numbers; and the warm-up that its seed's arms share."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

from vppo.batch import Batch
from vppo.config import VPPOConfig
from vppo.demo.batches import forbidden_tokens
from vppo.demo.head_products import CountingTrainer, HeadProducts
from vppo.demo.model import build_model, build_processor
from vppo.demo.run import load_saved, save_whole
from vppo.files import write_atomic
from vppo.study.arms import ARMS
from vppo.study.measure import measure
from vppo.study.options import StudyOptions
from vppo.study.task import GUESS, LOOK, MAX_NEW_TOKENS, WORDS, Parser, questions, reward
from vppo.study.warmup import learned, warm_up

WIDTH = 64
PROMPTS, ROLLOUTS = 8, 8
LEARNING_RATE = 1e-4

Advance = Callable[[], None]


class StudyTrainer(CountingTrainer):
    """A trainer whose "oracle" knows which tokens are read from the image."""

    def token_scores(self, batch: Batch, scored: Tensor) -> Tensor:
        """1 at the tokens that are read."""
        return Parser(self.processing_class.tokenizer).read(batch.completion_ids).float()


def warm(options: StudyOptions, seed: int, advance: Advance = lambda: None) -> None:
    """Writes the warm policy of a seed, and its numbers before any reinforcement; nothing if it is there."""
    folder = options.warm_folder(seed)
    if folder.exists():
        return
    started = time.perf_counter()
    processor = build_processor([*WORDS, LOOK, GUESS])
    model = build_model(processor, seed, WIDTH)
    steps = warm_up(model, processor, options.task, seed, lambda step, loss: advance())
    seconds = time.perf_counter() - started
    before = measure(model, model, processor, options.task, options.held_out)
    about = {
        "seed": seed,
        "steps": len(steps),
        "learned": learned(steps),
        "read_loss": steps[-1].read,
        "computed_loss": steps[-1].computed,
        "seconds": seconds,
        **before,
    }
    save_whole(folder, model, processor, about)


def train(options: StudyOptions, arm: str, seed: int, advance: Advance = lambda: None) -> None:
    """Trains an arm from its seed's warm policy and writes its row; nothing if it is there."""
    target = options.run_file(arm, seed)
    if target.exists():
        return
    folder = options.warm_folder(seed)
    again = f"remove {folder}, and the same command makes it anew"
    (model, processor), (before, _) = (load_saved(folder, "cpu", again) for _ in range(2))
    scratch = Path(tempfile.mkdtemp(prefix="vppo-study-"))
    try:
        trainer = _trainer(options, arm, seed, model, processor, scratch, advance)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    rows = [row for row in trainer.state.log_history if "reward" in row]
    rewards = [row["reward"] for row in rows]
    found = {
        "arm": arm,
        "seed": seed,
        "seconds": seconds,
        "reward": sum(rewards) / len(rewards),
        "rewards": rewards,
        "kept": kept_share(rows),
        "products": asdict(HeadProducts.of(rows)),
        **measure(trainer.model, before, processor, options.task, options.held_out),
    }
    write_atomic(target, json.dumps(found) + "\n")


def kept_share(rows: Sequence[Mapping[str, Any]]) -> float:
    """Share of tokens with gradient in groups that have a signal, the mean over the steps that have such a group.

    Args:
        rows: What the trainer has logged, one for each step. A step whose groups have no signal logs no share.

    Returns:
        1 where no step filtered anything.
    """
    shares = [row["vppo/kept_fraction"] for row in rows if "vppo/kept_fraction" in row]
    return sum(shares) / len(shares) if shares else 1.0


class _Ticks(TrainerCallback):
    def __init__(self, advance: Advance) -> None:
        self._advance = advance

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._advance()


def _trainer(
    options: StudyOptions, arm: str, seed: int, model: Any, processor: Any, folder: Path, advance: Advance
) -> StudyTrainer:
    from datasets import Dataset

    asked = questions(options.task, "train", PROMPTS * options.steps, seed + 1)
    trainer = StudyTrainer(
        model=model,
        reward_funcs=reward,
        args=VPPOConfig(
            output_dir=str(folder),
            seed=seed,
            max_steps=options.steps,
            per_device_train_batch_size=PROMPTS * ROLLOUTS,
            num_generations=ROLLOUTS,
            max_completion_length=MAX_NEW_TOKENS,
            generation_kwargs={"suppress_tokens": forbidden_tokens(processor)},
            learning_rate=LEARNING_RATE,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **ARMS[arm].options,
        ),
        train_dataset=Dataset.from_list([question.row for question in asked]),
        processing_class=processor,
        callbacks=[_Ticks(advance)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
