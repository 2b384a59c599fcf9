"""The model of a plan: built from its configuration without values, and sharded as accelerate's FSDP2 does it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vppo import packed_flash, packed_rows
from vppo.exchange import exchanged
from vppo.plan.fake import Fake
from vppo.plan.settings import Settings, Sharding

KERNELS = ("flash_attention_2", "flash_attention_3", "flex_attention")  # attention that holds no dense mask
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, order=True)
class Depth:
    """Layers of the language model, and of the vision tower."""

    text: int
    vision: int

    @classmethod
    def of(cls, config: Any) -> Depth:
        return cls(config.get_text_config().num_hidden_layers, config.vision_config.depth)


def period(config: Any) -> int:
    """After how many layers the language model's kinds of them begin again."""
    kinds = getattr(config.get_text_config(), "layer_types", None) or ["full_attention"]
    sizes = range(1, len(kinds) + 1)
    return next(size for size in sizes if all(a == b for a, b in zip(kinds, kinds[size:], strict=False)))


def with_depth(config: Any, depth: Depth) -> Any:
    """The same model with fewer layers."""
    found = copy.deepcopy(config)
    text, vision = found.get_text_config(), found.vision_config
    if depth.text < text.num_hidden_layers:
        text.num_hidden_layers = depth.text
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[: depth.text]
    if depth.vision < vision.depth:
        vision.depth = depth.vision
        if getattr(vision, "fullatt_block_indexes", None):
            vision.fullatt_block_indexes = [depth.vision - 1]
        if getattr(vision, "deepstack_visual_indexes", None):
            vision.deepstack_visual_indexes = list(range(len(vision.deepstack_visual_indexes)))
    return found


def build(settings: Settings, depth: Depth, mode: Fake) -> Any:
    """The model in training mode, with adapters and checkpoints of activations where the run has them; not sharded."""
    from transformers import AutoModelForImageTextToText

    config = with_depth(settings.config, depth)
    held = settings.attention in KERNELS
    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(
            config, dtype=getattr(torch, settings.dtype), attn_implementation="sdpa" if held else settings.attention
        )
        if held:  # not installed, perhaps: what it holds is known all the same
            for part in (model.config, model.config.get_text_config(), model.config.vision_config):
                part._attn_implementation = settings.attention
        add_head(model)
        if settings.lora is not None:
            model = _with_adapters(model, settings.lora)
        if settings.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            if settings.lora is not None:
                model.enable_input_require_grads()
    _place(model, mode)
    return model.train()


def _place(model: nn.Module, mode: Fake) -> None:
    """Weights and buffers as fake tensors of a CPU; shared ones stay shared."""
    made: dict[int, Any] = {}
    with mode:
        for module in model.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    if id(weight) not in made:
                        fake = torch.empty(weight.shape, dtype=weight.dtype)
                        made[id(weight)] = nn.Parameter(fake, requires_grad=weight.requires_grad)
                    module._parameters[name] = made[id(weight)]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)


def add_head(model: Any) -> None:
    """The head that TRL's trainer gives it."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, outputs=("log_probs", "entropy"))


def _with_adapters(model: Any, options: dict[str, Any]) -> Any:
    from peft import LoraConfig, get_peft_model

    target = options["target"]
    lora = LoraConfig(
        r=options["r"],
        lora_alpha=options["lora_alpha"],
        target_modules=target if isinstance(target, str) else list(target),
        exclude_modules=["lm_head"],
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)


def stacks(model: Any) -> dict[str, nn.ModuleList]:
    """Lists of layers that are alike, by their name."""
    names = set(model._no_split_modules or ())
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and type(module[0]).__name__ in names
    }


def shard(model: Any, sharding: Sharding, precision: str, mode: Fake) -> Any:
    """What accelerate makes of it, with the policy for mixed precision that `VPPOTrainer` sets."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from torch.distributed.device_mesh import init_device_mesh

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap" if sharding.layers else "no_wrap",
        reshard_after_forward=sharding.reshard,
        cpu_ram_efficient_loading=False,
        cpu_offload=False,
    )
    if precision != "no":
        plugin.set_mixed_precision(precision)
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("shards",)),
        parallelism_config=SimpleNamespace(fsdp_dim_names=["shards"]),
        mixed_precision=precision,
        is_main_process=False,
        device=torch.device("cpu"),
    )
    with mode:
        return fsdp2_prepare_model(accelerator, model)


@contextmanager
def kernels_of_attention() -> Iterator[None]:
    """Within the block, kernels of attention hold what they hold on a GPU, whether they are installed or not: queries,
    keys, values, what they return, and a number for each query and head. PyTorch's own hold the same without a mask.
    """
    with ExitStack() as held:
        held.enter_context(_in_place(ALL_MASK_ATTENTION_FUNCTIONS, "flex_attention", lambda *_, **__: None))
        for name in set(KERNELS) - {packed_flash.FLASH}:
            held.enter_context(_in_place(ALL_ATTENTION_FUNCTIONS, name, _attend))
        flash = {"flash_attention": _attend, "_forward": _flash_forward, "_backward": _flash_backward}
        held.enter_context(exchanged(packed_flash, **flash))
        held.enter_context(exchanged(packed_rows, unusable=lambda: ""))
        yield


@contextmanager
def _in_place(registry: Any, name: str, function: Any) -> Iterator[None]:
    before = registry.get(name)
    registry[name] = function
    try:
        yield
    finally:
        if before is None:
            del registry[name]
        else:
            registry[name] = before


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any = None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    grouped = query.shape[1] != key.shape[1]
    found = nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=causal and query.shape[2] == key.shape[2], scale=scaling, enable_gqa=grouped
    )
    return found.transpose(1, 2).contiguous(), None


def _flash_forward(query: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What one call of flash-attention over sequences of several lengths leaves."""
    count, heads, _width = query.shape
    return torch.empty_like(query), query.new_empty(heads, count, dtype=torch.float32)


def _flash_backward(grad: torch.Tensor, *tensors: Any, **__: Any) -> list[torch.Tensor]:
    return [torch.empty_like(tensor) for tensor in tensors[:3]]
