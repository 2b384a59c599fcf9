"""One rank of verl's engine, without Ray: `bench_engine.py FOLDER OUT LAYOUT ...` with RANK and WORLD_SIZE set.

For each of `LAYOUTS`, with "stock-" before it by verl's own engine, an engine scores the rows of `FOLDER/rows.pt`,
makes one update and scores them again; what it returned goes to `OUT/LAYOUT.RANK.pt`. Layouts with "shown" at the end
have rows with images alone.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.update(VERL_PLATFORM="cpu", VERL_USE_EXTERNAL_MODULES="bench_platform", HF_HUB_OFFLINE="1")

import torch
import torch.distributed as dist
import verl  # noqa: F401  (which loads the bench, and the plug-in)
from bench_engine_settings import SCALE_MIN, SEED, STEP, TEMPERATURE
from hydra import compose, initialize_config_module
from verl.models.transformers import qwen2_vl, qwen3_vl
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.engine import EngineRegistry
from verl.workers.utils.losses import ppo_loss

import vppo.verl.engine
from vppo.errors import InputError
from vppo.options import SAMPLED
from vppo.perturbations import Perturbation
from vppo.verl.engine import ASK, DRAW, VENDOR, Ask
from vppo.verl.losses import MEANS, SCALES
from vppo_kernels import linear_logprob

ACTOR, MODEL = "actor_rollout_ref.actor", "actor_rollout_ref.model"
LAYOUTS = {
    "padded": [],
    "apart": [],  # prompts are not shared
    "packed": [f"{MODEL}.use_remove_padding=True"],
    "flash": [f"{MODEL}.use_remove_padding=True"],  # the model's own attention is one that takes no mask
    "ulysses": [
        f"{MODEL}.use_remove_padding=True",
        f"{ACTOR}.ulysses_sequence_parallel_size=2",
        f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size=2",
    ],
    "checkpointed": [f"{MODEL}.enable_gradient_checkpointing=True"],
    "offloaded": [f"{ACTOR}.fsdp_config.param_offload=True", f"{ACTOR}.fsdp_config.optimizer_offload=True"],
    "offload-policy": [f"{ACTOR}.fsdp_config.offload_policy=True"],
    "bf16": [f"++{ACTOR}.fsdp_config.mixed_precision.param_dtype=bf16"],
    "lora": [f"{MODEL}.lora_rank=4", f"{MODEL}.lora_alpha=8"],
    "released-scale": [],  # workers find the factors of trajectories; or have been given them in the advantages
    "scaled-by-hand": [],
    "k3": [],  # what is measured
    "prob_drop": [],
    "lora-on-head": [f"{MODEL}.lora_rank=4", f"{MODEL}.target_modules=[lm_head,q_proj]"],
}


def make_engine(folder: str, layout: str) -> tuple[Any, Any]:
    """verl's engine, or ours, as its worker builds them; and the config of the actor."""
    kind = layout.removeprefix("stock-")
    packed = f"{MODEL}.use_remove_padding=True" in LAYOUTS[kind]
    config = compose(
        "ppo_trainer",
        [
            f"actor_rollout_ref.model.path={folder}",
            "actor_rollout_ref.model.use_remove_padding=False",
            "actor_rollout_ref.model.enable_gradient_checkpointing=False",
            "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
            "actor_rollout_ref.actor.strategy=fsdp2",
            "actor_rollout_ref.actor.fsdp_config.strategy=fsdp2",
            "actor_rollout_ref.actor.fsdp_config.use_torch_compile=False",
            "+actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=fp32",
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2",
            "actor_rollout_ref.actor.ppo_mini_batch_size=16",
            "actor_rollout_ref.actor.optim.lr=1e-3",
            "actor_rollout_ref.actor.optim.total_training_steps=2",
            *LAYOUTS[kind],
        ],
    )
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    actor.model_config = omega_conf_to_dataclass(config.actor_rollout_ref.model)
    actor.engine.use_remove_padding = packed
    os.environ["VERL_ENGINE_VENDOR"] = VENDOR if kind == layout else "cpu"
    torch.manual_seed(0)  # of LoRA's weights
    engine = EngineRegistry.new(
        "language_model", actor.strategy, actor.model_config, actor.engine, actor.optim, actor.checkpoint
    )
    engine.initialize()
    if kind == "flash":
        engine.module.config.get_text_config()._attn_implementation = "flash_attention_2"
    return engine, actor


