"""Configurations of published models, so that a plan needs no network: what decides sizes, as their makers give it."""

from __future__ import annotations

import copy
from typing import Any

_IDS = {
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "image_token_id": 151655,
    "video_token_id": 151656,
}


def _qwen2_5_vl(
    layers: int, hidden: int, heads: int, pairs: int, inner: int, vocabulary: int, vision_inner: int, tied: bool
) -> dict[str, Any]:
    text = {
        "model_type": "qwen2_5_vl_text",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": pairs,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": tied,
    }
    vision = {
        "model_type": "qwen2_5_vl",
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": vision_inner,
        "num_heads": 16,
        "out_hidden_size": hidden,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    ids = {name: value for name, value in _IDS.items() if "vision" in name or "image" in name or "video" in name}
    return {
        "model_type": "qwen2_5_vl",
        "dtype": "bfloat16",
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": tied,
        **ids,
    }


def _qwen3_vl(layers: int, hidden: int, heads: int, inner: int) -> dict[str, Any]:
    text = {
        "model_type": "qwen3_vl_text",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": inner,
        "vocab_size": 151936,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
        "tie_word_embeddings": False,
    }
    vision = {
        "model_type": "qwen3_vl",
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "out_hidden_size": hidden,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
    }
    ids = {name: value for name, value in _IDS.items() if "vision" in name or "image" in name or "video" in name}
    return {
        "model_type": "qwen3_vl",
        "dtype": "bfloat16",
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": False,
        **ids,
    }


_PRESETS = {
    "Qwen2.5-VL-3B": _qwen2_5_vl(36, 2048, 16, 2, 11008, 151936, 3420, tied=True),
    "Qwen2.5-VL-7B": _qwen2_5_vl(28, 3584, 28, 4, 18944, 152064, 3420, tied=False),
    "Qwen2.5-VL-32B": _qwen2_5_vl(64, 5120, 40, 8, 27648, 152064, 3456, tied=False),
    "Qwen3-VL-8B": _qwen3_vl(36, 4096, 32, 12288),
    "Qwen3-VL-32B": _qwen3_vl(64, 5120, 64, 25600),
}
NAMES = tuple(_PRESETS)


def preset(model: str) -> dict[str, Any] | None:
    """The configuration of a published model by its name on the hub, with or without its owner and its variant.

    Args:
        model: Such as "Qwen/Qwen2.5-VL-7B-Instruct".

    Returns:
        What `transformers` builds a configuration from; None for any other model.
    """
    name = model.rsplit("/", 1)[-1]
    for variant in ("-Instruct", "-Thinking"):
        name = name.removesuffix(variant)
    return copy.deepcopy(_PRESETS.get(name))
