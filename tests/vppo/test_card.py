"""The README.md that a saved run leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import LoraConfig
from support import families
from support.runs import FAMILY, trainer

TITLES = {
    "vppo": "Spotlight on Token Perception for Multimodal Reinforcement Learning",
    "dapo": "DAPO: An Open-Source LLM Reinforcement Learning System at Scale",
    "grpo": "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
}


def card(path: Path, name: str = "", lora: bool = False, **changes: object) -> str:
    model, _ = families.build(FAMILY)
    model.config._name_or_path = name
    peft = LoraConfig(r=2, target_modules=["q_proj"]) if lora else None
    trainer(path, model=model, peft_config=peft, max_steps=1, save_strategy="steps", save_steps=1, **changes).train()
    assert (path / "checkpoint-1").is_dir()
    return (path / "README.md").read_text()


@pytest.mark.parametrize(
    ("algorithm", "name", "paper", "tag"),
    [
        ("vppo", "VPPO", "vppo", "vppo"),
        ("tgf", "VPPO's token filtering alone", "vppo", "vppo"),
        ("tas", "VPPO's advantage shaping alone", "vppo", "vppo"),
        ("dapo", "DAPO's objective, without dynamic sampling", "dapo", "dapo"),
        ("grpo", "GRPO", "grpo", "grpo"),
    ],
)
def test_a_card_names_what_was_run(algorithm: str, name: str, paper: str, tag: str, tmp_path: Path) -> None:
    text = card(tmp_path, algorithm=algorithm)
    assert f"This model was trained with {name}, a method introduced in [{TITLES[paper]}]" in text
    assert f"Cite {name} as:" in text
    assert [title in text for title in TITLES.values()] == [key == paper for key in TITLES]
    assert f"\n- {tag}\n" in text and ("\n- grpo\n" in text) == (algorithm == "grpo")
    assert f"`algorithm: {algorithm}`" in text and ("`divergence: kl`" in text) == (paper == "vppo")


def test_where_vppo_was_published(tmp_path: Path) -> None:
    text = card(tmp_path)
    assert "https://huggingface.co/papers/2510.09285" in text and "arXiv:2510.09285" in text
    assert "International Conference on Learning Representations" in text and "2026" in text


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("", "This model is a fine-tuned `qwen2_5_vl` model."),
        ("{folder}/tiny-vl", "This model is a fine-tuned version of `tiny-vl`, a `qwen2_5_vl` model."),
        ("org/tiny-vl", "This model is a fine-tuned version of [org/tiny-vl](https://huggingface.co/org/tiny-vl)."),
    ],
    ids=["built", "folder", "hub"],
)
def test_what_training_began_with(name: str, sentence: str, lora: bool, tmp_path: Path) -> None:
    (tmp_path / "tiny-vl").mkdir()
    text = card(tmp_path / "run", name.format(folder=tmp_path), lora=lora)
    assert sentence in text and "None" not in text and str(tmp_path) not in text
    assert 'pipeline("image-text-to-text", model="path/to/this/model"' in text