def make_batch(rows: list[dict[str, Any]], processor: Any, **settings: Any) -> Any:
    """What verl's agent loop and trainer would have made of the rows."""
    entries = []
    for row in rows:
        grid = row["images"].get("image_grid_thw")
        places = torch.arange(len(row["input_ids"]))[None]
        rope = qwen3_vl.get_rope_index if "3" in type(processor).__name__ else qwen2_vl.get_rope_index
        seen = places.expand(3, -1) if grid is None else rope(processor, row["input_ids"], grid)
        count = row["response"]
        entries.append(
            {
                "input_ids": row["input_ids"],
                "prompts": row["input_ids"][:-count],
                "responses": row["input_ids"][-count:],
                "response_mask": torch.ones(count, dtype=torch.long),
                "loss_mask": torch.ones(count, dtype=torch.long),
                "position_ids": torch.cat([places, seen]),
                "multi_modal_inputs": row["images"],
                "old_log_probs": row["old_log_probs"],
                "advantages": row["advantages"],
                DRAW: torch.tensor(row["draw"]),
                MEANS: torch.tensor(row["mean"]),
            }
        )
    batch = tu.list_of_dict_to_tensordict(entries)
    tu.maybe_fix_3d_position_ids(batch)
    tu.assign_non_tensor(batch, temperature=TEMPERATURE, use_dynamic_bsz=False, calculate_entropy=True, **settings)
    return batch


def run(
    engine: Any, actor: Any, rows: list[dict[str, Any]], asked: dict[str, Ask], training: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Columns of the rows before an update (with `asked`) and after it, the norm of its gradient (with `training`), and
    how many patches the vision tower was given before it.
    """
    rank, ranks = engine.get_data_parallel_rank(), engine.get_data_parallel_size()
    share = len(rows) // ranks
    own = rows[rank * share : (rank + 1) * share]
    make = partial(
        make_batch,
        own,
        actor.model_config.get_processor(),
        micro_batch_size_per_gpu=2,
        use_remove_padding=actor.engine.use_remove_padding,
        global_batch_size=len(rows),
    )

    def columns(**more: Any) -> dict[str, list[torch.Tensor]]:
        with engine.eval_mode():
            output = engine.infer_batch(make(**more))["model_output"]
        return {name: list(values.unbind()) for name, values in output.items()}

    tower = next(module for name, module in engine.module.named_modules() if name.rpartition(".")[2] == "visual")
    patches: list[int] = []
    counted = tower.register_forward_pre_hook(lambda module, args: patches.append(len(args[0])))
    before = columns(**asked)
    counted.remove()
    reached: list[int] = []  # response tokens whose gradient comes to the head

    def watched(*args: Any, **options: Any) -> Any:
        found = linear_logprob(*args, **options)
        found.logprobs.register_hook(lambda gradient: reached.append(int((gradient != 0).sum())))
        return found

    with engine.train_mode(), mock.patch.object(vppo.verl.engine, "linear_logprob", watched):
        trained = engine.train_batch(make(**(training or {})), partial(ppo_loss, config=actor))
    norm = trained["metrics"].get("grad_norm")  # None of a rank whose sequences another one returns
    return {
        "before": before,
        "after": columns(),
        "norm": norm and float(norm),
        "patches": sum(patches),
        "reached": sum(reached),
    }


def main(folder: str, out: str, *layouts: str) -> None:
    dist.init_process_group("gloo")
    rows = torch.load(Path(folder, "rows.pt"), weights_only=False)
    ask = Ask("kl", Perturbation("patch", 14, 0.5), own_patches=True, seed=SEED, step=STEP, check=False, share=True)
    for name in layouts:
        layout = name.removesuffix("-shown")
        try:
            engine, actor = make_engine(folder, layout)
        except InputError as error:
            Path(out, f"{name}.txt").write_text(str(error))
            continue
        part = rows if layout == name else [row for row in rows if row["images"]]
        asked = replace(ask, share=layout != "apart", divergence=layout if layout in SAMPLED else "kl")
        if layout == "scaled-by-hand":
            part = [{**row, "advantages": row["advantages"] * row["alpha"]} for row in part]
        training = {SCALES: (SCALE_MIN, None)} if layout == "released-scale" else {}
        found = run(engine, actor, part, {} if layout.startswith("stock-") else {ASK: asked}, training)
        torch.save(found, Path(out, f"{name}.{dist.get_rank()}.pt"))
    dist.destroy_process_group()


if __name__ == "__main__":
    with initialize_config_module("verl.trainer.config", version_base=None):
        main(*sys.argv[1:])
