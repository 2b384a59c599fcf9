"""A run at once, or half of it, a stop and the other half: the same weights and the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from support import families
from support.runs import FAMILY, rows, trainer
from transformers import TrainerCallback

from vppo import VPPOTrainer
from vppo.errors import InputError

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


def worse_and_worse() -> Any:
    """A reward of which the first evaluation is the best."""
    calls = []

    def reward(completions: list[Any], **kwargs: Any) -> list[float]:
        calls.append(1)
        return [(i % 3) / 4 - len(calls) for i in range(len(completions))]

    return reward


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", [f.name for f in families.FAMILIES])
def test_the_best_model_comes_back_whole(family: str, lora: bool, tmp_path: Path) -> None:
    peft = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.0) if lora else None
    run = trainer(
        tmp_path, rows(4), family=family, peft_config=peft, reward=worse_and_worse(), max_steps=3, learning_rate=1e-2,
        save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4,
        eval_data=rows(1), load_best_model_at_end=True, metric_for_best_model="eval_reward", greater_is_better=True,
    )  # fmt: skip
    after: list[dict[str, Any]] = []
    run.add_callback(KeepWeights(after))
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-1") and len(after) == 3
    changed = [name for name, weight in after[0].items() if not torch.equal(weight, after[2][name])]
    assert changed
    for name, weight in run.model.named_parameters():
        assert torch.equal(weight, after[0][name]), name


class KeepWeights(TrainerCallback):
    """Copies the weights at every save."""

    def __init__(self, kept: list[dict[str, Any]]) -> None:
        self.kept = kept

    def on_save(self, *args: Any, model: Any, **kwargs: Any) -> None:
        self.kept.append({name: weight.detach().clone() for name, weight in model.named_parameters()})


WINDOWS: dict[str, tuple[dict[str, Any], int]] = {
    "a batch an update": ({}, 1),
    "two updates a batch": ({"gradient_accumulation_steps": 2, "steps_per_generation": 4}, 2),
    "a batch used three times": ({"num_iterations": 3}, 3),
    "both": ({"gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 2}, 4),
    "updates and batches out of step": ({"gradient_accumulation_steps": 2, "steps_per_generation": 3}, 3),
}


@pytest.mark.parametrize("window", WINDOWS)
def test_checkpoints_fall_between_rollouts(window: str, tmp_path: Path) -> None:
    changes, updates = WINDOWS[window]
    changes = {"per_device_train_batch_size": 4, "save_strategy": "steps", **changes}
    trainer(tmp_path, **changes, save_steps=2 * updates)
    trainer(tmp_path, **{**changes, "save_strategy": "no"}, save_steps=2 * updates + 1)
    if updates > 1:
        message = rf"save_steps: got {2 * updates + 1}, takes a multiple of {updates}, such as {2 * updates} or "
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, **changes, save_steps=2 * updates + 1)


def test_three_updates_a_batch(tmp_path: Path) -> None:
    check_resume(tmp_path, 6, num_iterations=3)


def test_a_checkpoint_between_two_updates_from_one_batch_is_refused(tmp_path: Path) -> None:
    changes = {"num_iterations": 2, "save_strategy": "steps", "save_steps": 0.3, "max_steps": 4}
    run = trainer(tmp_path, **changes)
    run.train()
    folder = tmp_path / "checkpoint-2"
    assert folder.is_dir()
    odd = folder.rename(tmp_path / "odd")
    (odd / "manifest.json").unlink()
    state = (odd / "trainer_state.json").read_text()
    (odd / "trainer_state.json").write_text(state.replace('"global_step": 2', '"global_step": 1'))
    with pytest.raises(InputError, match="odd was saved between two of the 2 updates from the same rollouts"):
        trainer(tmp_path, **changes).train(resume_from_checkpoint=str(odd))


def test_a_checkpoint_without_its_optimizer_is_refused(tmp_path: Path) -> None:
    changes = {"save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    trainer(tmp_path, **changes, max_steps=2).train()
    with pytest.raises(InputError, match="checkpoint-1 holds weights but no optimizer, as save_only_model leaves it"):
        trainer(tmp_path, **changes, max_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
