"""vLLM in the trainer's process: the sampler draws from the model that is trained."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from colocated import AGREES, greedy, logged, reading_digits
from trl.data_utils import prepare_multimodal_messages

from vppo.demo.batches import answer, encode
from vppo.demo.digits import strips
from vppo.loading import load_model, load_processor
from vppo.sampler_guard import SamplerMismatchError
from vppo.vllm_prompts import Unexpanded


def asked(items: list[Any]) -> list[Any]:
    return [prepare_multimodal_messages(item.prompt, images=[item.image]) for item in items]


def same_answers(run: Any, held_out: list[Any], model: Any, sampled: list[list[int]]) -> int:
    """How many of vLLM's greedy answers are the model's own; the others part where two tokens are next to equal."""
    processor, same = run.processing_class, 0
    for item, ids, expected in zip(held_out, sampled, answer(model, processor, held_out), strict=True):
        if ids == expected:
            same += 1
            continue
        place = next(i for i, pair in enumerate(zip(ids, expected, strict=False)) if pair[0] != pair[1])
        inputs = encode(processor, [item], with_response=False, device=torch.device("cpu"))
        begun = torch.tensor([ids[:place]])
        for name, fill in (("attention_mask", 1), ("mm_token_type_ids", 0)):
            if name in inputs:
                inputs[name] = torch.cat([inputs[name], torch.full_like(begun, fill)], 1)
        with torch.no_grad():
            logits = model(**{**inputs, "input_ids": torch.cat([inputs["input_ids"], begun], 1)}).logits[0, -1]
        assert (logits[ids[place]] - logits[expected[place]]).abs() < 0.1
    return same


def test_a_dozen_steps(digits: Path, tmp_path: Path) -> None:
    held_out = list(itertools.islice(strips("held-out", 64, seed=0), 64))
    run = reading_digits(tmp_path, digits, max_steps=12)
    before = greedy(run, asked(held_out))
    plain = load_model(str(digits), device="cpu", dtype="float32")
    print(f"greedy answers that are the same: {same_answers(run, held_out, plain, before)} of 64")
    assert same_answers(run, held_out, plain, before) >= 58

    run.train()
    gaps, rewards = logged(run, "vppo/sampler_gap_mean"), logged(run, "reward")
    print(f"gap a step: {[round(gap, 4) for gap in gaps]}, reward: {rewards}")
    assert len(gaps) == 12 and max(gaps) < AGREES
    assert sum(rewards) / 12 > 0.15

    with torch.no_grad():  # an exaggerated update: the answers are those of the weights after it
        for weight in run.model.model.language_model.layers[1].parameters():
            weight.mul_(1.1)
        numbers = run.processing_class.tokenizer.convert_tokens_to_ids(list("0123456789"))
        run.model.lm_head.weight[numbers] = run.model.lm_head.weight[numbers].roll(1, 0)  # says 1 where it reads 0
    after = greedy(run, asked(held_out))
    plain.load_state_dict(run.model.state_dict())
    assert sum(a != b for a, b in zip(after, before, strict=True)) > 20
    assert same_answers(run, held_out, plain, after) >= 58


def test_prompts_that_were_expanded_twice_are_refused(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What TRL 1.16 does by itself."""
    monkeypatch.setattr(Unexpanded, "__call__", lambda self, ids: ids)
    run = reading_digits(tmp_path, digits)
    with pytest.raises(SamplerMismatchError, match=r"nats on the mean.*expanded twice") as raised:
        run.train()
    print(raised.value)


def test_image_limits_reach_the_engine(digits: Path, tmp_path: Path) -> None:
    """An image of 3 cells becomes one of 2: the folder's limits would give 3 placeholders."""
    processor = load_processor(str(digits), min_pixels=784, max_pixels=2 * 784)
    run = reading_digits(tmp_path, digits, processor=processor, max_steps=1)
    run.train()
    assert logged(run, "vppo/sampler_gap_mean")[0] < AGREES
