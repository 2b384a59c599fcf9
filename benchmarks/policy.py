"""Policies with random weights, their prompts and rollouts: what scoring and whole training steps are measured on."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from vppo.batch import Batch, View
from vppo.data import Problem
from vppo.data.prompts import Prompts
from vppo.demo.batches import forbidden_tokens
from vppo.demo.model import CELL, SPECIAL, build_model, build_processor
from vppo.perturbations import Perturbation, seeded

SEED = 0


@dataclass(frozen=True)
class Policy:
    """A Qwen2.5-VL and what it is asked.

    Attributes:
        cells: Image tokens of a prompt, down and across.
        prompt, response: Tokens, those of the image among the prompt's.
        rollouts: Responses to a prompt.
        vocab, width, inner, layers, heads, pairs: Of the language model; `pairs` are heads of keys and values. 0 in
            `layers` stands for the demo's own model.
        vision_width, vision_inner, vision_depth, vision_heads: Of the vision tower.
        dtype: Of the weights.
        checkpointing: Whether training recomputes activations instead of keeping them.
        given: Whether a step's responses are given, as by an engine that samples elsewhere.
        processes: Over how many FSDP2 shards it; each takes its share of a step's rollouts, which are `given` then,
            because TRL's own trainer cannot always sample from a sharded vision-language model.
    """

    cells: tuple[int, int]
    prompt: int
    response: int
    rollouts: int = 8
    vocab: int = 8_192
    width: int = 512
    inner: int = 1_408
    layers: int = 6
    heads: int = 8
    pairs: int = 2
    vision_width: int = 256
    vision_inner: int = 512
    vision_depth: int = 4
    vision_heads: int = 4
    dtype: torch.dtype = torch.float32
    checkpointing: bool = False
    given: bool = False
    processes: int = 1


DEMO = Policy(cells=(1, 3), prompt=0, response=16, layers=0)
SMALL = Policy(cells=(16, 16), prompt=289, response=96)
THREE_B = Policy(
    cells=(32, 40),
    prompt=1_400,
    response=512,
    vocab=151_936,
    width=2_048,
    inner=11_008,
    layers=36,
    heads=16,
    pairs=2,
    vision_width=1_280,
    vision_inner=3_420,
    vision_depth=32,
    vision_heads=16,
    dtype=torch.bfloat16,
    checkpointing=True,
)
TINY = Policy(cells=(2, 2), prompt=24, response=6, rollouts=4, width=64, inner=128, layers=2, heads=4, vision_depth=1)
POLICIES = {
    "tiny": TINY,
    "demo": DEMO,
    "small": SMALL,
    "tiny-given": replace(TINY, checkpointing=True, given=True),
    "tiny-fsdp2": replace(TINY, checkpointing=True, given=True, processes=2),
    "small-checkpointing": replace(SMALL, checkpointing=True),
    "small-fsdp2": replace(SMALL, checkpointing=True, given=True, processes=2),
    "3b": THREE_B,
    **{
        f"prompt-{prompt}": replace(SMALL, cells=(side, side), prompt=prompt)
        for prompt, side in {64: 5, 128: 9, 256: 14, 512: 20, 1024: 30}.items()
    },
    **{f"rollouts-{count}": replace(SMALL, rollouts=count) for count in (1, 2, 4, 8, 16)},
    # GRPO's groups have two responses at least
    **{f"group-{count}": replace(SMALL, rollouts=count, checkpointing=True, given=True) for count in (2, 4, 8, 16)},
}


@cache
def processor_of(policy: Policy) -> Any:
    processor = build_processor()
    down, across = policy.cells
    processor.image_processor.size = {"shortest_edge": CELL**2, "longest_edge": down * across * CELL**2}
    return processor


def model_of(policy: Policy, device: torch.device) -> Any:
    """The policy with random weights, the same each time."""
    processor = processor_of(policy)
    if not policy.layers:
        demo: Any = build_model(processor, SEED)
        return demo.to(device)
    own: Any = build_model(processor, SEED).config  # token ids, and whatever else fits any size
    head = policy.width // policy.heads
    third = head // 2 // 3
    text = {
        **own.text_config.to_dict(),
        "vocab_size": policy.vocab,
        "hidden_size": policy.width,
        "intermediate_size": policy.inner,
        "num_hidden_layers": policy.layers,
        "num_attention_heads": policy.heads,
        "num_key_value_heads": policy.pairs,
        "max_position_embeddings": 32_768,
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [head // 2 - 2 * third, third, third],
            "rope_theta": 1e6,
        },
        "layer_types": None,
        "max_window_layers": policy.layers,
    }
    vision = {
        **own.vision_config.to_dict(),
        "depth": policy.vision_depth,
        "hidden_size": policy.vision_width,
        "intermediate_size": policy.vision_inner,
        "num_heads": policy.vision_heads,
        "out_hidden_size": policy.width,
        "fullatt_block_indexes": [policy.vision_depth - 1],
    }
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = {name: getattr(own, name) for name in names}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    torch.manual_seed(SEED)
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(policy.dtype)
        try:
            model = Qwen2_5_VLForConditionalGeneration(config)
        finally:
            torch.set_default_dtype(before)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return model


def prompts_of(policy: Policy, count: int) -> list[dict[str, Any]]:
    """Conversations with an image of noise; the question fills the prompt."""
    down, across = policy.cells
    levels = np.random.default_rng(SEED).integers(0, 256, (count, down * CELL, across * CELL, 3), dtype=np.uint8)
    bare = len(_prompt_ids(policy, ""))
    question = ("How much? " * policy.prompt)[: max(policy.prompt - bare - down * across + 1, 1)]
    return [
        {"prompt": [{"role": "user", "content": question}], "images": [Image.fromarray(image)], "answer": "7"}
        for image in levels
    ]


def _prompt_ids(policy: Policy, question: str) -> list[int]:
    """A prompt's tokens with one for the image."""
    processor = processor_of(policy)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids: list[int] = processor.tokenizer(text)["input_ids"]
    return ids


