"""Families of vision-language models, tiny and built from configurations alone: no hub, no torchvision.

Weights are random but scaled so that the image reaches the logits: a few tokens tell the views apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vppo.processors import without_video

SPECIAL = [
    "<pad>",
    "<eos>",
    "<unk>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<image>",
    "<fake_token_around_image>",
    "<end_of_utterance>",
    "<global-img>",
    "<start_of_image>",
    "<image_soft_token>",
    "<end_of_image>",
    *[f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)],
]
CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n"]
VOCABULARY = {token: index for index, token in enumerate([*SPECIAL, *CHARACTERS])}
PLACEHOLDERS = [VOCABULARY[token] for token in SPECIAL if token != "<eos>"]  # nothing that a response should hold
HIDDEN = 32


def tokenizer(image_token: str) -> PreTrainedTokenizerFast:
    """One token per printable character, and the placeholders of all families."""
    core = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={
            "image_token": image_token,
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "start_image_token": "<|vision_start|>",
            "end_image_token": "<|vision_end|>",
            "context_image_token": "<image>",
            "video_token": "<|video_pad|>",
        },
        padding_side="left",
    )
    fast.add_tokens(SPECIAL, special_tokens=True)
    return fast


def chat_template(image: str) -> str:
    """Role letter, content, newline; each image part becomes the family's placeholder."""
    return (
        "{% for message in messages %}{{ message['role'][0] }}:"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + image + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
        "\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    )


TEXT: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": VOCABULARY["<pad>"],
    "eos_token_id": VOCABULARY["<eos>"],
    "bos_token_id": None,
    "initializer_range": 0.2,
}
HEAD = {"head_dim": 16}  # of families whose config does not take it from the width
MROPE: dict[str, Any] = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
QWEN_TOKENS = {
    "image_token_id": VOCABULARY["<|image_pad|>"],
    "video_token_id": VOCABULARY["<|video_pad|>"],
    "vision_start_token_id": VOCABULARY["<|vision_start|>"],
    "vision_end_token_id": VOCABULARY["<|vision_end|>"],
}
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def _qwen_processor(processor: type, patch: int) -> Any:
    cell = (2 * patch) ** 2
    return without_video(processor)(
        Qwen2VLImageProcessorPil(patch_size=patch, size={"shortest_edge": cell, "longest_edge": 16 * cell}),
        tokenizer("<|image_pad|>"),
        chat_template=chat_template(QWEN_IMAGE),
    )


def _qwen2_vl() -> tuple[Any, Any]:
    config = Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": MROPE},
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": HIDDEN, "num_heads": 2, "initializer_range": 0.2},
        tie_word_embeddings=True,
        **QWEN_TOKENS,
    )
    return Qwen2VLForConditionalGeneration(config), _qwen_processor(Qwen2VLProcessor, 14)


def _qwen2_5_vl() -> tuple[Any, Any]:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        "fullatt_block_indexes": [1],
        "window_size": 56,
        "initializer_range": 0.2,
    }
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": MROPE}, vision_config=vision, tie_word_embeddings=False, **QWEN_TOKENS
    )
    return Qwen2_5_VLForConditionalGeneration(config), _qwen_processor(Qwen2_5_VLProcessor, 14)


def _qwen3_vl() -> tuple[Any, Any]:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
        "initializer_range": 0.2,
    }
    config = Qwen3VLConfig(
        text_config={**TEXT, **HEAD, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        vision_config=vision,
        tie_word_embeddings=True,
        **QWEN_TOKENS,
    )
    return Qwen3VLForConditionalGeneration(config), _qwen_processor(Qwen3VLProcessor, 16)


def _llava() -> tuple[Any, Any]:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    vision.initializer_factor = 5.0
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**TEXT),
        image_token_index=VOCABULARY["<image>"],
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer("<image>"),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("<image>"),
    )
    return LlavaForConditionalGeneration(config), processor


def _idefics3() -> tuple[Any, Any]:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 7,
        "initializer_range": 0.2,
    }
    config = Idefics3Config(
        text_config=LlamaConfig(**TEXT),
        vision_config=vision,
        image_token_id=VOCABULARY["<image>"],
        scale_factor=2,
        tie_word_embeddings=False,
    )
    processor = Idefics3Processor(
        Idefics3ImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28}),
        tokenizer("<image>"),
        image_seq_len=4,
        chat_template=chat_template("<image>"),
    )
    return Idefics3ForConditionalGeneration(config), processor


