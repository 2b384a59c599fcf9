"""The trainer on one tiny model: what it does to a generation batch, to the loss and to the metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
from datasets import Dataset

from vppo import VPPOConfig, VPPOTrainer


def rows(count: int, sizes: tuple[tuple[int, int], ...] = ((56, 28),)) -> Dataset:
    """`count` prompts with one random image each."""
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"How much {i}?"}],
                "images": [families.picture(i, sizes[i % len(sizes)])],
                "answer": str(i),
            }
            for i in range(count)
        ]
    )


def varied_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """Differs between rollouts, and depends on nothing but their text."""
    return [sum(map(ord, completion[0]["content"])) % 7 / 7.0 for completion in completions]


def config(path: Path, **changes: Any) -> VPPOConfig:
    return VPPOConfig(
        **{
            "output_dir": str(path),
            "per_device_train_batch_size": 4,
            "num_generations": 4,
            "max_completion_length": 6,
            "max_steps": 2,
            "logging_steps": 1,
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "learning_rate": 1e-3,
            "generation_kwargs": {"suppress_tokens": families.PLACEHOLDERS},
            **changes,
        }
    )


@pytest.mark.parametrize("family", [f.name for f in families.FAMILIES])
def test_two_steps_of_every_family(family: str, tmp_path: Path) -> None:
    model, processor = families.build(family)
    trainer = VPPOTrainer(
        model=model,
        reward_funcs=varied_reward,
        args=config(tmp_path),
        train_dataset=rows(4),
        processing_class=processor,
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["vppo/dependency_mean"] > 1e-3
    assert 0.3 < log["vppo/kept_fraction"] < 0.8
