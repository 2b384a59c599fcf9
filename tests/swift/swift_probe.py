"""A plug-in before the recipe's: what the tests need of ms-swift, and what the recipe did, in the folder PROBE."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from swift.rewards import ORM, orms
from swift.rlhf_trainers.grpo_trainer import GRPOTrainer
from swift.template.templates.qwen import Qwen2VLTemplate
from transformers import AutoConfig

import vppo.dependency

OUT = Path(os.environ["PROBE"])
Qwen2VLTemplate.image_token_id = AutoConfig.from_pretrained(os.environ["TINY"]).image_token_id  # it has Qwen's own


class Letters(ORM):
    """A reward that any answer has some of."""

    def __call__(self, completions: list[str], **_: Any) -> list[float]:
        return [sum(ord(letter) % 3 == 0 for letter in text) / max(1, len(text)) for text in completions]


orms["letters"] = Letters
measure, postprocess, loss = (
    vppo.dependency.measure_dependency,
    GRPOTrainer._postprocess_batch,
    GRPOTrainer._compute_loss_and_metrics,
)
seen: dict[str, list[Any]] = {"dependency": [], "before": [], "after": [], "mask": []}


def measured(*args: Any, **options: Any) -> torch.Tensor:
    seen["dependency"].append(measure(*args, **options))
    return seen["dependency"][-1]


def postprocessed(self: Any, samples: Any, batches: Any) -> None:
    postprocess(self, samples, batches)
    seen["before"] += [batch["grpo_batch"].advantages.clone() for batch in batches]
    seen["mask"] += [batch["grpo_batch"].completion_mask for batch in batches]


def trained(self: Any, model: Any, inputs: Any, grpo_batch: Any) -> Any:
    seen["after"].append(grpo_batch.advantages.clone())
    torch.save(seen, OUT / "seen.pt")
    return loss(self, model, inputs, grpo_batch)


vppo.dependency.measure_dependency = measured
GRPOTrainer._postprocess_batch = postprocessed
GRPOTrainer._compute_loss_and_metrics = trained
