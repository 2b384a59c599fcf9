"""Small training runs: the pieces that the trainer's tests put together."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

import vppo.trainer
from support import families
from vppo import VPPOConfig, VPPOTrainer
from vppo.data import Problem
from vppo.data.prompts import Prompts
from vppo.monitoring.evaluation import KEY
from vppo.perturbations import Perturbation, PixelLayout, perturb, seeded
from vppo_kernels import reference, sampled_divergence

FAMILY = "qwen2_5_vl"  # for whatever does not depend on the family
IMAGE_KEYS = ("pixel_values", "image_grid_thw", "pixel_attention_mask", "token_type_ids", "mm_token_type_ids")


def rows(
    count: int, sizes: Sequence[tuple[int, int]] = ((56, 28),), images: Sequence[int] = (1,)
) -> list[dict[str, Any]]:
    """`count` prompts; sizes and numbers of images go round."""
    return [
        {
            "prompt": [{"role": "user", "content": f"How much {i}?"}],
            "images": [families.picture(10 * i + k, sizes[i % len(sizes)]) for k in range(images[i % len(images)])],
            "answer": str(i),
        }
        for i in range(count)
    ]


def batch_inputs(model: Any, processor: Any, data: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Prompts, images and "response_ids" of rows as a TRL batch."""
    prompts = Prompts(processor, [Problem(row["prompt"], row["images"], row.get("answer")) for row in data])
    return prompts.join(range(len(data)), [row["response_ids"] for row in data], model.device)


def varied_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """Differs between rollouts, and depends on nothing but their text."""
    return [sum(map(ord, completion[0]["content"])) % 7 / 7.0 for completion in completions]


def options(path: Path, **changes: Any) -> dict[str, Any]:
    """What TRL's config and VPPO's are given alike."""
    return {
        "output_dir": str(path),
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 2,
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "learning_rate": 1e-3,
        "generation_kwargs": {"suppress_tokens": families.PLACEHOLDERS},
        **changes,
    }


def trainer(
    path: Path,
    data: list[dict[str, Any]] | None = None,
    *,
    eval_data: list[dict[str, Any]] | None = None,
    family: str = FAMILY,
    model: Any = None,
    peft_config: Any = None,
    rollout_func: Any = None,
    reward: Any = varied_reward,
    kind: type[VPPOTrainer] = VPPOTrainer,
    **changes: Any,
) -> VPPOTrainer:
    """A trainer of a tiny model; `changes` go into its config."""
    built, processor = families.build(family)
    return kind(
        model=built if model is None else model,
        reward_funcs=reward,
        args=VPPOConfig(**options(path, **changes)),
        train_dataset=Dataset.from_list(data or rows(4)),
        eval_dataset=None if eval_data is None else Dataset.from_list(eval_data),
        processing_class=processor,
        peft_config=peft_config,
        rollout_func=rollout_func,
    )


def response(index: int, length: int) -> list[int]:
    """`length` random characters, the end of sequence among them."""
    generator = torch.Generator().manual_seed(1000 + index)
    first = len(families.SPECIAL)
    ids = torch.randint(first, len(families.VOCABULARY), (length - 1,), generator=generator).tolist()
    return [*ids, families.VOCABULARY["<eos>"]]


def fix_rollouts(trainer: VPPOTrainer, lengths: Sequence[int] = (6, 3, 5, 1)) -> None:
    """Let generation return `response(i, ...)` for row i of the batch over all processes."""

    def generate(prompt_ids: list[Any], *args: Any, **kwargs: Any) -> tuple[list[list[int]], None]:
        first = trainer.accelerator.process_index * len(prompt_ids)
        return [response(i, lengths[i % len(lengths)]) for i in range(first, first + len(prompt_ids))], None

    trainer._generate_single_turn = generate  # type: ignore[method-assign]


def generation_batch(trainer: VPPOTrainer, data: list[dict[str, Any]]) -> dict[str, Any]:
    """What the trainer makes of one generation batch with these prompts."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    repeated = [row for row in data for _ in range(trainer.num_generations)]
    vars(trainer)["given_images"] = [row.get("images") for row in repeated]
    return trainer._generate_and_score_completions(repeated)


def group_advantages(trainer: VPPOTrainer, batch: dict[str, Any]) -> Tensor:
    """`[B]` float64 advantages of `varied_reward` within each prompt's rollouts, as TRL normalises them."""
    responses = zip(batch["completion_ids"], batch["completion_mask"].bool(), strict=True)
    texts = [trainer.processing_class.decode(ids[mask], skip_special_tokens=True) for ids, mask in responses]
    rewards = torch.tensor(varied_reward([[{"content": text}] for text in texts]), dtype=torch.float64)
    groups = rewards.view(-1, trainer.num_generations)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()