def _idefics3_canvas(width: int, height: int) -> tuple[int, int]:
    """The longer side becomes 56, the shorter one a whole number of tiles."""
    short = 28 * math.ceil(min(width, height) * 56 / max(width, height) / 28)
    return (56, short) if width >= height else (short, 56)


def _gemma3() -> tuple[Any, Any]:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "vision_use_head": False,
    }
    config = Gemma3Config(
        text_config={**TEXT, **HEAD, "query_pre_attn_scalar": 16},
        vision_config=vision,
        mm_tokens_per_image=4,
        boi_token_index=VOCABULARY["<start_of_image>"],
        eoi_token_index=VOCABULARY["<end_of_image>"],
        image_token_index=VOCABULARY["<image_soft_token>"],
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 28, "width": 28}),
        tokenizer("<image_soft_token>"),
        image_seq_length=4,
        chat_template=chat_template("<start_of_image>"),
    )
    model = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.2)  # zero as it comes
    return model, processor


class _InternVLProcessor(InternVLProcessor):
    """Without its processor of videos, which needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        super().__init__(image_processor, tokenizer, None, 4, chat_template)


_InternVLProcessor.__name__ = "InternVLProcessor"


def _internvl() -> tuple[Any, Any]:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 7,
        "initializer_range": 0.2,
    }
    config = InternVLConfig(
        vision_config=vision,
        text_config=LlamaConfig(**TEXT),
        image_token_id=VOCABULARY["<image>"],
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    images = GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, min_patches=1, max_patches=6)
    processor = _InternVLProcessor(images, tokenizer("<image>"), chat_template=chat_template("<image>"))
    return InternVLForConditionalGeneration(config), processor


@dataclass(frozen=True)
class Family:
    """A way to build one family, and the size of images that its processor leaves as they are.

    `canvas` tells to which size it resizes an image before it cuts tiles out of it; None where there are no tiles.
    """

    name: str
    build: Callable[[], tuple[Any, Any]]
    patch: int
    native: tuple[int, int]  # (width, height)
    canvas: Callable[[int, int], tuple[int, int]] | None = None


FAMILIES = [
    Family("qwen2_vl", _qwen2_vl, 14, (56, 28)),
    Family("qwen2_5_vl", _qwen2_5_vl, 14, (56, 28)),
    Family("qwen3_vl", _qwen3_vl, 16, (64, 32)),
    Family("llava", _llava, 14, (28, 28)),
    Family("idefics3", _idefics3, 7, (28, 28), _idefics3_canvas),
    Family("gemma3", _gemma3, 14, (28, 28)),
]
# whose pixel values are tiles that TRL counts; sizes of 28, 56 and 84 are shown as they are
IN_TILES = [Family("internvl", _internvl, 7, (28, 28), lambda width, height: (width, height))]


def build(name: str, seed: int = 0) -> tuple[Any, Any]:
    """A model and its processor; the same seed gives the same weights."""
    torch.manual_seed(seed)
    family = next(f for f in [*FAMILIES, *IN_TILES] if f.name == name)
    model, processor = family.build()
    model.generation_config.eos_token_id = VOCABULARY["<eos>"]
    return model.eval(), processor


def blackened(
    picture: Image.Image, canvas: tuple[float, float], patch: int, generator: torch.Generator, probability: float = 0.5
) -> Image.Image:
    """By hand: random patches of `canvas` (width, height), to which a picture will be resized, are black in it."""
    levels = np.array(picture)
    rows, columns = (
        [int((place + 0.5) * shown / side) // patch for place in range(side)]
        for side, shown in zip(picture.size[::-1], canvas[::-1], strict=True)
    )
    black = (torch.rand(rows[-1] + 1, columns[-1] + 1, generator=generator) < probability).numpy()
    levels[black[rows][:, columns]] = 0
    return Image.fromarray(levels)


def encoded(processor: Any, samples: Sequence[Sequence[Image.Image]]) -> Any:
    """What a processor makes of the images of some prompts."""
    texts = []
    for images in samples:
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": "?"}]
        texts.append(processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False))
    return processor(images=[list(images) for images in samples], text=texts, padding=True, return_tensors="pt")


def picture(seed: int, size: tuple[int, int] = (56, 28)) -> Image.Image:
    """A random image of `size` (width, height)."""
    levels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(levels)
