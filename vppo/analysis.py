"""Scores given responses token by token: how much each depends on the image, and which a filter would keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vppo.batch import Batch, View
from vppo.heads import logit_options
from vppo.passes import ResponsePasses
from vppo.perturbations import Perturbation, PixelLayout, seeded
from vppo.scored import ScoredResponse
from vppo.scoring import score
from vppo_kernels import topk_mask


def score_responses(
    model: Any,
    processor: Any,
    rows: Sequence[dict[str, Any]],
    *,
    divergence: str = "kl",
    perturbation: Perturbation | None = None,
    keep_ratio: float = 0.4,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
) -> list[ScoredResponse]:
    """Dependency of every token of given responses on their image.

    Args:
        model: A vision-language model; it is left in the mode it was in.
        processor: Its processor, with a chat template.
        rows: One dict per response: "prompt" (conversational, as TRL takes it), "images" (list of PIL images, at least
            one), "response_ids" (list of token ids), "answer" (the reference answer) and "correct" (bool).
        divergence: "kl", "reverse_kl", "jsd" or "k3".
        perturbation: What the perturbed view does; None blackens half of the model's own patches.
        keep_ratio: Fraction of each response that counts as kept, in (0, 1].
        temperature: Divides the logits of both views.
        seed: Of the perturbation; row `i` is drawn from (seed, i).
        batch_size: Rows in one forward.

    Returns:
        One `ScoredResponse` per row, in order; dependencies in nats.

    Raises:
        ValueError: A row has no image or no response token; the message names it.
    """
    for index, row in enumerate(rows):
        for name in ("images", "response_ids"):
            if not len(row.get(name) or ()):
                raise ValueError(f"rows: row {index} has an empty {name!r}, takes at least one entry")
    layout = PixelLayout.of(processor.image_processor)
    perturbation = perturbation or Perturbation(patch_size=layout.patch_size)
    training = model.training
    model.eval()
    passes = ResponsePasses(model)
    try:
        scored = []
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            batch = Batch(_batch_inputs(model, processor, part))
            pixels = {
                row: batch.perturbed_pixels(row, layout, perturbation, seeded(seed, start + row))
                for row in range(len(part))
            }
            keys = list(range(len(part)))  # a row is a prompt of its own
            dependency = score(
                passes,
                batch,
                keys,
                View(keys),
                View(keys, pixels),
                kind=divergence,
                options=logit_options(model, temperature),
            )
            keep = topk_mask(dependency, batch.mask, keep_ratio)
            for index, row in enumerate(part):
                scored.append(_scored(row, processor, batch, layout, index, pixels[index], dependency, keep))
    finally:
        model.train(training)
    return scored


def _scored(
    row: dict[str, Any],
    processor: Any,
    batch: Batch,
    layout: PixelLayout,
    index: int,
    pixels: Tensor,
    dependency: Tensor,
    keep: Tensor,
) -> ScoredResponse:
    grids = batch.split.get("image_grid_thw")
    grid = None if grids is None else grids[index]
    tokens = batch.mask[index]
    ids = batch.completion_ids[index][tokens].tolist()
    return ScoredResponse(
        image=layout.pictures(batch.split["pixel_values"][index], grid)[0],
        perturbed_image=layout.pictures(pixels, grid)[0],
        question=_text_of(row["prompt"]),
        answer=str(row["answer"]),
        correct=bool(row["correct"]),
        tokens=[processor.tokenizer.decode([token]) for token in ids],
        dependency=dependency[index][tokens].cpu().numpy().astype(np.float32),
        kept=keep[index][tokens].cpu().numpy(),
    )


def _text_of(prompt: Sequence[dict[str, Any]]) -> str:
    """The user's text of a conversational prompt."""
    parts = []
    for message in prompt:
        if message["role"] == "user":
            content = message["content"]
            parts += [content] if isinstance(content, str) else [p["text"] for p in content if p["type"] == "text"]
    return "\n".join(parts)


def _batch_inputs(model: Any, processor: Any, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Prompts, images and responses as the padded tensors that a TRL batch consists of."""
    from trl.data_utils import prepare_multimodal_messages
    from trl.trainer.utils import pad

    texts = [
        processor.apply_chat_template(
            prepare_multimodal_messages(row["prompt"], images=row["images"]),
            add_generation_prompt=True,
            tokenize=False,
        )
        for row in rows
    ]
    images = [list(row["images"]) for row in rows]
    shown = images if any(images) else None
    encoded = processor(images=shown, text=texts, padding=True, padding_side="left", return_tensors="pt")
    encoded = {name: value.to(model.device) for name, value in encoded.items()}
    responses = [torch.tensor(row["response_ids"], device=model.device) for row in rows]
    pad_id = processor.tokenizer.pad_token_id
    completion_ids = pad(responses, padding_value=pad_id, padding_side="right")
    completion_mask = pad([torch.ones_like(r) for r in responses], padding_value=0, padding_side="right")
    inputs = {
        "prompt_ids": encoded.pop("input_ids"),
        "prompt_mask": encoded.pop("attention_mask"),
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "num_images": [len(group) for group in images],
        **encoded,
    }
    for name in ("token_type_ids", "mm_token_type_ids"):  # one entry per token: the response is text
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], torch.zeros_like(completion_ids)], dim=1)
    return inputs
