"""The demo's model, tokenizer and processor: small, whole, and the same after a round trip through files."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from vppo.demo.batches import MAX_NEW_TOKENS, encode, forbidden_tokens
from vppo.demo.digits import DIGITS, strips
from vppo.demo.model import END, IMAGE, build_model, build_processor
from vppo.loading import load_processor

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def processor() -> Any:
    return build_processor()


@pytest.fixture(scope="module")
def model(processor: Any) -> Any:
    return build_model(processor, seed=0).eval()


def test_about_a_million_parameters(model: Any) -> None:
    assert 0.7e6 < sum(p.numel() for p in model.parameters()) < 1.6e6


def test_the_seed_is_the_weights(processor: Any, model: Any) -> None:
    torch.manual_seed(12345)  # what the process drew before must not matter
    again, other = build_model(processor, seed=0), build_model(processor, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)


def test_text_survives_the_tokenizer(processor: Any) -> None:
    tokenizer = processor.tokenizer
    text = string.printable[:95] + "\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.unk_token_id not in tokenizer(text).input_ids


def test_a_response_is_a_few_tokens(processor: Any) -> None:
    ids = processor.tokenizer(r"8+1=\boxed{9}" + END).input_ids
    tokens = [processor.tokenizer.decode([i]) for i in ids]
    assert tokens == ["8", "+", "1", "=", "\\boxed{", "9", "}", END]
    longest = max((strip.response for strip in strips("train", 500, seed=0)), key=len)
    assert len(processor.tokenizer(longest + END).input_ids) <= MAX_NEW_TOKENS


def test_one_image_token_per_digit(processor: Any) -> None:
    inputs = encode(processor, list(strips("train", 4, seed=0)), with_response=False, device=CPU)
    image_token = processor.tokenizer.convert_tokens_to_ids(IMAGE)
    assert ((inputs["input_ids"] == image_token).sum(1) == DIGITS).all()


def test_only_the_end_token_may_be_sampled_of_the_special_ones(processor: Any, model: Any) -> None:
    tokenizer = processor.tokenizer
    forbidden = forbidden_tokens(processor)
    assert tokenizer.eos_token_id not in forbidden
    assert {model.config.image_token_id, model.config.video_token_id, tokenizer.pad_token_id} <= set(forbidden)
    allowed = [tokenizer.decode([i]) for i in range(len(tokenizer)) if i not in forbidden]
    assert set(string.printable[:95]) <= set(allowed)


def test_round_trip_through_files(processor: Any, model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded_model = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    loaded_processor = load_processor(str(tmp_path))
    batch = list(strips("held-out", 3, seed=0))
    inputs = encode(processor, batch, with_response=True, device=CPU)
    loaded_inputs = encode(loaded_processor, batch, with_response=True, device=CPU)
    assert inputs.keys() == loaded_inputs.keys()
    assert all(torch.equal(value, loaded_inputs[name]) for name, value in inputs.items())
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, loaded_model(**loaded_inputs).logits)
    assert loaded_model.generation_config.eos_token_id == processor.tokenizer.eos_token_id


def test_a_digit_elsewhere_in_the_strip_is_another_image(processor: Any, model: Any) -> None:
    """The position of a digit reaches the model: else "3+5" and "5+3" could not be told apart."""
    strip = next(strips("train", 1, seed=0))
    turned = type(strip)(strip.image.transpose(0), strip.digits, strip.sources)  # 0 mirrors left and right
    logits = [
        model(**encode(processor, [s], with_response=False, device=CPU)).logits[0, -1].detach() for s in (strip, turned)
    ]
    assert not torch.allclose(*logits, atol=1e-6)
