"""Sampled responses: the model's distribution, each from its own seed, without placeholders; what vLLM is asked."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from support import families
from support.runs import FAMILY, plain_views, rows

from vppo.analysis.sampling import (
    Sampling,
    _nucleus,
    _SeededDraw,
    _up_to_end,
    end_tokens,
    with_transformers,
    with_vllm,
)
from vppo.data import Problem
from vppo.data.prompts import Prompts
from vppo.errors import InputError
from vppo.processors import placeholder_tokens

NAMES = [f.name for f in families.FAMILIES]
EOS = families.VOCABULARY["<eos>"]


def prompts_of(processor: Any, count: int, sizes: tuple[tuple[int, int], ...] = ((56, 28), (28, 56))) -> Prompts:
    data = rows(count, sizes=sizes, images=(1, 2))
    return Prompts(processor, [Problem(row["prompt"], row["images"], None) for row in data])


def settings(model: Any, **changes: Any) -> Sampling:
    values = {"max_tokens": 5, "temperature": 1.0, "seed": 0, "memory": 1 << 30, "ends": [EOS]}
    return Sampling(**{**values, "forbidden": placeholder_tokens(model.config), **changes})


@pytest.mark.parametrize("name", [*NAMES, "internvl"])
def test_responses_belong_to_their_keys(name: str) -> None:
    """Whatever else is in the batch, and however large it is."""
    model, processor = families.build(name)
    prompts, sample = prompts_of(processor, 3), with_transformers(model)
    keys = [(i, k) for i in range(3) for k in range(2)]
    found = sample(prompts, [i for i, _ in keys], keys, settings(model))
    assert [len(ids) <= 5 and (len(ids) == 5 or ids[-1] == EOS) for ids in found] == [True] * 6
    assert len({tuple(ids) for ids in found}) > 3
    one_by_one = sample(prompts, [i for i, _ in keys], keys, settings(model, memory=1))
    assert one_by_one == found
    assert sample(prompts, [2], [(2, 1)], settings(model)) == [found[5]]
    assert sample(prompts, [2], [(2, 1)], settings(model, seed=1)) != [found[5]]


def test_the_draw_has_the_distribution_of_the_logits() -> None:
    logits = torch.tensor([2.0, -torch.inf, 0.0, -1.0, 1.0])
    keys = [(i, 0) for i in range(4000)]
    draw = _SeededDraw(keys, settings(families.build(FAMILY)[0], temperature=0.5), torch.device("cpu"))
    for _ in range(2):
        shown = draw(torch.zeros(4000, 1), logits.expand(4000, -1))
        assert (shown == 0).sum(1).eq(1).all() and shown.isneginf().sum() == 4000 * 4
        share = torch.bincount(shown.argmax(1), minlength=5) / 4000
        expected = (logits / 0.5).softmax(0)
        assert share[1] == 0
        assert ((share - expected).abs() < 5 * (expected * (1 - expected) / 4000).sqrt() + 1e-9).all()


def test_the_first_token_follows_the_model() -> None:
    """End to end: shares of the first token against the softmax of a plain forward."""
    model, processor = families.build(FAMILY)
    row = {**rows(1)[0], "response_ids": [20]}
    prompts = Prompts(processor, [Problem(row["prompt"], row["images"], None)])
    allowed = [token for token in range(len(families.VOCABULARY)) if token not in placeholder_tokens(model.config)]
    found = with_transformers(model)(prompts, [0] * 600, [(0, k) for k in range(600)], settings(model, max_tokens=1))
    with torch.no_grad():
        logits = plain_views(model, processor, row, (0,))[0][0]
    expected = logits[allowed].softmax(0)
    share = torch.bincount(torch.tensor(found).flatten(), minlength=len(logits))[allowed] / 600
    assert ((share - expected).abs() < 5 * (expected * (1 - expected) / 600).sqrt() + 2 / 600).all()


@pytest.mark.parametrize("name", NAMES)
def test_placeholders_are_never_sampled(name: str) -> None:
    """Not even where the model wants nothing else: the next forward would look for an image that is not there."""
    model, processor = families.build(name)
    forbidden = placeholder_tokens(model.config)
    assert model.config.image_token_id in forbidden and EOS not in forbidden
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.weight[forbidden] = 0
        bias = torch.zeros(len(head.weight)).index_fill(0, torch.tensor(forbidden), 50.0)
    head.register_forward_hook(lambda module, args, logits: logits + bias)
    for temperature in (0.0, 1.0):
        found = with_transformers(model)(
            prompts_of(processor, 2), [0, 1], [(0, 0), (1, 0)], settings(model, temperature=temperature)
        )
        assert not {token for ids in found for token in ids} & set(forbidden)


def test_temperature_zero_is_greedy_whatever_the_model_would_rather() -> None:
    model, processor = families.build(FAMILY)
    prompts = prompts_of(processor, 1)
    (found,) = with_transformers(model)(prompts, [0], [(0, 0)], settings(model, temperature=0.0))
    row = {**rows(1, images=(1,))[0], "response_ids": found}
    with torch.no_grad():
        logits = plain_views(families.build(FAMILY)[0], processor, row, (0,))[0]
    logits[:, placeholder_tokens(model.config)] = -torch.inf
    assert found == logits.argmax(-1).tolist()
    model.generation_config.update(repetition_penalty=5.0, do_sample=True, temperature=3.0, top_k=2)
    assert with_transformers(model)(prompts, [0], [(0, 0)], settings(model, temperature=0.0)) == [found]


def test_ends() -> None:
    _, processor = families.build(FAMILY)
    generation = types.SimpleNamespace
    assert end_tokens(generation(eos_token_id=[4, 5]), processor.tokenizer) == [4, 5]
    assert end_tokens(generation(eos_token_id=4), processor.tokenizer) == [4]
    assert end_tokens(None, processor.tokenizer) == [EOS]
    assert _up_to_end([7, 4, 8, 5, 4], [5, 4]) == [7, 4]
    assert _up_to_end([7, 8], [5, 4]) == [7, 8]


def test_what_vllm_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in with the signatures of its documentation: it cannot run without a GPU."""
    seen: dict[str, Any] = {}

    class SamplingParams:
        def __init__(
            self,
            *,
            temperature: float,
            top_p: float,
            top_k: int,
            max_tokens: int,
            seed: int,
            logit_bias: dict[int, float],
        ) -> None:
            self.__dict__.update(vars())

    class LLM:
        def __init__(
            self, model: str, *, mm_processor_kwargs: Any, dtype: str, revision: str, tensor_parallel_size: int = 1
        ) -> None:
            seen["engine"] = (model, mm_processor_kwargs, dtype, revision, tensor_parallel_size)

        def generate(self, prompts: list[Any], sampling_params: list[Any], *, use_tqdm: bool) -> list[Any]:
            seen["requests"] = list(zip(prompts, sampling_params, strict=True))
            output = types.SimpleNamespace(token_ids=(20, 21, EOS))
            return [types.SimpleNamespace(outputs=[output]) for _ in prompts]

    stand_in = types.ModuleType("vllm")
    vars(stand_in).update(LLM=LLM, SamplingParams=SamplingParams)
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    model, processor = families.build(FAMILY)
    prompts = prompts_of(processor, 2)
    with with_vllm("some/model", processor, {"max_pixels": 9}, dtype="auto", revision="main") as sample:
        found = sample(prompts, [0, 1, 1], [(0, 0), (1, 0), (1, 1)], settings(model))
    assert found == [[20, 21, EOS]] * 3
    assert seen["engine"] == ("some/model", {"max_pixels": 9}, "auto", "main", 1)
    for (request, params), row in zip(seen["requests"], (0, 1, 1), strict=True):
        assert request["prompt"].count("<|image_pad|>") == len(prompts.problems[row].images)
        assert request["prompt"].endswith(f"How much {row}?a:")
        assert all(
            np.array_equal(a, b)
            for a, b in zip(request["multi_modal_data"]["image"], prompts.problems[row].images, strict=True)
        )
        assert (params.temperature, params.max_tokens, params.top_p, params.top_k) == (1.0, 5, 1.0, -1)
        assert params.logit_bias == dict.fromkeys(placeholder_tokens(model.config), -100.0)
    assert len({params.seed for _, params in seen["requests"]}) == 3
    text = Prompts(processor, [Problem([{"role": "user", "content": "1+1?"}], [], None)])
    nucleus = settings(model, top_p=0.9, top_k=50)
    with with_vllm("some/model", processor, {}, dtype="auto", revision="main", tensor_parallel_size=4) as sample:
        sample(text, [0], [(0, 0)], nucleus)
    assert seen["engine"][-1] == 4
    ((request, params),) = seen["requests"]
    assert set(request) == {"prompt"}  # vLLM takes no empty list of images
    assert (params.top_p, params.top_k) == (0.9, 50)


