"""What vLLM makes of prompts: any number of images, several families, pictures of tools, adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cpu_engine
import pytest
import torch
from colocated import EXACT, answering, logged
from peft import LoraConfig
from support import families
from support.looking import call_it_first, look
from support.runs import rows
from trl.chat_template_utils import qwen3_vl_chat_template

from vppo.processors import placeholder_tokens


@pytest.fixture(autouse=True)
def head_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest heads that vLLM's attention has on a CPU are of 32."""
    monkeypatch.setitem(families.TEXT, "num_attention_heads", 1)
    monkeypatch.setitem(families.MROPE, "mrope_section", [4, 6, 6])
    monkeypatch.setitem(families.HEAD, "head_dim", 32)


def forget_placeholders(model: Any) -> None:
    """Placeholders are never sampled: the trainer, who knows no such rule, must not expect any of these weights."""
    placeholders, ids = placeholder_tokens(model.config), torch.arange(len(families.SPECIAL), len(families.VOCABULARY))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(150):
        shuffled = ids[torch.randperm(len(ids))[:64]].view(4, 16)
        unwanted = model(input_ids=shuffled).logits.softmax(-1)[..., placeholders].sum(-1)
        optimizer.zero_grad()
        (unwanted + 1e-9).log().mean().backward()
        optimizer.step()
        if unwanted.max() < 1e-5:
            break
    print(f"placeholders have at most {unwanted.max().item():.1e}")


def saved(family: str, folder: Path, template: str | None = None) -> Path:
    model, processor = families.build(family)
    if template is not None:
        processor.chat_template = template
    forget_placeholders(model)
    return cpu_engine.save_for_vllm(model, processor, folder)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3"])
def test_families(family: str, tmp_path: Path) -> None:
    """One, two and no image in a batch, of different sizes; Idefics3 cuts them into tiles."""
    native = next(each.native for each in families.FAMILIES if each.name == family)
    sizes = [native, native[::-1], (2 * native[0], native[1])]
    data = rows(6, sizes=sizes, images=(1, 2, 0))
    run = answering(tmp_path / "run", saved(family, tmp_path / "model"), data, per_device_train_batch_size=24)
    run.train()
    gaps = logged(run, "vppo/sampler_gap_mean")
    print(f"{family}: {gaps}")
    assert len(gaps) == 2 and max(gaps) < EXACT


def test_adapters(tmp_path: Path) -> None:
    data = rows(6, sizes=[(56, 28), (28, 56), (84, 28)], images=(1, 2, 0))
    adapter = LoraConfig(target_modules="all-linear", exclude_modules=["lm_head"], init_lora_weights=False)
    run = answering(
        tmp_path / "run",
        saved("qwen2_5_vl", tmp_path / "model"),
        data,
        per_device_train_batch_size=24,
        peft_config=adapter,
        max_steps=3,
        learning_rate=1e-2,
    )
    run.train()
    gaps = logged(run, "vppo/sampler_gap_mean")
    print(f"LoRA: {gaps}")
    assert len(gaps) == 3 and max(gaps) < EXACT


def test_pictures_of_tools(tmp_path: Path) -> None:
    """Rollouts call a tool, each for a picture of its own; what follows is sampled with both pictures."""
    folder = saved("qwen2_5_vl", tmp_path / "model", qwen3_vl_chat_template)
    run = answering(
        tmp_path / "run", folder, rows(2), tools=[look], max_completion_length=250, vllm_max_model_length=1024,
        max_steps=1,
    )  # fmt: skip
    call_it_first(run)
    seen: list[Any] = []
    generate = run.vllm_generation.llm.generate
    run.vllm_generation.llm.generate = lambda prompts, *args, **kwargs: (
        seen.extend(prompts) or generate(prompts, *args, **kwargs)
    )
    run.train()
    placeholder = families.VOCABULARY["<|image_pad|>"]
    assert [prompt["prompt_token_ids"].count(placeholder) for prompt in seen] == [2] * 8
    gaps = logged(run, "vppo/sampler_gap_mean")
    print(f"tools: {gaps}")
    assert len(gaps) == 1 and gaps[0] < EXACT
