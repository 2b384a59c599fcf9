"""How much each response token depends on the image: two views through the model, one divergence at its head.

The divergence is computed *inside the head's own forward*: the head module is where FSDP, DeepSpeed and offloading make
the weight whole, so that is where it may be read. The head's matrix product itself never runs, and no logits exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypedDict

import torch
from torch import Tensor
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

from vppo.perturbations import Perturbation, PixelLayout, perturb
from vppo_kernels import linear_divergence, linear_logprob, sampled_divergence

# the entries of a TRL batch that a model's forward takes, beside the tokens and their mask
MODEL_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "image_position_ids",
    "token_type_ids",
    "mm_token_type_ids",
)


class LogitOptions(TypedDict):
    """What happens to a logit after the head; see `vppo_kernels.linear_divergence`."""

    temperature: float
    logit_scale: float
    softcap: float | None


HeadForward = Callable[[Any, Tensor], None]


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
    """Within the block, the model's head calls `forward(head, hidden)` instead of multiplying."""
    head = model.get_output_embeddings()
    name = "_old_forward" if hasattr(head, "_hf_hook") else "forward"  # accelerate's hook brings offloaded weights
    before = head.__dict__.get(name)

    def stand_in(hidden: Tensor) -> Tensor:
        forward(head, hidden)
        return hidden[..., :1]  # what the model takes for logits; nobody reads it

    setattr(head, name, stand_in)
    try:
        yield
    finally:
        if before is None:
            delattr(head, name)
        else:
            setattr(head, name, before)


class Batch:
    """The rows of a TRL batch with their images apart, so that any of them can be taken together.

    Args:
        inputs: What `GRPOTrainer._generate_and_score_completions` returns.
    """

    def __init__(self, inputs: dict[str, Any]) -> None:
        self.split = split_pixel_values_by_grid(inputs)
        self.completion_ids: Tensor = inputs["completion_ids"]
        self.input_ids = torch.cat([inputs["prompt_ids"], self.completion_ids], dim=1)
        self.attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        tool_mask = inputs.get("tool_mask")
        response = inputs["completion_mask"] if tool_mask is None else inputs["completion_mask"] * tool_mask
        self.mask: Tensor = response.bool()
        count = inputs.get("num_images")
        if "pixel_values" not in inputs:
            count = [0] * len(self.input_ids)
        elif count is None:
            count = [1] * len(self.input_ids)
        self.has_image = torch.tensor([n > 0 for n in count], device=self.input_ids.device)

    def perturbed_pixels(
        self, row: int, layout: PixelLayout, perturbation: Perturbation, generator: torch.Generator
    ) -> Tensor:
        """The perturbed view of one row's images, in the layout of its `pixel_values`."""
        grids, inside = self.split.get("image_grid_thw"), self.split.get("pixel_attention_mask")
        return perturb(
            self.split["pixel_values"][row],
            layout,
            perturbation,
            generator,
            grid=None if grids is None else grids[row],
            inside=None if inside is None else inside[row],
        )

    def model_inputs(self, rows: Sequence[int], pixels: dict[int, Tensor] | None = None) -> dict[str, Any]:
        """What the model's forward takes for these rows; `pixels` replaces their images by a perturbed view."""
        chosen: dict[str, Any] = {}
        for name in MODEL_INPUTS:
            values = self.split.get(name)
            if values is None:
                continue
            if name == "pixel_values" and pixels is not None:
                views = [pixels[row] for row in rows]
                chosen[name] = views if isinstance(values, list) else torch.stack(views)
            elif isinstance(values, list):
                chosen[name] = [values[row] for row in rows]
            else:
                chosen[name] = values[list(rows)]
        index = list(rows)
        return {
            "input_ids": self.input_ids[index],
            "attention_mask": self.attention_mask[index],
            **unsplit_pixel_values_by_grid(chosen),
        }


