"""What training takes of a CPU's memory: what a plan is compared with.

By hand: `PYTHONPATH=tests:. python -m support.peaks` prints the table.
"""

from __future__ import annotations

import gc
import socket
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig
from transformers import (
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

from support import families
from support.held_memory import of_allocator, of_tensors, prompt_gloo
from support.runs import response, varied_reward
from support.shards import shard_over_cpus
from vppo import VPPOConfig, VPPOTrainer
from vppo.data.problems import Problem
from vppo.data.prompts import Prompts
from vppo.plan.estimate import estimate
from vppo.plan.settings import Settings, from_config

GROUP, ROWS, LENGTH = 4, 8, 48  # rollouts of a prompt, of a generation over all processes, tokens of each
SIDE = {"qwen2_vl": 112, "qwen2_5_vl": 112, "qwen3_vl": 128}  # of a picture, in pixels: 16 tokens
CASES: dict[str, dict[str, Any]] = {
    "Qwen2-VL, rows whole": {"family": "qwen2_vl", "prefix_sharing": "off", "gradient_checkpointing": False},
    "Qwen2.5-VL, packed": {"family": "qwen2_5_vl", "per_device_train_batch_size": 4},
    "Qwen3-VL, 16 bits": {"family": "qwen3_vl", "bf16": True, "per_device_train_batch_size": 2},
    "Qwen2.5-VL, LoRA": {"family": "qwen2_5_vl", "lora": True, "optim": "adamw_torch"},
}

SYNC = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
SHARDED: dict[str, dict[str, Any]] = {
    "Qwen2-VL, rows whole": {"family": "qwen2_vl", "prefix_sharing": "off"},
    "Qwen2.5-VL, whole gradients": {"family": "qwen2_5_vl", "per_device_train_batch_size": 2},
    "Qwen2.5-VL, own gradients": {"family": "qwen2_5_vl", "per_device_train_batch_size": 2, "accelerator_config": SYNC},
    "Qwen3-VL, 16 bits": {"family": "qwen3_vl", "bf16": True},
}


def config_of(family: str) -> Any:
    """Small, and large enough that what is counted outweighs what an allocation takes at least."""
    text = {
        "vocab_size": 1024,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
        "bos_token_id": None,
        "eos_token_id": families.VOCABULARY["<eos>"],
        "pad_token_id": families.VOCABULARY["<pad>"],
    }
    ids = families.QWEN_TOKENS
    if family == "qwen2_vl":
        vision = {"depth": 3, "embed_dim": 64, "hidden_size": 192, "num_heads": 2, "mlp_ratio": 2}
        return Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    if family == "qwen2_5_vl":
        vision = {"depth": 3, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "out_hidden_size": 192}
        vision |= {"fullatt_block_indexes": [2], "window_size": 56}
        return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    vision = {"depth": 3, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "out_hidden_size": 192}
    vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    return Qwen3VLConfig(text_config={**text, "head_dim": 32}, vision_config=vision, tie_word_embeddings=False, **ids)


def trainer_of(path: Path, world: int, family: str, lora: bool = False, **changes: Any) -> VPPOTrainer:
    torch.manual_seed(0)
    kinds = {
        "qwen2_vl": (Qwen2VLForConditionalGeneration, Qwen2VLProcessor, 14),
        "qwen2_5_vl": (Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, 14),
        "qwen3_vl": (Qwen3VLForConditionalGeneration, Qwen3VLProcessor, 16),
    }
    kind, processor_kind, patch = kinds[family]
    model = kind(config_of(family))
    model.generation_config.eos_token_id = families.VOCABULARY["<eos>"]
    from datasets import Dataset

    trainer = VPPOTrainer(
        model=model,
        reward_funcs=varied_reward,
        args=VPPOConfig(**options(path, world, **changes)),
        train_dataset=Dataset.from_list(problems(family)),
        processing_class=families._qwen_processor(processor_kind, patch),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", exclude_modules=["lm_head"])
        if lora
        else None,
    )

    def generate(prompt_ids: list[Any], *_: Any, **__: Any) -> tuple[list[list[int]], None]:
        first = trainer.accelerator.process_index * len(prompt_ids)
        return [response(row, LENGTH) for row in range(first, first + len(prompt_ids))], None

    vars(trainer)["_generate_single_turn"] = generate
    return trainer


def options(path: Path, world: int, **changes: Any) -> dict[str, Any]:
    size = changes.get("per_device_train_batch_size", ROWS // world)
    return {
        "output_dir": str(path),
        "num_generations": GROUP,
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": ROWS // world // size,
        "max_completion_length": LENGTH,
        "max_steps": 3,
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **changes,
    }


def problems(family: str) -> list[dict[str, Any]]:
    side = SIDE[family]
    return [
        {
            "prompt": [{"role": "user", "content": f"How much is {index}?"}],
            "images": [families.picture(index, (side, side))],
        }
        for index in range(8)
    ]


def planned(path: Path, world: int, family: str, lora: bool = False, **changes: Any) -> Settings:
    """The plan's settings for what `trainer_of` trains."""
    config_of(family).save_pretrained(path / family)
    given = {name: value for name, value in options(path, world, **changes).items() if name != "use_cpu"}
    given |= {"model": str(path / family), "dataset": "none"}
    if lora:
        given |= {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_target_modules": "all-linear"}
    row = problems(family)[0]
    kinds = {
        "qwen2_vl": (Qwen2VLProcessor, 14),
        "qwen2_5_vl": (Qwen2_5_VLProcessor, 14),
        "qwen3_vl": (Qwen3VLProcessor, 16),
    }
    prompt = Prompts(families._qwen_processor(*kinds[family]), [Problem(row["prompt"], row["images"], "")])
    return from_config(given, gpus=world, image_tokens=16, text_tokens=prompt.lengths[0] - 16)


def measured(path: Path, world: int, **case: Any) -> dict[str, int]:
    """Bytes held at most in the scoring and training passes of the steps after the first, weights and optimizer among
    them: in one process, all that the allocator has given and has not got back; in one of several, of all tensors.
    """
    gc.collect()  # what is let go later would be taken off
    return (of_allocator if world == 1 else of_tensors)(lambda: trainer_of(path, world, **case))


def measured_by_two(path: Path) -> list[dict[str, dict[str, int]]]:
    """What each of two processes holds of a model that FSDP2 shards over them: by case, then as `measured`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_measured_by_one_of_two, args=(port, path), nprocs=2)
    return [torch.load(path / f"{rank}.pt") for rank in range(2)]


def _measured_by_one_of_two(rank: int, port: int, path: Path) -> None:
    shard_over_cpus(rank, 2, port, backend=prompt_gloo())
    found = {name: measured(path / str(rank), 2, **case) for name, case in SHARDED.items()}
    torch.save(found, path / f"{rank}.pt")
    dist.destroy_process_group()


def _print(world: int, name: str, case: dict[str, Any], found: list[dict[str, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        peaks = estimate(planned(Path(folder), world, **case)).peaks
    for phase in found[0]:
        expected = sum(peaks[phase].values())
        sizes = [of_rank[phase] for of_rank in found]
        measured = ", ".join(f"{size / 2**20:.2f} MiB ({size / expected - 1:+.1%})" for size in sizes)
        print(f"{world} {name:28} {phase:14} planned {expected / 2**20:6.2f} MiB, measured {measured}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for name, case in CASES.items():
            _print(1, name, case, [measured(Path(folder), 1, **case)])
        ranks = measured_by_two(Path(folder))
        for name, case in SHARDED.items():
            _print(2, name, case, [found[name] for found in ranks])
