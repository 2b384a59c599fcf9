"""Responses from the model itself: by transformers, or by vLLM where there is one."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from vppo.data.prompts import Prompts, chat_text
from vppo.errors import InputError
from vppo.perturbations import seeded
from vppo.prefix_sharing import Footprint, fill

Key = tuple[int, int]  # sample, response


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled.

    Attributes:
        max_tokens: The longest response.
        temperature: Divides the logits; 0 takes the most probable token each time.
        seed: Response `k` of sample `i` is drawn from (seed, i, k), whatever else is in the batch.
        memory: Bytes for caches and activations; a single response may exceed it.
        forbidden: Tokens that are never sampled, see `vppo.processors.placeholder_tokens`.
        ends: Tokens that end a response.
        top_p: Only the most probable tokens that together reach this probability are drawn from, in (0, 1].
        top_k: Only so many of the most probable tokens are drawn from; 0 for all. It comes before `top_p`.
    """

    max_tokens: int
    temperature: float
    seed: int
    memory: int
    forbidden: Sequence[int]
    ends: Sequence[int]
    top_p: float = 1.0
    top_k: int = 0


Sampler = Callable[[Prompts, Sequence[int], Sequence[Key], Sampling], list[list[int]]]


def end_tokens(generation_config: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a response."""
    ends = getattr(generation_config, "eos_token_id", None)
    ends = tokenizer.eos_token_id if ends is None else ends
    return list(ends) if isinstance(ends, list | tuple) else [ends]


def with_transformers(model: Any) -> Sampler:
    """Samples by the model's own `generate`."""
    footprint = Footprint.of(model)

    @torch.no_grad()
    def sample(prompts: Prompts, rows: Sequence[int], keys: Sequence[Key], sampling: Sampling) -> list[list[int]]:
        lengths = [prompts.lengths[row] for row in rows]
        costs = [(n + sampling.max_tokens) * footprint.cached + 2 * n * footprint.passing for n in lengths]
        responses: list[list[int]] = []
        for part in fill(range(len(rows)), costs, sampling.memory):
            inputs = prompts.join([rows[i] for i in part], [[]] * len(part), model.device)
            names = {"prompt_ids": "input_ids", "prompt_mask": "attention_mask"}
            left_out = ("completion_ids", "completion_mask", "num_images", "num_tiles")
            inputs = {names.get(name, name): value for name, value in inputs.items() if name not in left_out}
            processors = LogitsProcessorList()
            if sampling.temperature > 0:
                processors.append(_SeededDraw([keys[i] for i in part], sampling, model.device))
            output = model.generate(
                **inputs,
                max_new_tokens=sampling.max_tokens,
                do_sample=False,  # the draw is a processor
                repetition_penalty=1.0,  # a model's own default may be another
                suppress_tokens=list(sampling.forbidden) or None,
                eos_token_id=list(sampling.ends),
                pad_token_id=sampling.ends[0],
                logits_processor=processors,
            )
            responses += [_up_to_end(ids, sampling.ends) for ids in output[:, inputs["input_ids"].shape[1] :].tolist()]
        return responses

    return sample


class _SeededDraw(LogitsProcessor):
    """Leaves one token of each row: a draw by inversion, each row from a stream of its own."""

    def __init__(self, keys: Sequence[Key], sampling: Sampling, device: torch.device) -> None:
        draws = [torch.rand(sampling.max_tokens, generator=seeded(sampling.seed, *key, 1)) for key in keys]
        self._uniform, self._sampling, self._step = torch.stack(draws).double().to(device), sampling, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        probabilities = (scores.double() / self._sampling.temperature).softmax(-1)
        cumulated = _nucleus(probabilities, self._sampling.top_p, self._sampling.top_k).cumsum(-1)
        wanted = self._uniform[:, self._step, None] * cumulated[:, -1:]
        self._step += 1
        chosen = torch.searchsorted(cumulated, wanted, right=True)  # the first beyond: never one of probability 0
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def _nucleus(probabilities: Tensor, top_p: float, top_k: int) -> Tensor:
    """`[B, V]` probabilities with those of all tokens outside of the chosen ones at 0; they need not sum to 1."""
    if 0 < top_k < probabilities.shape[-1]:
        least = probabilities.topk(top_k, dim=-1).values[:, -1:]
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    if top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # what the more probable tokens reach together
        outside = before >= top_p * ordered.sum(-1, keepdim=True)
        probabilities = probabilities.masked_fill(outside.scatter(1, order, outside), 0.0)
    return probabilities


def _up_to_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    places = [place for place, token in enumerate(ids) if token in ends]
    return ids[: places[0] + 1] if places else ids


@contextmanager
def with_vllm(model: str, processor: Any, pixels: dict[str, int], **options: Any) -> Iterator[Sampler]:
    """Samples by vLLM, whose memory is free again after the block.

    Args:
        model: A model on the hub, or a folder.
        processor: Of the model, for its chat template.
        pixels: "min_pixels" and "max_pixels" where they were set.
        **options: "dtype", "revision" and "trust_remote_code", as `vppo.loading.load_model` takes them; and whatever
            else vLLM's `LLM` takes, such as "tensor_parallel_size".

    Raises:
        InputError: vLLM is not installed.
    """
    try:
        from vllm import LLM, SamplingParams
    except ModuleNotFoundError as error:
        raise InputError(
            f"sampler: got 'vllm', which cannot be imported ({error}): pip install 'vppo-kernels[vllm]'"
        ) from error

    engine = [LLM(model=model, mm_processor_kwargs=pixels or None, **options)]  # emptied when the block ends

    def sample(prompts: Prompts, rows: Sequence[int], keys: Sequence[Key], sampling: Sampling) -> list[list[int]]:
        problems = [prompts.problems[row] for row in rows]
        requests = [
            {
                "prompt": chat_text(processor, problem),
                **({"multi_modal_data": {"image": problem.images}} if problem.images else {}),
            }
            for problem in problems
        ]
        params = [
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k or -1,
                max_tokens=sampling.max_tokens,
                seed=int(np.random.SeedSequence((sampling.seed, *key, 1)).generate_state(1)[0]),
                logit_bias={token: -100.0 for token in sampling.forbidden} or None,
            )
            for key in keys
        ]
        return [list(output.outputs[0].token_ids) for output in engine[0].generate(requests, params, use_tqdm=False)]

    try:
        yield sample
    finally:
        engine.clear()
        gc.collect()
        torch.cuda.empty_cache()
