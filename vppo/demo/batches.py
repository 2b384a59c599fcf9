"""Strips as the tensors that the model takes, and the model's answers to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from vppo.demo.digits import Strip
from vppo.rewards import accuracy_reward

MAX_NEW_TOKENS = 20
BATCH = 128


class Asked(Protocol):
    """A picture, what is asked about it, and the worked answer: a `Strip`, or a question of the study."""

    @property
    def image(self) -> Image.Image: ...
    @property
    def prompt(self) -> list[dict[str, str]]: ...
    @property
    def answer(self) -> str: ...
    @property
    def response(self) -> str: ...


def encode(processor: Any, strips: Sequence[Asked], *, with_response: bool, device: torch.device) -> dict[str, Tensor]:
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


def answer(
    model: Any,
    processor: Any,
    strips: Sequence[Asked],
    *,
    samples: int = 1,
    temperature: float = 0.0,
    max_tokens: int = MAX_NEW_TOKENS,
    seed: int = 0,
) -> list[list[int]]:
    """Responses as token ids, each with its end token if it reached one; those to a strip follow each other.

    Args:
        model: Left in the mode it was in.
        processor: Its processor.
        strips: What is asked.
        samples: Responses to each strip.
        temperature: 0 takes the most probable token each time.
        max_tokens: The longest response.
        seed: Response `k` to strip `i` is drawn from (seed, i, k).
    """
    from vppo.analysis.sampling import Sampling, with_transformers  # these need TRL, beside which verl does not run
    from vppo.data import Problem
    from vppo.data.prompts import Prompts
    from vppo.prefix_sharing import GIB, quiet

    end = processor.tokenizer.eos_token_id
    draw, responses = with_transformers(model), list[list[int]]()
    sampling = Sampling(max_tokens, temperature, seed, 4 * GIB, forbidden_tokens(processor), [end])
    with quiet(model):
        for start in range(0, len(strips), BATCH):
            problems = [Problem(strip.prompt, [strip.image], strip.answer) for strip in strips[start : start + BATCH]]
            rows = [row for row in range(len(problems)) for _ in range(samples)]
            keys = [(start + row, sample) for row in range(len(problems)) for sample in range(samples)]
            responses += draw(Prompts(processor, problems), rows, keys, sampling)
    return responses


def correct(processor: Any, strips: Sequence[Strip], responses: Sequence[list[int]]) -> list[bool]:
    """Which responses the reward of the training accepts."""
    texts = processor.tokenizer.batch_decode(responses, skip_special_tokens=True)
    return [reward == 1.0 for reward in accuracy_reward(texts, [s.answer for s in strips])]