def response_hidden(model: Any, inputs: dict[str, Any], length: int) -> Tensor:
    """`[rows, length, D]` hidden states that predict the last `length` tokens of each row."""
    found: list[Tensor] = []
    with head_forward(model, lambda head, hidden: found.append(hidden[:, -(length + 1) : -1])):
        model(**inputs, use_cache=False)
    return found[0]


def dependency_of(
    model: Any,
    inputs_perturbed: dict[str, Any],
    hidden_clean: Tensor,
    completion_ids: Tensor,
    mask: Tensor,
    *,
    kind: str,
    options: LogitOptions,
    check: bool = False,
) -> Tensor:
    """Dependency of each response token, given the clean view's hidden states.

    Args:
        model: The policy; its forward is run once, on the perturbed view.
        inputs_perturbed: What that forward takes.
        hidden_clean: `[rows, T, D]` from `response_hidden`.
        completion_ids: `[rows, T]`.
        mask: `[rows, T]` bool, the response tokens; only these meet the head.
        kind: "kl", "reverse_kl", "jsd" or "k3".
        options: From `logit_options`.
        check: Compare a sample with the float64 definition.

    Returns:
        `[rows, T]` float32 in nats, 0 where `mask` is 0.
    """
    dependency = torch.zeros(mask.shape, device=mask.device)
    length = mask.shape[1]

    def at_head(head: Any, hidden: Tensor) -> None:
        clean, perturbed = hidden_clean[mask], hidden[:, -(length + 1) : -1][mask]
        clean = clean.to(perturbed.device)
        weight, bias = head.weight, getattr(head, "bias", None)
        targets = completion_ids[mask].to(perturbed.device)
        if kind == "k3":
            logprobs, logprobs_perturbed = (
                linear_logprob(h, weight, targets, bias, check=check, **options).logprobs for h in (clean, perturbed)
            )
            values = sampled_divergence(logprobs, logprobs_perturbed, kind="k3")
        else:
            values = linear_divergence(clean, perturbed, weight, bias, kind=kind, check=check, **options).divergence
        dependency[mask] = values.to(dependency.device, dependency.dtype)

    with head_forward(model, at_head):
        model(**inputs_perturbed, use_cache=False)
    return dependency


@torch.no_grad()
def score(
    model: Any,
    batch: Batch,
    rows: Sequence[int],
    pixels: dict[int, Tensor],
    *,
    kind: str,
    options: LogitOptions,
    batch_size: int,
    hidden_clean: Tensor | None = None,
    most_rows: int = 0,
    check: bool = False,
) -> Tensor:
    """Dependency of the response tokens of the given rows, `batch_size` rows at a time.

    Args:
        model: The policy.
        batch: The rows' tokens and images.
        rows: Which rows; all of them have an image.
        pixels: The perturbed view of each of these rows.
        kind, options, check: As in `dependency_of`.
        batch_size: Rows in one forward.
        hidden_clean: `[B, T, D]` hidden states of the clean view where they are known already.
        most_rows: The most rows that any rank scores. A sharded model gathers its weights in every forward, so a rank
            with fewer rows must run as many forwards as the others; their results are not used.

    Returns:
        `[B, T]` float32 in nats, 0 at other rows and outside the responses.
    """
    dependency = torch.zeros(batch.mask.shape, device=batch.mask.device)
    length = batch.mask.shape[1]
    for start in range(0, max(len(rows), most_rows), batch_size):
        part = list(rows[start : start + batch_size])
        if not part:
            some_row = batch.model_inputs([int(batch.has_image.int().argmax())])
            for _ in range(2 if hidden_clean is None else 1):
                response_hidden(model, some_row, length)
            continue
        clean = response_hidden(model, batch.model_inputs(part), length) if hidden_clean is None else hidden_clean[part]
        dependency[part] = dependency_of(
            model,
            batch.model_inputs(part, pixels),
            clean,
            batch.completion_ids[part],
            batch.mask[part],
            kind=kind,
            options=options,
            check=check,
        )
    return dependency
