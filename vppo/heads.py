"""A model's head: what happens to its logits, and its forward replaced while a pass runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypedDict

from torch import Tensor

from vppo.exchange import exchanged

HeadForward = Callable[[Any, Tensor], Tensor | None]


class LogitOptions(TypedDict):
    """What happens to a logit after the head; see `vppo_kernels.linear_divergence`."""

    temperature: float
    logit_scale: float
    softcap: float | None


def logit_options(model: Any, temperature: float) -> LogitOptions:
    """What the model does to a logit after its head, as `linear_divergence` takes it."""
    config = model.config.get_text_config()
    names = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
    name = next((name for name in names if getattr(config, name, None) is not None), None)
    scale = 1.0 if name is None else float(getattr(config, name))
    if name == "logits_scaling" and config.model_type != "hyperclovax":  # that one multiplies by it, all others divide
        scale = 1.0 / scale
    return {
        "temperature": temperature,
        "logit_scale": scale,
        "softcap": getattr(config, "final_logit_softcapping", None),
    }


@contextmanager
def head_forward(model: Any, forward: HeadForward) -> Iterator[None]:
    """Within the block, the model's head calls `forward(head, hidden)` instead of multiplying.

    The head's own forward is where FSDP, DeepSpeed and offloading make the weight whole, so that is where it may be
    read. Its matrix product never runs, and no logits exist; what `forward` returns stands in for them, so that whoever
    looks for gradients behind the model's output finds them.
    """
    head = model.get_output_embeddings()
    name = "_old_forward" if hasattr(head, "_hf_hook") else "forward"  # accelerate's hook brings offloaded weights

    def stand_in(hidden: Tensor) -> Tensor:
        found = forward(head, hidden)
        return hidden[..., :1] if found is None else found

    with exchanged(head, **{name: stand_in}):
        yield
