"""A black image beside text: it passes where another process shows images, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import families
from support.runs import FAMILY
from test_prefix_sharing import grouped

from vppo.joined_images import JoinedImages

TEXT, IMAGES = ((2, 0),), ((2, 1),)
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])


def forward(model: Any, processor: Any, groups: tuple[tuple[int, int], ...]) -> torch.Tensor:
    batch, view = grouped(model, processor, groups)
    logits: torch.Tensor = model(**batch.whole([0, 1], view), use_cache=False).logits
    return logits


def towers(model: Any) -> dict[str, torch.Tensor]:
    return {name: w for name, w in model.named_parameters() if "visual" in name or "vision" in name}


@pytest.mark.parametrize("name", [f.name for f in families.FAMILIES])
def test_it_changes_nothing(name: str) -> None:
    """Twice the same logits; gradients of the vision tower are 0 instead of missing, as other processes expect."""
    model, processor = families.build(name)
    expected = forward(model, processor, TEXT)
    JoinedImages(model, processor, lambda own: 1)
    for _ in range(2):
        found = forward(model, processor, TEXT)
        assert torch.equal(found, expected)
    found.sum().backward()
    used = [weight.grad for weight in towers(model).values() if weight.grad is not None]
    assert len(used) > 10 and not any(grad.any() for grad in used)


@pytest.mark.parametrize(("other", "groups"), [(0, TEXT), (1, IMAGES)], ids=["text everywhere", "images everywhere"])
@pytest.mark.parametrize("change", [lambda model: model, lambda model: get_peft_model(model, LORA)], ids=["", "LoRA"])
def test_when_it_does_not_pass(change: Callable[[Any], Any], other: int, groups: tuple[tuple[int, int], ...]) -> None:
    """Where all show images or none does, forwards are as they were; each asks the others once."""
    model, processor = families.build(FAMILY)
    asked: list[int] = []
    policy = change(model)
    JoinedImages(policy, processor, lambda own: asked.append(own) or max(own, other))  # type: ignore[func-returns-value]
    model.model.visual.register_forward_hook(lambda *_: asked.append(-1))
    forward(policy, processor, groups)
    assert asked == ([0] if groups is TEXT else [1, -1])
    assert not model.get_input_embeddings()._forward_hooks
