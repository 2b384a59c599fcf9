"""Strips as tensors, and a model's answers to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vppo.demo import batches
from vppo.demo.batches import MAX_NEW_TOKENS, answer, correct, encode, forbidden_tokens
from vppo.demo.digits import strips
from vppo.demo.model import END, build_model, build_processor


@pytest.fixture(scope="module")
def processor() -> Any:
    return build_processor()


@pytest.fixture(scope="module")
def model(processor: Any) -> Any:
    return build_model(processor, seed=0)


def test_the_response_follows_the_prompt(processor: Any) -> None:
    drawn = list(strips("train", 16, seed=0))
    prompts = encode(processor, drawn, with_response=False, device=torch.device("cpu"))["input_ids"]
    both = encode(processor, drawn, with_response=True, device=torch.device("cpu"))
    assert torch.equal(both["input_ids"][:, : prompts.shape[1]], prompts)
    for strip, ids, mask in zip(drawn, both["input_ids"], both["attention_mask"], strict=True):
        response = ids[prompts.shape[1] : mask.sum()]
        assert processor.tokenizer.decode(response) == strip.response + END


def test_answers_end_where_they_end(model: Any, processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch goes on until its longest answer ends; the shorter ones must not keep its padding."""
    monkeypatch.setattr(batches, "BATCH", 3)
    model.train()
    drawn = list(strips("held-out", 7, seed=0))
    responses = answer(model, processor, drawn)
    assert model.training and len(responses) == 7
    end, forbidden = processor.tokenizer.eos_token_id, set(forbidden_tokens(processor))
    for ids in responses:
        assert 0 < len(ids) <= MAX_NEW_TOKENS and not forbidden & set(ids)
        assert end not in ids[:-1]
    assert responses == answer(model, processor, drawn), "greedy answers repeat"


def test_answers_do_not_depend_on_the_batch(model: Any, processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = list(strips("held-out", 4, seed=1))
    together = answer(model, processor, drawn)
    monkeypatch.setattr(batches, "BATCH", 1)
    assert answer(model, processor, drawn) == together


def test_correct_is_what_the_reward_says(processor: Any) -> None:
    drawn = list(strips("held-out", 3, seed=0))
    texts = [drawn[0].response + END, drawn[1].response.replace("{", "{9"), ""]
    ids = [processor.tokenizer(text).input_ids for text in texts]
    assert correct(processor, drawn, ids) == [True, False, False]
