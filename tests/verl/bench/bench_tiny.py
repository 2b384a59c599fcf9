"""A tiny model with random weights, its processor, and problems about coloured pictures: `bench_tiny.py OUT [KIND]`.

It is a Qwen2.5-VL, one with "tied" embeddings, one with a "large" vocabulary, or a "qwen3" VL.
"""

from __future__ import annotations

import io
import random
import sys
from pathlib import Path
from typing import Any

import bench_torchvision  # noqa: F401  (before transformers)
import pandas as pd
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SPECIAL += ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 230)}


LARGE = 65536  # words of the large vocabulary


def make_processor(kind: str) -> Any:
    """One token a byte."""
    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    letters = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    letters.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letters, eos_token=SPECIAL[2], pad_token=SPECIAL[0], additional_special_tokens=SPECIAL[1:]
    )
    tokenizer.image_token, tokenizer.video_token, tokenizer.chat_template = SPECIAL[5], SPECIAL[6], TEMPLATE
    images = Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=112 * 112)
    if kind == "qwen3":
        images = Qwen2VLImageProcessor(
            patch_size=16, min_pixels=64 * 64, max_pixels=128 * 128, image_mean=[0.5] * 3, image_std=[0.5] * 3
        )
        return Qwen3VLProcessor(images, tokenizer, Qwen3VLVideoProcessor(), chat_template=TEMPLATE)
    return Qwen2_5_VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=TEMPLATE)


def make_model(kind: str, processor: Any) -> Any:
    """350 thousand parameters, with weights large enough that its answers depend on the picture."""
    end, _, stop, vision_start, vision_end, image, video = processor.tokenizer.convert_tokens_to_ids(SPECIAL)
    words = LARGE if kind == "large" else len(processor.tokenizer)
    text = {
        "vocab_size": words, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        "tie_word_embeddings": kind == "tied", "bos_token_id": end, "eos_token_id": stop, "pad_token_id": end,
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 64,
        "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 56,
        "fullatt_block_indexes": [1], "in_channels": 3,
    }  # fmt: skip
    tokens = {
        "image_token_id": image, "video_token_id": video, "vision_start_token_id": vision_start,
        "vision_end_token_id": vision_end, "tie_word_embeddings": kind == "tied",
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "qwen3":
        text |= {"head_dim": 16}
        vision = {
            "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 64,
            "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
            "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
        }  # fmt: skip
        model: Any = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **tokens))
    else:
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(3.0)
    return model


def picture(index: int, colour: str) -> Image.Image:
    image = Image.new("RGB", (56, 56 if index % 2 else 84), COLOURS[colour])
    image.putpixel((0, 0), (index, index, index))
    return image


def problems(count: int) -> pd.DataFrame:
    """As verl reads them; every fourth is text alone."""
    rows, draws = [], random.Random(0)
    for index in range(count):
        colour = draws.choice(list(COLOURS))
        stored = io.BytesIO()
        picture(index, colour).save(stored, "PNG")
        shown = index % 4 != 3
        rows.append(
            {
                "data_source": "colours",
                "prompt": [{"role": "user", "content": f"{'<image>' * shown}colour {index % 10}?"}],
                "images": [{"bytes": stored.getvalue()}] * shown,
                "reward_model": {"style": "rule", "ground_truth": colour},
                "extra_info": {"index": index},
            }
        )
    return pd.DataFrame(rows)


if __name__ == "__main__":
    folder, kind = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else ""
    made = make_processor(kind)
    made.save_pretrained(folder)
    make_model(kind, made).save_pretrained(folder)
    asked = problems(16)
    asked.to_parquet(folder / "problems.parquet")
    asked[asked["images"].map(bool)].to_parquet(folder / "shown.parquet")
