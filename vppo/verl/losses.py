"""What workers add to verl's loss and to its metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from verl.utils.metric import Metric
from verl.workers.utils.padding import no_padding_2_padding

from vppo.monitoring.measured import spread
from vppo.released_scale import micro_batch_scale

DRIFT, ALPHA = "vppo_drift", "vppo_alpha"  # begin what workers tell the trainer of them
MEANS, SCALES = "vppo_means", "vppo_scales"  # what it tells them of trajectories whose factors they find


def with_penalty(loss_function: Callable[..., Any], coefficient: float) -> Callable[..., Any]:
    """verl's loss plus the mean of -log p over all response tokens of the update, as the released code has it."""

    def penalised(model_output: Any, data: Any, dp_group: Any = None) -> Any:
        loss, metrics = loss_function(model_output=model_output, data=data, dp_group=dp_group)
        logprobs = no_padding_2_padding(model_output["log_probs"], data)
        mask = data["response_mask"].to_padded_tensor(0).bool()
        nll = -torch.where(mask, logprobs, 0).sum() / data["batch_num_tokens"] * data["dp_size"]
        return loss + coefficient * nll, metrics

    return penalised


def with_drift(loss_function: Callable[..., Any]) -> Callable[..., Any]:
    """verl's loss, whose metrics tell how far the policy is from the one that was scored.

    They are sums of k3 of the log-probabilities of tokens with gradient and without, and their numbers, as
    `drift_metrics` takes them.
    """

    def watched(model_output: Any, data: Any, dp_group: Any = None) -> Any:
        loss, metrics = loss_function(model_output=model_output, data=data, dp_group=dp_group)
        old, advantages = (data[name].to_padded_tensor(0.0) for name in ("old_log_probs", "advantages"))
        mask = data["response_mask"].to_padded_tensor(0).bool()
        gap = no_padding_2_padding(model_output["log_probs"].detach(), data) - old
        gap = torch.where(mask, gap, 0).clamp(-20, 20)
        drift, kept = gap.exp() - gap - 1, mask & (advantages != 0)
        sums: dict[str, Any] = {}
        for name, tokens in (("kept", kept), ("filtered", mask & ~kept)):
            sums |= {f"{DRIFT}_{name}": (drift * tokens).sum(), f"{DRIFT}_{name}_tokens": tokens.sum()}
        return loss, {**metrics, **Metric.from_dict(sums, aggregation="sum")}

    return watched


def with_micro_batch_scale(
    loss_function: Callable[..., Any], window: Tensor, scale_min: float, scale_max: float | None
) -> Callable[..., Any]:
    """verl's loss of advantages that are multiplied by the released code's factors of trajectories.

    Args:
        loss_function: verl's.
        window, scale_min, scale_max: As in `micro_batch_scale`; a micro-batch brings its own `MEANS`.
    """

    def scaled(model_output: Any, data: Any, dp_group: Any = None) -> Any:
        advantages = data["advantages"]
        alpha = micro_batch_scale(data[MEANS], window.to(data[MEANS].device), scale_min, scale_max)
        factors = alpha.to(advantages.dtype)
        rows = [row * factor for row, factor in zip(advantages.unbind(), factors, strict=True)]
        data = data.copy()
        data["advantages"] = torch.nested.as_nested_tensor(rows, layout=torch.jagged)  # which knows its padded width
        loss, metrics = loss_function(model_output=model_output, data=data, dp_group=dp_group)
        found = {
            f"{ALPHA}_{name}": Metric(aggregation=name if name in ("min", "max") else "mean", value=value)
            for name, value in spread(alpha).items()
        }
        return loss, {**metrics, **found}

    return scaled


def alpha_metrics(metrics: dict[str, Any]) -> dict[str, float]:
    """What `with_micro_batch_scale` has told of factors, named as it is logged; takes it out of `metrics`."""
    names = [name for name in metrics if name.startswith(f"actor/{ALPHA}_")]
    return {f"vppo/{name.removeprefix('actor/vppo_')}": float(metrics.pop(name)) for name in names}


def drift_metrics(metrics: dict[str, Any]) -> dict[str, float]:
    """Means in nats, named as they are logged, of the sums that `with_drift` has left; takes them out of `metrics`."""
    found = {}
    for name in ("kept", "filtered"):
        total, tokens = (metrics.pop(f"actor/{DRIFT}_{name}{end}", 0.0) for end in ("", "_tokens"))
        if tokens:
            found[f"vppo/drift_{name}"] = float(total / tokens)
    return found
