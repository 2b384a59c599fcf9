"""MiB that scoring and an update take beside the weights: `bench_memory.py FOLDER LAYOUT OUT`."""

from __future__ import annotations

import math
import os
import re
import sys
from pathlib import Path

os.environ.update(WORLD_SIZE="1", RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")

import bench_engine
import torch
import torch.distributed as dist
from bench_engine_settings import SEED, STEP
from bench_tiny import picture
from hydra import initialize_config_module

from vppo.perturbations import Perturbation
from vppo.verl.engine import ASK, Ask

ROWS, TOKENS = 2, 512  # of which a micro-batch has all


def resident(name: str) -> int:
    """KiB of the process: "VmRSS" now, "VmHWM" at most since its peak was forgotten."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))


def main(folder: str, layout: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{out}.rendezvous", rank=0, world_size=1)
    engine, actor = bench_engine.make_engine(folder, layout)
    processor = actor.model_config.get_processor()
    text = "<|vision_start|><|image_pad|><|vision_end|>colour?"
    rows = []
    for number in range(ROWS):
        tokens = TOKENS + number  # verl's rows differ in length
        encoded = processor(text=[text], images=[picture(number, "red")], return_tensors="pt")
        rows.append(
            {
                "input_ids": torch.cat([encoded["input_ids"][0], torch.randint(250, (tokens,))]),
                "response": tokens,
                "images": {name: encoded[name] for name in ("pixel_values", "image_grid_thw")},
                "advantages": torch.randn(tokens),
                "old_log_probs": -4 + torch.rand(tokens),
                "draw": number,
                "mean": math.nan,
            }
        )
    ask = Ask("kl", Perturbation("patch", 14, 0.5), own_patches=True, seed=SEED, step=STEP, check=False, share=True)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    bench_engine.run(engine, actor, rows, {} if layout.startswith("stock-") else {ASK: ask})
    Path(out).write_text(str((resident("VmHWM") - before) // 1024))
    dist.destroy_process_group()


if __name__ == "__main__":
    with initialize_config_module("verl.trainer.config", version_base=None):
        main(*sys.argv[1:])
