"""Settings of a plan from overrides for verl, such as `examples/verl_qwen2_5_vl_7b.sh`: nothing of verl is needed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from vppo.algorithms import REGISTRY
from vppo.errors import InputError
from vppo.options import RECIPES, one_of
from vppo.plan.settings import (
    TEXT_TOKENS,
    Sampler,
    Settings,
    Sharding,
    default_pixels,
    image_tokens,
    model_config,
)

ACTOR, ROLLOUT, MODEL = (f"actor_rollout_ref.{part}" for part in ("actor", "rollout", "model"))
MODES = ("vppo", "vppo_colocate_async")
PRESERVED = re.compile(r"\$\{(\w+):-([^}]*)\}")  # a shell's variable with what stands for it where it is not set


def read_overrides(path: Path, further: Sequence[str] = ()) -> dict[str, Any]:
    """The overrides of a script, and of the script that it hands them on to; later ones win.

    Args:
        path: A script with `options=( name=value ... )`, and perhaps `exec .../another.sh`.
        further: Overrides of the command line.

    Raises:
        InputError: The script cannot be read, or has none.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    block = re.search(r"^options=\(\n(.*?)^\)", text, re.DOTALL | re.MULTILINE)
    if block is None:
        raise InputError(f"{path}: takes overrides for verl between options=( and )")
    given = dict(re.findall(r'^export (\w+)="\$\{\w+:-([^}]*)\}"', text, re.MULTILINE))
    other = re.search(r'^exec "\$\(dirname "\$0"\)/([\w.]+\.sh)"', text, re.MULTILINE)
    found = read_overrides(path.parent / other.group(1)) if other else {}
    if "MODEL" in given:
        found[f"{MODEL}.path"] = given["MODEL"]
    words = shlex.split(PRESERVED.sub(r"\2", block.group(1)), comments=True)
    for word in [*words, *further]:
        name, equals, value = word.removeprefix("--").lstrip("+").partition("=")
        if not equals:
            raise InputError(f"{path}: override: got {word!r}, takes name=value")
        found[name] = yaml.safe_load(value) if value else None
    return found


def settings_of(given: dict[str, Any], *, gpus: int, **sizes: int | None) -> Settings:
    """What a plan is made from.

    Micro-batches of verl are of tokens, so that here they hold as many of the longest rows as these tokens; all rows
    pass whole, though `vppo.verl` passes a prompt of several once with its perturbed image where they meet.

    Args:
        given: Of `read_overrides`.
        gpus: That train.
        **sizes: `text_tokens`, `images`, `image_tokens` of a prompt.

    Raises:
        InputError: A setting is missing or cannot be planned.
    """

    def of(name: str, default: Any = None) -> Any:
        value = given.get(name, default)
        if value is None:
            raise InputError(f"{name}: missing, which a plan needs")
        return value

    strategy = of(f"{ACTOR}.strategy", "fsdp")
    if strategy not in ("fsdp", "fsdp2"):
        raise InputError(f"{ACTOR}.strategy: got {strategy!r}, a plan takes 'fsdp2'")
    fsdp = f"{ACTOR}.fsdp_config"
    for name in (f"{owner}.ulysses_sequence_parallel_size" for owner in (ACTOR, fsdp)):
        if of(name, 1) != 1:
            raise InputError(f"{name}: got {of(name)!r}, a plan takes 1")
    nodes, each = of("trainer.nnodes", 1), of("trainer.n_gpus_per_node", 8)
    if nodes * each != gpus:
        raise InputError(f"--gpus: got {gpus}, trainer.nnodes x trainer.n_gpus_per_node is {nodes} x {each}")
    model = of(f"{MODEL}.path")
    config = model_config(str(model))
    group = of(f"{ROLLOUT}.n", 1)
    prompt, response = of("data.max_prompt_length"), of("data.max_response_length")
    rows, update = of("data.train_batch_size") * group // gpus, of(f"{ACTOR}.ppo_mini_batch_size") * group // gpus
    images = 1 if sizes.get("images") is None else sizes["images"]
    pixels = given.get("data.mm_processor_kwargs.max_pixels") or default_pixels(str(model))
    image = sizes.get("image_tokens") or min(image_tokens(config, pixels), prompt - TEXT_TOKENS)
    text = sizes.get("text_tokens") or max(prompt - image * (images or 0), 1)
    if of(f"{ACTOR}.use_dynamic_bsz", False):
        micro = max(1, of(f"{ACTOR}.ppo_max_token_len_per_gpu") // (prompt + response))
    else:
        micro = of(f"{ACTOR}.ppo_micro_batch_size_per_gpu")
    micro = next(size for size in range(min(micro, update), 0, -1) if update % size == 0)
    rank = given.get(f"{MODEL}.lora_rank") or 0
    target = given.get(f"{MODEL}.target_modules") or "all-linear"
    lora = {"r": rank, "lora_alpha": given.get(f"{MODEL}.lora_alpha", 16), "target": target} if rank else None
    return Settings(
        config=config,
        gpus=gpus,
        rows=rows,
        micro_batch=micro,
        accumulation=update // micro,
        group=group,
        images=images or 0,
        image_tokens=image,
        text_tokens=text,
        response_tokens=response,
        attention="flash_attention_2",  # verl's, which needs no mask
        checkpointing=bool(of(f"{MODEL}.enable_gradient_checkpointing", True)),
        lora=lora,
        optimizer="adamw_torch",
        dtype={"bf16": "bfloat16", "fp16": "float16"}.get(of(f"{fsdp}.model_dtype", "fp32"), "float32"),  # verl's names
        divergence=_divergence(given),
        sharing="off",
        reference=bool(given.get(f"{ACTOR}.use_kl_loss")) and not rank,
        # verl's param_offload and optimizer_offload bring all of it back for an update
        sharding=Sharding(
            sync=not given.get(f"{fsdp}.use_no_sync_for_gradient_accumulation"),
            offload=bool(given.get(f"{fsdp}.offload_policy")),
        ),
        sampler=Sampler(
            kind="vllm",
            share=float(of(f"{ROLLOUT}.gpu_memory_utilization", 0.5)),
            gpus=of(f"{ROLLOUT}.tensor_model_parallel_size", 1),
            sleeps=bool(of(f"{ROLLOUT}.free_cache_engine", True)),
            length=prompt + response,
        ),
    )


def _divergence(given: dict[str, Any]) -> str | None:
    """What is measured; None where the perturbed view does not pass.

    Raises:
        InputError: There is no such recipe or algorithm.
    """
    recipe, algorithm = (given.get(f"trainer.v1.vppo.{name}") for name in ("recipe", "algorithm"))
    try:
        one_of("recipe", recipe or "default", tuple(RECIPES))
        one_of("algorithm", algorithm or "vppo", tuple(REGISTRY))
    except ValueError as error:
        raise InputError(f"trainer.v1.vppo.{error}") from error
    if given.get("trainer.v1.trainer_mode") not in MODES or not REGISTRY[algorithm or "vppo"].perturbs:
        return None
    return str(given.get("trainer.v1.vppo.divergence") or RECIPES[recipe or "default"]["divergence"])
