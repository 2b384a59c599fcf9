"""Tiny students and wider teachers, and trainers whose rollouts are fixed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen2Config, Qwen2ForCausalLM
from trl import DistillationConfig

from support import families
from support.runs import response, rows

LENGTHS = (6, 3, 5, 1)
TEXT: dict[str, Any] = {key: value for key, value in families.TEXT.items() if key != "initializer_range"}


def text_model(width: int, seed: int, vocab: int = len(families.VOCABULARY), capped: float | None = None) -> Any:
    """A language model alone; with `capped` a Gemma, whose head has that cap."""
    torch.manual_seed(seed)
    sizes = {**TEXT, "hidden_size": width, "vocab_size": vocab, "tie_word_embeddings": False}
    if capped is None:
        model: Any = Qwen2ForCausalLM(Qwen2Config(**sizes, initializer_range=0.2))
    else:
        config = Gemma2Config(**sizes, head_dim=16, query_pre_attn_scalar=16, final_logit_softcapping=capped)
        model = Gemma2ForCausalLM(config)
        torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    return prepared(model)


def vision_model(width: int, seed: int, family: str = "qwen2_5_vl", vocab: int = len(families.VOCABULARY)) -> Any:
    """A vision-language model; of another width than 32 it is a wider one of the same family."""
    model, _ = families.build(family, seed)
    if (width, vocab) != (families.HIDDEN, len(families.VOCABULARY)):
        config = copy.deepcopy(model.config)
        config.text_config.hidden_size = config.vision_config.out_hidden_size = width
        config.text_config.vocab_size = vocab
        config.text_config.rope_parameters["mrope_section"] = [width // 12] * 3
        torch.manual_seed(seed)
        model = type(model)(config)
    return prepared(model)


def prepared(model: Any) -> Any:
    model.generation_config.eos_token_id = families.VOCABULARY["<eos>"]
    return model.eval()


def trainer(kind: type, path: Path, student: Any, teacher: Any, *, vision: bool, **changes: Any) -> Any:
    """A trainer of `kind`; `changes` that are not the config's go to its constructor."""
    config = {
        "output_dir": str(path), "per_device_train_batch_size": 4, "max_completion_length": 6, "max_steps": 3,
        "logging_steps": 1, "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 1e9,
        "generation_kwargs": {"suppress_tokens": families.PLACEHOLDERS},
    }  # fmt: skip
    known = DistillationConfig.__dataclass_fields__
    config |= {name: value for name, value in changes.items() if name in known}
    _, processor = families.build("qwen2_5_vl")
    data = changes.get("data") or rows(4)
    if not vision:
        data = [{"prompt": row["prompt"]} for row in data]
    run = kind(
        model=student,
        teacher_model=teacher,
        args=DistillationConfig(**config),
        train_dataset=Dataset.from_list(data),
        processing_class=processor if vision else text_tokenizer(),
        **{name: value for name, value in changes.items() if name not in known and name != "data"},
    )
    fix_rollouts(run)
    return run


def text_tokenizer() -> Any:
    tokenizer = families.tokenizer("<image>")
    tokenizer.chat_template = families.chat_template("<image>")
    return tokenizer


def fix_rollouts(run: Any) -> None:
    """Row i of a batch over all processes is answered by `response(i, ...)`."""

    def generate(prompt_ids: list[Any], *args: Any, **kwargs: Any) -> list[list[int]]:
        first = run.accelerator.process_index * len(prompt_ids)
        return [response(i, LENGTHS[i % len(LENGTHS)]) for i in range(first, first + len(prompt_ids))]

    run._generate_single_turn = generate


def micro_batch(run: Any, data: list[dict[str, Any]]) -> dict[str, Any]:
    """What the trainer makes of these problems."""
    run.model.train()
    batch: dict[str, Any] = run._generate_and_score_completions(data)
    return batch
