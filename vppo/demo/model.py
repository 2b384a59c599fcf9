"""A Qwen2.5-VL of about a million parameters, its tokenizer and its processor, from configs alone."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vppo.processors import without_video

PATCH, MERGE = 14, 2
CELL = PATCH * MERGE  # one image token covers a square of this side, in pixels
WIDTH = 128

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, IMAGE, VIDEO = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
UNKNOWN = "<|unknown|>"
SPECIAL = [PAD, START, END, VISION_START, VISION_END, IMAGE, VIDEO, UNKNOWN]
WORDS = ["\\boxed{", "user", "assistant", "system"]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    f"{START}{{{{ message['role'] }}}}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    f"{{% if part['type'] == 'image' %}}{VISION_START}{IMAGE}{VISION_END}"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    f"{END}\n"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{START}assistant\n{{% endif %}}"
)


def build_tokenizer(words: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    r"""One token per printable character; the roles of a chat, `\boxed{` and `words` are single tokens too."""
    words = [*WORDS, *words]
    tokens = [*SPECIAL, *words, *string.printable[:95], "\n"]
    core = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token=UNKNOWN))
    pattern = "|".join(word.replace("\\", "\\\\").replace("{", "\\{") for word in words)
    core.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{pattern}|[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        extra_special_tokens={"image_token": IMAGE, "video_token": VIDEO},
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    return tokenizer


def build_processor(words: Sequence[str] = ()) -> Any:
    """Tokenizer and image processor, normalised to the digits; images of up to 16 cells keep their size.

    Args:
        words: Single tokens beside those of the demo; none begins another.
    """
    size = {"shortest_edge": CELL**2, "longest_edge": 16 * CELL**2}
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=MERGE, size=size, image_mean=[0.305] * 3, image_std=[0.376] * 3
    )
    return without_video(Qwen2_5_VLProcessor)(image_processor, build_tokenizer(words), chat_template=CHAT_TEMPLATE)


def build_model(processor: Any, seed: int, width: int = WIDTH) -> Qwen2_5_VLForConditionalGeneration:
    """The model with random weights; the same seed gives the same weights.

    Args:
        processor: From `build_processor`.
        seed: Of the weights.
        width: Of language model and vision tower, a multiple of 64.
    """
    tokenizer = processor.tokenizer
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in _TOKEN_IDS.items()}
    # The usual sections and base turn neighbours in width by 0.003: digits side by side would look alike in place.
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": 3,
        "num_attention_heads": width // 32,
        "num_key_value_heads": width // 64,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 12], "rope_theta": 30.0},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "depth": 2,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_heads": 4,
        "out_hidden_size": width,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "fullatt_block_indexes": [1],
        "window_size": 4 * CELL,
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    _initialise(model, seed)
    return model


_TOKEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}


@torch.no_grad()
def _initialise(model: torch.nn.Module, seed: int) -> None:
    """Weights scaled by their fan-in: at this width the usual 0.02 leaves the first hundred steps without a signal."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            continue
        std = 1.0 if "embed_tokens" in name else 0.02 if "lm_head" in name else weight[0].numel() ** -0.5
        weight.normal_(0.0, std, generator=generator)