def responses_of(policy: Policy, rows: int) -> list[list[int]]:
    """Random tokens, each response of the full length."""
    generator = torch.Generator().manual_seed(SEED)
    tokens = len(SPECIAL), len(processor_of(policy).tokenizer)
    ids: list[list[int]] = torch.randint(*tokens, (rows, policy.response), generator=generator).tolist()
    return ids


def rollouts_of(policy: Policy, model: Any, rows: int) -> tuple[Batch, View, View]:
    """A batch of random responses, all of the full length, with its clean and its perturbed view."""
    processor = processor_of(policy)
    ids = responses_of(policy, rows)
    problems = [Problem(row["prompt"], row["images"], None) for row in prompts_of(policy, -(-rows // policy.rollouts))]
    prompts = Prompts(processor, problems)
    keys = [row // policy.rollouts for row in range(rows)]
    pixels: dict[int, Tensor] = {
        key: prompts.perturbed(key, Perturbation(), seeded(SEED, key)).to(model.device) for key in range(len(problems))
    }
    return Batch(prompts.join(keys, ids, model.device)), View(keys), View(keys, pixels)


class TrainingStep:
    """One optimizer step after the other: rollouts, scoring, loss, gradients, AdamW.

    Args:
        policy: What is trained.
        rows: Rollouts of a step, of all processes.
        device: Where.
        stock: Whether TRL's own GRPO trainer takes it, with the clip that `algorithm="grpo"` has here.
        options: For the trainer's config: `algorithm`, `prefix_sharing`, ...

    Attributes:
        tokens: That passed the language model in the last step, padding not counted.
    """

    def __init__(self, policy: Policy, rows: int, device: torch.device, stock: bool = False, **options: Any) -> None:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        from vppo import VPPOConfig, VPPOTrainer

        self.folder = tempfile.TemporaryDirectory()
        processor = processor_of(policy)
        vocab = policy.vocab if policy.layers else len(processor.tokenizer)
        never = [
            *forbidden_tokens(processor),
            processor.tokenizer.eos_token_id,
            *range(len(processor.tokenizer), vocab),
        ]
        own = rows // policy.processes
        common: dict[str, Any] = {
            "output_dir": self.folder.name,
            "per_device_train_batch_size": own,
            "num_generations": policy.rollouts,
            "max_completion_length": policy.response,
            "generation_kwargs": {"suppress_tokens": never},
            "learning_rate": 1e-6,
            "bf16": policy.dtype == torch.bfloat16,
            "gradient_checkpointing": policy.checkpointing,
            "use_cpu": device.type == "cpu",
            "seed": SEED,
            "report_to": "none",
            "disable_tqdm": True,
            **options,
        }
        args: Any = GRPOConfig(loss_type="dapo", top_p=0.99, **common) if stock else VPPOConfig(**common)
        trainer: Any = GRPOTrainer if stock else VPPOTrainer
        prompts = prompts_of(policy, rows // policy.rollouts)
        self.trainer = trainer(
            model=model_of(policy, device),
            reward_funcs=_reward,
            args=args,
            train_dataset=Dataset.from_list(prompts),
            processing_class=processor,
        )
        self.tokens = 0
        self.trainer.model.base_model.register_forward_pre_hook(self._count, with_kwargs=True)
        optimizer = self.trainer.create_optimizer()
        self.model, self.trainer.optimizer = self.trainer.accelerator.prepare(self.trainer.model, optimizer)
        self.trainer.model_wrapped = self.model
        self.trainer.current_gradient_accumulation_steps = 1
        first = self.trainer.accelerator.process_index * own
        self.batch = [row for row in prompts for _ in range(policy.rollouts)][first : first + own]
        if policy.given:
            responses = responses_of(policy, rows)[first : first + own]
            self.trainer._generate_single_turn = lambda *_, **__: (responses, None)

    def __call__(self) -> Tensor:
        """The loss of the step; every call samples from the same stream."""
        torch.manual_seed(SEED)
        self.tokens = 0
        self.model.train()
        loss: Tensor = self.trainer.training_step(self.model, list(self.batch), None)
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()
        return loss

    def _count(self, module: Any, args: Any, inputs: dict[str, Any]) -> None:
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        self.tokens += ids.numel() if mask is None else int(mask[:, -ids.shape[1] :].sum())


def _reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """Differs between neighbours: no group is without a signal."""
    texts = [completion[0]["content"] for completion in completions]
    return [sum(map(ord, text)) % 7 / 7 + place % 2 for place, text in enumerate(texts)]