@pytest.mark.parametrize(
    ("top_p", "top_k", "kept"),
    [(1.0, 0, 5), (1.0, 5, 5), (1.0, 2, 2), (0.6, 0, 2), (0.61, 0, 3), (0.05, 0, 1), (0.7, 3, 2), (0.99, 0, 5)],
)
def test_nucleus(top_p: float, top_k: int, kept: int) -> None:
    """Of 0.4, 0.2, 0.2, 0.15 and 0.05 in some order: top-k first, then the fewest that reach top-p of what is left."""
    probabilities = torch.tensor([[0.2, 0.4, 0.05, 0.2, 0.15], [0.05, 0.15, 0.2, 0.4, 0.2]], dtype=torch.float64)
    found = _nucleus(probabilities, top_p, top_k)
    order = probabilities.sort(dim=-1, descending=True, stable=True).indices
    expected = torch.zeros_like(probabilities)
    kept = 3 if top_k == 2 else kept  # of two tokens that share the second place neither is left out
    expected.scatter_(1, order[:, :kept], probabilities.gather(1, order[:, :kept]))
    assert torch.equal(found, expected)


def test_the_draw_stays_within_the_nucleus() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    draw = _SeededDraw(
        [(i, 0) for i in range(2000)], settings(families.build(FAMILY)[0], top_p=0.65), torch.device("cpu")
    )
    share = torch.bincount(draw(torch.zeros(2000, 1), logits.expand(2000, -1)).argmax(1), minlength=4) / 2000
    assert share[2:].eq(0).all() and abs(share[0] - 4 / 7) < 5 * (4 / 7 * 3 / 7 / 2000) ** 0.5


def test_vllm_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # importing it raises ModuleNotFoundError
    with pytest.raises(InputError, match=r"sampler: got 'vllm', .* pip install 'vppo-kernels\[vllm\]'"):
        with_vllm("some/model", None, {}).__enter__()
