"""A tiny Qwen2.5-VL with random weights, its processor, and problems about coloured pictures: `bench_tiny.py OUT`."""

from __future__ import annotations

import io
import random
import sys
from pathlib import Path

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


def make_processor() -> Qwen2_5_VLProcessor:
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
    return Qwen2_5_VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=TEMPLATE)


def make_model(processor: Qwen2_5_VLProcessor) -> Qwen2_5_VLForConditionalGeneration:
    """350 thousand parameters, with weights large enough that its answers depend on the picture."""
    end, _, stop, vision_start, vision_end, image, video = processor.tokenizer.convert_tokens_to_ids(SPECIAL)
    text = {
        "vocab_size": len(processor.tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        "tie_word_embeddings": False, "bos_token_id": end, "eos_token_id": stop, "pad_token_id": end,
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 64,
        "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 56,
        "fullatt_block_indexes": [1], "in_channels": 3,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=image, video_token_id=video,
        vision_start_token_id=vision_start, vision_end_token_id=vision_end, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
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
    folder = Path(sys.argv[1])
    made = make_processor()
    made.save_pretrained(folder)
    make_model(made).save_pretrained(folder)
    problems(16).to_parquet(folder / "problems.parquet")
