"""The demo's digits as verl reads them, and its model after the warm-up: `bench_digits.py OUT STEPS PROMPTS SEED`."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import bench_torchvision  # noqa: F401  (before transformers)
import pandas as pd
import torch
from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor

from vppo.demo.digits import Strip, strips
from vppo.demo.model import CELL, build_model, build_processor
from vppo.demo.warmup import warm_up

HELD_OUT = 512


def problems(items: list[Strip]) -> pd.DataFrame:
    rows = []
    for index, strip in enumerate(items):
        stored = io.BytesIO()
        strip.image.save(stored, "PNG")
        picture = {"bytes": stored.getvalue(), "min_pixels": CELL**2, "max_pixels": 16 * CELL**2}
        rows.append(
            {
                "data_source": "digits",
                "prompt": [{"role": "user", "content": f"<image>{strip.prompt[0]['content']}"}],
                "images": [picture],
                "reward_model": {"style": "rule", "ground_truth": strip.answer},
                "extra_info": {"index": index},
            }
        )
    return pd.DataFrame(rows)


def main(out: Path, steps: int, prompts: int, seed: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    processor = build_processor()
    model = build_model(processor, seed)
    warm_up(model, processor, seed)
    model.save_pretrained(out)
    whole = Qwen2_5_VLProcessor(
        processor.image_processor, processor.tokenizer, Qwen2VLVideoProcessor(), chat_template=processor.chat_template
    )
    whole.save_pretrained(out)
    problems(list(strips("train", prompts * steps, seed + 1))).to_parquet(out / "problems.parquet")
    problems(list(strips("held-out", HELD_OUT, seed=0))).to_parquet(out / "held_out.parquet")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
