"""What a policy of the study can do, and how far it has moved from the warm one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vppo.batch import Batch, View
from vppo.data import Problem
from vppo.data.prompts import Prompts
from vppo.demo.batches import answer
from vppo.prefix_sharing import ResponsePasses, quiet
from vppo.study.task import MAX_NEW_TOKENS, Parser, Question, guesses, questions, reward
from vppo_kernels import divergence

HELD_OUT, SAMPLES, COMPARED = 256, 8, 128  # questions, answers to each, and questions where the drift is measured


def measure(model: Any, warm: Any, processor: Any, task: str, held_out: int = HELD_OUT) -> dict[str, float]:
    """Accuracy and drift on held-out questions, the same for every arm and seed.

    Args:
        model: The trained policy.
        warm: The policy that it began as.
        processor: Of both.
        task: "narrated" or "guess".
        held_out: How many questions.

    Returns:
        "sampled": Share of right answers of eight to each question, at temperature 1. "greedy": that of the most
        probable answers. "drift" and "drift_read": KL(trained || warm) in nats, the mean over tokens of sampled answers
        that are not read from the image, and over those that are. "read": the share of read tokens. In the task
        "guess" also "guess_rate", of the sampled answers.
    """
    asked = list(questions(task, "held-out", held_out, seed=0))
    drawn = answer(model, processor, asked, samples=SAMPLES, temperature=1.0, max_tokens=MAX_NEW_TOKENS)
    greedy = answer(model, processor, asked, max_tokens=MAX_NEW_TOKENS)
    repeated = [question for question in asked for _ in range(SAMPLES)]
    texts = processor.tokenizer.batch_decode(drawn, skip_special_tokens=True)
    found = {
        "sampled": _share_right(texts, repeated),
        "greedy": _share_right(processor.tokenizer.batch_decode(greedy, skip_special_tokens=True), asked),
        **reads_and_adds(texts, drawn, repeated, Parser(processor.tokenizer)),
        **drift(model, warm, processor, asked[:COMPARED], drawn[: COMPARED * SAMPLES : SAMPLES]),
    }
    if task == "guess":
        found["guess_rate"] = sum(map(guesses, texts)) / len(texts)
    return found


def reads_and_adds(
    texts: Sequence[str], drawn: Sequence[list[int]], asked: Sequence[Question], parser: Parser
) -> dict[str, float]:
    """Share of answers that read every digit of their image, and of these the share that is right; NaN if none does."""
    read_well = [parser.digits(ids) == question.strip.digits for ids, question in zip(drawn, asked, strict=True)]
    found = [pair for pair, well in zip(zip(texts, asked, strict=True), read_well, strict=True) if well]
    adds = _share_right([text for text, _ in found], [question for _, question in found]) if found else math.nan
    return {"reads": sum(read_well) / len(read_well), "adds": adds}


def _share_right(texts: Sequence[str], asked: Sequence[Question]) -> float:
    return sum(reward(texts, [question.answer for question in asked])) / len(texts)


@torch.no_grad()
def drift(
    model: Any, warm: Any, processor: Any, asked: Sequence[Question], responses: Sequence[list[int]]
) -> dict[str, float]:
    """KL(trained || warm) at the tokens of responses that the trained policy gave; see `measure`."""
    prompts = Prompts(processor, [Problem(question.prompt, [question.image], question.answer) for question in asked])
    rows = range(len(asked))
    batch = Batch(prompts.join(rows, responses, model.device))
    logits = [_logits(policy, batch, View(rows)) for policy in (model, warm)]
    moved = divergence(*logits).divergence
    read = Parser(processor.tokenizer).read(batch.completion_ids) & batch.mask
    others = batch.mask & ~read
    return {
        "drift": moved[others].mean().item(),
        "drift_read": moved[read].mean().item(),
        "read": read.sum().item() / batch.mask.sum().item(),
    }


def _logits(model: Any, batch: Batch, view: View) -> Tensor:
    """`[B, T, V]`; small here."""
    with quiet(model):
        return model.get_output_embeddings()(ResponsePasses(model).hidden(batch, list(range(len(batch))), view))
