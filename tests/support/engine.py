"""An engine with vLLM's interface, on transformers: it expands placeholders as vLLM does, and keeps what it got."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from trl.generation import vllm_generation
from trl.trainer import grpo_trainer

from vppo import vllm_engine
from vppo.loading import load_model, load_processor

LENGTH = 4


@dataclass
class Params:
    """`vllm.SamplingParams`, as far as it is looked at."""

    temperature: float = 1.0
    n: int = 1
    repetition_penalty: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 16
    logprobs: int | None = None
    logit_bias: dict[int, float] = field(default_factory=dict)


class Engine:
    """Of Qwen's models: every image has one placeholder, of which its own expansion is made."""

    latest: Engine

    def __init__(self, model: str, **options: Any) -> None:
        self.model, self.processor, self.options = load_model(model, device="cpu"), load_processor(model), options
        self.given: list[dict[str, Any]] = []
        self.params: list[Params] = []
        self.drawn = 0
        config = SimpleNamespace(dtype=torch.float32, max_model_len=4096)
        runner = SimpleNamespace(model=self)
        worker = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        self.forgotten = 0  # how often it was told to forget the encoded images
        self.llm_engine = SimpleNamespace(
            model_config=config, model_executor=worker, reset_encoder_cache=self._forget_images
        )
        Engine.latest = self

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        named = dict(self.model.named_parameters())
        for name, weight in weights:
            named[name].data.copy_(weight)

    def _forget_images(self) -> None:
        self.forgotten += 1

    def reset_prefix_cache(self) -> None:
        """There is none."""

    @torch.no_grad()
    def generate(self, prompts: list[dict[str, Any]], sampling_params: Params, use_tqdm: bool) -> list[Any]:
        self.given += prompts
        self.params.append(sampling_params)
        outputs = []
        for prompt in prompts:
            images = prompt.get("multi_modal_data", {}).get("image", [])
            images = images if isinstance(images, list) else [images]
            ids, extra = self._expanded(list(prompt["prompt_token_ids"]), images)
            answer = self._answer()
            tokens = torch.tensor([[*ids, *answer]])
            if extra:
                extra["mm_token_type_ids"] = (tokens == self.model.config.image_token_id).int()
            logits = self.model(input_ids=tokens, **extra).logits[0, -len(answer) - 1 : -1]
            scores = (logits / sampling_params.temperature).log_softmax(-1)
            told = [{t: SimpleNamespace(rank=1, logprob=float(s[t]))} for t, s in zip(answer, scores, strict=True)]
            outputs.append(
                SimpleNamespace(prompt_token_ids=ids, outputs=[SimpleNamespace(token_ids=list(answer), logprobs=told)])
            )
        return outputs

    def _answer(self) -> list[int]:
        """Characters that differ from answer to answer, and the end."""
        letters = [chr(ord("a") + (7 * self.drawn + i) % 26) for i in range(LENGTH)]
        self.drawn += 1
        return self.processor.tokenizer.convert_tokens_to_ids([*letters, "<eos>"])

    def _expanded(self, ids: list[int], images: list[Any]) -> tuple[list[int], dict[str, Any]]:
        """As vLLM does it: each image expands the next placeholder, and what is left stays."""
        if not images:
            return ids, {}
        image_processor, placeholder = self.processor.image_processor, self.model.config.image_token_id
        limits = self.options.get("mm_processor_kwargs") or {}
        size = {"shortest_edge": limits.get("min_pixels"), "longest_edge": limits.get("max_pixels")} if limits else None
        encoded = image_processor(images=images, return_tensors="pt", **({"size": size} if size else {}))
        found, place = list[int](), 0
        for grid in encoded["image_grid_thw"]:
            following = ids.index(placeholder, place)
            found += ids[place:following] + [placeholder] * int(grid.prod() // image_processor.merge_size**2)
            place = following + 1
        found += ids[place:]
        if found.count(placeholder) != sum(int(g.prod() // 4) for g in encoded["image_grid_thw"]):
            return found, {}  # the model's forward would refuse it; vLLM fills the first ones and goes on
        return found, dict(encoded)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """TRL finds this engine where it looks for vLLM."""
    monkeypatch.setattr(vllm_engine, "installed", lambda: "0.31.0")
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_generation, "LLM", Engine, raising=False)
    monkeypatch.setattr(vllm_generation, "SamplingParams", Params, raising=False)
    if hasattr(grpo_trainer, "is_vllm_available"):
        monkeypatch.setattr(grpo_trainer, "is_vllm_available", lambda: True)
    with mock.patch.dict(os.environ):  # TRL writes the process's rank and address there, for good
        yield
