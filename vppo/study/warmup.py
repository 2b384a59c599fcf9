"""The supervised warm-up of the study: it ends when what is read and what is computed are both learned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from vppo.demo.batches import encode
from vppo.demo.warmup import BATCH, LEARNING_RATE, MISMATCHED, RAMP
from vppo.study.options import WARM_STEPS, WARM_TARGET
from vppo.study.task import Parser, questions

READ_WEIGHT, SUM_WEIGHT = 6.0, 12.0  # three tokens of some 36 each, which the others would drown
WINDOW = 10
DECAY_STEPS = 240  # at a constant rate the digits of sums go no lower than 0.06 nats


@dataclass(frozen=True)
class WarmStep:
    """Mean losses of a step, in nats per token: at digits that are read from the image, and at digits of sums."""

    read: float
    computed: float


def learned(steps: list[WarmStep]) -> bool:
    """Whether, over the last ten steps, both kinds of tokens are below the target."""
    last = steps[-WINDOW:]
    means = [sum(losses) / WINDOW for losses in zip(*((step.read, step.computed) for step in last), strict=True)]
    return len(last) == WINDOW and all(mean < WARM_TARGET for mean in means)


def learning_rate_factor(step: int) -> float:
    """What the learning rate is multiplied by: up in the first steps, and down to nothing in the last."""
    return min(1.0, (step + 1) / RAMP, (WARM_STEPS - step) / DECAY_STEPS)


def warm_up(
    model: Any,
    processor: Any,
    task: str,
    seed: int,
    progress: Callable[[int, WarmStep], None] = lambda step, loss: None,
) -> list[WarmStep]:
    """Teach the model the words, the form of an answer, adding, and the few labelled images.

    As in `vppo.demo.warmup`, a few rows of every batch show the image of another strip and count only what can be known
    without it. Neither of the two kinds of tokens alone is enough to stop at: a model that reads and cannot add, or
    adds and cannot read, is rewarded for nothing.

    Args:
        model: Trained in place.
        processor: Its processor.
        task: "narrated" or "guess".
        seed: Of the questions.
        progress: Called after each step with its number from 1 and its losses.

    Returns:
        The losses of every step.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor)
    data, parser = questions(task, "labelled", BATCH * WARM_STEPS, seed), Parser(processor.tokenizer)
    model.train()
    steps: list[WarmStep] = []
    while len(steps) < WARM_STEPS and not learned(steps):
        batch = [next(data) for _ in range(BATCH)]
        for row in range(BATCH - MISMATCHED, BATCH):
            batch[row] = replace(batch[row], strip=replace(batch[row].strip, image=batch[row - MISMATCHED].image))
        prompt_length = encode(processor, batch[:1], with_response=False, device=model.device)["input_ids"].shape[1]
        inputs = encode(processor, batch, with_response=True, device=model.device)
        ids = inputs["input_ids"][:, prompt_length:]
        weight = inputs["attention_mask"][:, prompt_length:].float()
        read, computed = parser.read(ids), parser.computed(ids)
        weight[read], weight[computed] = READ_WEIGHT, SUM_WEIGHT
        weight[-MISMATCHED:][read[-MISMATCHED:]] = 0.0
        logits = model(**inputs).logits[:, prompt_length - 1 : -1]
        losses = cross_entropy(logits.transpose(1, 2), ids, reduction="none")
        optimizer.zero_grad()
        ((losses * weight).sum() / weight.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses = losses.detach()
        steps.append(WarmStep(losses[read & (weight > 0)].mean().item(), losses[computed].mean().item()))
        progress(len(steps), steps[-1])
    return steps
