"""Runs with vLLM in the trainer's process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from support.runs import varied_reward

from vppo import VPPOConfig, VPPOTrainer
from vppo.demo.digits import as_dataset, strips
from vppo.loading import load_processor
from vppo.rewards import accuracy_reward

AGREES = 0.02  # nats a token, of which a nucleus of 0.99 may make 0.01
EXACT = 1e-3  # without a nucleus


def options(path: Path, **changes: Any) -> VPPOConfig:
    return VPPOConfig(
        **{
            "output_dir": str(path),
            "use_vllm": True,
            "vllm_mode": "colocate",
            "vllm_max_model_length": 256,
            "per_device_train_batch_size": 32,
            "num_generations": 4,
            "max_completion_length": 20,
            "max_steps": 2,
            "learning_rate": 1e-4,
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            **changes,
        }
    )


def reading_digits(path: Path, digits: Path, **changes: Any) -> VPPOTrainer:
    """Of the demo's model."""
    processor = changes.pop("processor", None) or load_processor(str(digits))
    return VPPOTrainer(
        model=str(digits),
        reward_funcs=accuracy_reward,
        args=options(path, **{"model_init_kwargs": {"dtype": "float32"}, **changes}),
        train_dataset=as_dataset(list(strips("train", 96, seed=1))),
        processing_class=processor,
    )


def answering(path: Path, folder: Path, data: list[dict[str, Any]], **changes: Any) -> VPPOTrainer:
    """Of a model of random weights."""
    further = {name: changes.pop(name) for name in ("peft_config", "tools") if name in changes}
    return VPPOTrainer(
        model=str(folder),
        reward_funcs=varied_reward,
        args=options(
            path,
            **{"model_init_kwargs": {"dtype": "float32"}, "per_device_train_batch_size": 8, "top_p": 1.0, **changes},
        ),
        train_dataset=Dataset.from_list(data),
        processing_class=load_processor(str(folder)),
        **further,
    )


def logged(run: VPPOTrainer, name: str) -> list[float]:
    return [entry[name] for entry in run.state.log_history if name in entry]


def greedy(run: VPPOTrainer, prompts: list[Any]) -> list[list[int]]:
    """vLLM's most probable answers, with the weights that the trainer has now."""
    ids, images, fields = run._tokenize_prompts(prompts)
    generation = run.vllm_generation
    temperature, generation.temperature, run._last_loaded_step = generation.temperature, 0.0, -1
    try:
        with torch.no_grad():
            return run._generate_single_turn(ids, images, fields, 1)[0]
    finally:
        generation.temperature = temperature