def perturbed_pixels(
    trainer: VPPOTrainer,
    batch: dict[str, Any],
    step: int = 0,
    problems: Sequence[int] | None = None,
    draw: int = 0,
) -> Tensor:
    """The batch's pixels with the perturbed view of every row, drawn as the documentation says.

    `problems` are the fingerprints of the rows' problems where the batch is one of an evaluation; `draw` is the number
    of the view where each row has several.
    """
    layout = PixelLayout.of(trainer.processing_class.image_processor)
    perturbation: Perturbation = trainer.args.make_perturbation(layout.patch_size)
    pixels, counts = batch["pixel_values"], batch["num_images"]
    grids = batch.get("image_grid_thw")
    if grids is not None:
        patches = [int(g.prod(-1).sum()) for g in grids.split(counts)]
        parts, row_grids = pixels.split(patches), grids.split(counts)
    elif pixels.dim() == 5 or "num_tiles" in batch:
        parts, row_grids = pixels.unbind()[: len(counts)], [None] * len(counts)
    else:
        parts, row_grids = pixels.split(counts), [None] * len(counts)
    inside = batch.get("pixel_attention_mask")
    canvas = canvas_of(trainer.processing_class)
    views, pictures = [], []
    for row, (part, grid) in enumerate(zip(parts, row_grids, strict=True)):
        prompt, rollout = divmod(row, trainer.num_generations if problems is None else trainer.num_generations_eval)
        which = (step, prompt) if problems is None else (KEY, problems[row])
        key = [trainer.args.seed, *which]
        if trainer.args.perturbation_scope == "rollout":
            key.append(rollout)
        if draw:
            key.append(draw)
        if canvas:
            stream, given = seeded(*key), vars(trainer)["given_images"][row]
            pictures.append([families.blackened(one, canvas(*one.size), layout.patch_size, stream) for one in given])
            continue
        if not counts[row]:
            views.append(part)
            continue
        views.append(
            perturb(part, layout, perturbation, seeded(*key), grid=grid, inside=None if inside is None else inside[row])
        )
    if canvas:
        return families.encoded(trainer.processing_class, pictures)["pixel_values"]
    return torch.stack(views) if pixels.dim() == 5 else torch.cat(views)


def canvas_of(processor: Any) -> Callable[[int, int], tuple[int, int]] | None:
    """Of the family that a processor belongs to."""
    kind = type(processor).__name__.removesuffix("Processor").lower()
    return next((f.canvas for f in [*families.FAMILIES, *families.IN_TILES] if f.name.replace("_", "") == kind), None)


def plain_logits(model: Any, batch: dict[str, Any], pixels: Tensor | None, temperature: float = 1.0) -> Tensor:
    """`[B, T, V]` logits of the response tokens by one ordinary forward."""
    extra = {name: batch[name] for name in IMAGE_KEYS if name in batch}
    if pixels is not None:
        extra["pixel_values"] = pixels.to(next(model.parameters()).dtype)
    logits = model(
        input_ids=torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
        attention_mask=torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
        use_cache=False,
        **extra,
    ).logits
    return logits[:, -(batch["completion_ids"].shape[1] + 1) : -1] / temperature


@torch.no_grad()
def plain_views(model: Any, processor: Any, row: dict[str, Any], key: Sequence[int]) -> tuple[Tensor, Tensor]:
    """`[n, V]` float64 logits of one row's response, alone and unpadded: given its image, and with patches of it black.

    The model is turned into float64.
    """
    content = [{"type": "image", "image": image} for image in row["images"]]
    message = {"role": "user", "content": [*content, {"type": "text", "text": row["prompt"][0]["content"]}]}
    inputs = processor.apply_chat_template(
        [[message]], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    layout = PixelLayout.of(processor.image_processor)
    pixels, grid, inside = (inputs.get(k) for k in ("pixel_values", "image_grid_thw", "pixel_attention_mask"))
    draw, canvas = seeded(*key), canvas_of(processor)
    if canvas:
        black = [families.blackened(one, canvas(*one.size), layout.patch_size, draw) for one in row["images"]]
        view = families.encoded(processor, [black])["pixel_values"]
    else:
        view = perturb(pixels, layout, Perturbation(patch_size=layout.patch_size), draw, grid=grid, inside=inside)
    response = torch.tensor([row["response_ids"]])
    extended = {
        name: torch.cat([value, response if name == "input_ids" else torch.full_like(response, fill)], 1)
        for name, fill in (("input_ids", 0), ("attention_mask", 1), ("token_type_ids", 0), ("mm_token_type_ids", 0))
        if (value := inputs.get(name)) is not None
    }
    model = model.double()
    clean, perturbed = (
        model(**{**inputs, **extended, "pixel_values": x.double()}).logits[0, -(response.shape[1] + 1) : -1]
        for x in (pixels, view)
    )
    return clean, perturbed


def plain_model(trainer: VPPOTrainer, dtype: torch.dtype) -> Any:
    """A copy of the policy whose forward is the model's own, without TRL's fused head."""
    policy = trainer.accelerator.unwrap_model(trainer.model)
    copied = copy.deepcopy(getattr(policy, "get_base_model", lambda: policy)())
    copied.__dict__.pop("forward", None)
    return copied.to(dtype).eval()


@torch.no_grad()
def plain_dependency(
    trainer: VPPOTrainer,
    batch: dict[str, Any],
    step: int = 0,
    problems: Sequence[int] | None = None,
    draw: int = 0,
) -> Tensor:
    """`[B, T]` dependency of every response token by two ordinary forwards in float64, zero at padding."""
    model = plain_model(trainer, torch.float64)
    clean, perturbed = (
        plain_logits(model, batch, pixels, trainer.args.temperature)
        for pixels in (batch["pixel_values"], perturbed_pixels(trainer, batch, step, problems, draw))
    )
    if trainer.args.divergence == "k3":
        p, q = (reference.logprob(z, batch["completion_ids"]) for z in (clean, perturbed))
        dependency = sampled_divergence(p, q, kind="k3")
    else:
        dependency = reference.divergence(clean, perturbed, kind=str(trainer.args.divergence)).divergence
    return torch.where(batch["completion_mask"].bool(), dependency, 0)


def listen(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """A list that receives the dependency of every generation batch from here on."""
    seen: list[Tensor] = []
    shape = vppo.trainer.shape_advantages

    def listening(advantages: Tensor, dependency: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(dependency)
        return shape(advantages, dependency, *args, **kwargs)

    monkeypatch.setattr(vppo.trainer, "shape_advantages", listening)
    return seen
