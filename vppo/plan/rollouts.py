"""A generation batch of the largest rows that a run may meet, with fake pixels."""

from __future__ import annotations

import math
from typing import Any

import torch

from vppo.plan.fake import Fake
from vppo.plan.settings import Settings


def generation(settings: Settings, rows: int, mode: Fake) -> dict[str, Any]:
    """What TRL's trainer hands over: `rows` responses, all of full length, each prompt's one after the other."""
    config, vision = settings.config, settings.config.vision_config
    merge = vision.spatial_merge_size
    down = math.isqrt(settings.image_tokens)
    across = settings.image_tokens // down
    filler = next(
        token
        for token in range(config.get_text_config().vocab_size)
        if token not in {config.image_token_id, config.video_token_id, getattr(config, "vision_start_token_id", None)}
    )
    start = getattr(config, "vision_start_token_id", filler)
    image = [start, *[config.image_token_id] * (down * across)]
    text = max(settings.text_tokens - settings.images, 2)
    prompt = torch.tensor([filler, *image * settings.images, *[filler] * (text - 1)])
    prompts = prompt.repeat(rows, 1)
    responses = torch.full((rows, settings.response_tokens), filler)
    tokens = torch.cat([prompts, responses], 1)
    inputs: dict[str, Any] = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": responses,
        "completion_mask": torch.ones_like(responses),
        "mm_token_type_ids": (tokens == config.image_token_id).long(),
    }
    if settings.images:
        count = rows * settings.images
        channels = getattr(vision, "in_channels", 3) * getattr(vision, "temporal_patch_size", 2) * vision.patch_size**2
        with mode:
            inputs["pixel_values"] = torch.empty(count * down * across * merge**2, channels)
        inputs["image_grid_thw"] = torch.tensor([[1, down * merge, across * merge]]).repeat(count, 1)
        inputs["num_images"] = [settings.images] * rows
    return inputs
