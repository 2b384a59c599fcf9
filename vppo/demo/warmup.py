"""A short supervised warm-up: reinforcement learning needs a policy that is right now and then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from vppo.demo.batches import encode
from vppo.demo.digits import read_places, strips

BATCH, MISMATCHED = 64, 8
LEARNING_RATE = 2e-3
RAMP = 20
TARGET_LOSS = 0.05  # nats per response token: the labelled images are known, and so is adding
MAX_STEPS = 400


def warm_up(
    model: Any, processor: Any, seed: int, progress: Callable[[int, float], None] = lambda step, loss: None
) -> int:
    """Teach the model the form of an answer, adding, and the few labelled images.

    A few rows of every batch show the image of another strip and count only what is computed, not what is read. Without
    them the model learns the sums of the labelled images by heart, instead of adding what it has written.

    Ends when the mean loss of the last 10 steps is below `TARGET_LOSS`, so that every seed hands over a policy of about
    the same skill. The same seed gives the same weights.

    Args:
        model: Trained in place.
        processor: Its processor.
        seed: Of the strips.
        progress: Called after each step with its number from 1 and its mean loss in nats per response token.

    Returns:
        The number of steps taken.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    ramp = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / RAMP, total_iters=RAMP)
    data = strips("labelled", BATCH * MAX_STEPS, seed)
    model.train()
    recent: list[float] = []
    for step in range(1, MAX_STEPS + 1):
        batch = [next(data) for _ in range(BATCH)]
        mismatched = range(BATCH - MISMATCHED, BATCH)
        for row in mismatched:
            batch[row] = replace(batch[row], image=batch[row - MISMATCHED].image)
        prompt_length = encode(processor, batch[:1], with_response=False, device=model.device)["input_ids"].shape[1]
        inputs = encode(processor, batch, with_response=True, device=model.device)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        labels[:, :prompt_length] = -100
        for row in mismatched:
            labels[row, [prompt_length + place for place in read_places(batch[row].response)]] = -100
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ramp.step()
        recent = [*recent[-9:], loss.item()]
        progress(step, recent[-1])
        if len(recent) == 10 and sum(recent) / 10 < TARGET_LOSS:
            return step
    return MAX_STEPS
