"""Strips as the tensors that the model takes, and the model's answers to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vppo.demo.digits import Strip
from vppo.rewards import accuracy_reward

MAX_NEW_TOKENS = 20
BATCH = 128


def encode(processor: Any, strips: Sequence[Strip], *, with_response: bool, device: torch.device) -> dict[str, Tensor]:
    """Prompts, with the worked answer and its end token behind them if asked for.

    Returns:
        What the model's forward takes. Prompts all have the same length; responses are padded on the right.
    """
    content = [{"type": "image"}, {"type": "text", "text": strips[0].prompt[0]["content"]}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    end = processor.tokenizer.eos_token
    texts = [prompt + (strip.response + end if with_response else "") for strip in strips]
    encoded = processor(
        images=[[s.image] for s in strips], text=texts, padding=True, padding_side="right", return_tensors="pt"
    )
    return {name: value.to(device) for name, value in encoded.items()}


def forbidden_tokens(processor: Any) -> list[int]:
    """Special tokens that an answer must not hold; a sampled image placeholder would break the next forward."""
    tokenizer = processor.tokenizer
    return [i for i in tokenizer.all_special_ids if i != tokenizer.eos_token_id] + [
        i for token, i in tokenizer.get_added_vocab().items() if i not in tokenizer.all_special_ids
    ]


@torch.no_grad()
def answer(model: Any, processor: Any, strips: Sequence[Strip]) -> list[list[int]]:
    """Greedy responses as token ids, each with its end token if it reached one."""
    tokenizer = processor.tokenizer
    training, responses = model.training, []
    model.eval()
    for start in range(0, len(strips), BATCH):
        inputs = encode(processor, strips[start : start + BATCH], with_response=False, device=model.device)
        output = model.generate(
            **inputs,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            suppress_tokens=forbidden_tokens(processor),
            pad_token_id=tokenizer.pad_token_id,
        )
        for ids in output[:, inputs["input_ids"].shape[1] :].tolist():
            length = ids.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids else len(ids)
            responses.append(ids[:length])
    model.train(training)
    return responses


def correct(processor: Any, strips: Sequence[Strip], responses: Sequence[list[int]]) -> list[bool]:
    """Which responses the reward of the training accepts."""
    texts = processor.tokenizer.batch_decode(responses, skip_special_tokens=True)
    return [reward == 1.0 for reward in accuracy_reward(texts, [s.answer for s in strips])]
