"""A run at once, or half of it, a stop and the other half: the same weights and the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from peft import LoraConfig
from runs import FAMILY, rows, trainer

from vppo import VPPOTrainer

CLOCK = ("time", "second", "runtime", "flos")  # what may differ between two runs


def logged(run: VPPOTrainer) -> list[dict[str, float]]:
    """The numbers of every step, timings aside."""
    steps = [log for log in run.state.log_history if "loss" in log]
    return [{name: value for name, value in log.items() if not any(word in name for word in CLOCK)} for log in steps]


def check_resume(path: Path, steps: int, family: str = FAMILY, lora: bool = False, **changes: Any) -> None:
    """`steps` at once against two halves; a new model and trainer take up the second."""

    def run(name: str, steps: int) -> VPPOTrainer:
        peft = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1) if lora else None
        return trainer(path / name, rows(6), family=family, peft_config=peft, max_steps=steps, **changes)

    changes = {"save_strategy": "steps", "save_steps": steps // 2, "learning_rate": 1e-2, **changes}
    whole = run("whole", steps)
    whole.train()
    run("halves", steps // 2).train()
    second = run("halves", steps)
    second.train(resume_from_checkpoint=str(path / "halves" / f"checkpoint-{steps // 2}"))

    assert len(logged(whole)) == steps
    assert logged(whole) == logged(second)
    assert logged(whole)[0]["grad_norm"] != logged(whole)[-1]["grad_norm"]
    resumed = dict(second.model.named_parameters())
    for name, weight in whole.model.named_parameters():
        assert torch.equal(weight, resumed[name]), name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"recipe": "official", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"gradient_accumulation_steps": 1, "steps_per_generation": 2},
        {"lora": True, "beta": 0.1},
    ],
    ids=["default", "official", "two steps a generation", "lora"],
)
def test_four_steps(changes: dict[str, Any], tmp_path: Path) -> None:
    check_resume(tmp_path, 4, **changes)


def test_in_the_second_epoch(tmp_path: Path) -> None:
    """Six prompts make six steps an epoch; TRL's own sampler would hand out the first epoch's order again."""
    check_resume(tmp_path, 16)


@pytest.mark.parametrize("family", [f.name for f in families.FAMILIES if f.name != FAMILY])
def test_every_family(family: str, tmp_path: Path) -> None:
    """Their checkpoints name weights as the hub does, which transformers itself does not undo on resuming."""
    check_resume(tmp_path, 2, family=family)
