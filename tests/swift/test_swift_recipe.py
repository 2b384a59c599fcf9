"""The recipe of docs/other-trainers.md in ms-swift's own GRPO trainer."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vppo_kernels import vppo_advantages

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
BENCH = ROOT / "tests" / "verl" / "bench"
RECIPE = re.compile(r"^## ms-swift\n.*?^```python\n(.*?)^```", re.S | re.M)
OPTIONS = """
--rlhf_type grpo --model_type qwen2_5_vl --template qwen2_5_vl --reward_funcs letters --use_vllm false --tuner_type full
--freeze_vit false --torch_dtype float32 --bf16 false --attn_impl sdpa --gradient_checkpointing false --beta 0
--per_device_train_batch_size 4 --gradient_accumulation_steps 2 --num_generations 4 --max_length 128
--max_completion_length 8 --max_steps 2 --learning_rate 1e-3 --save_strategy no --logging_steps 1 --report_to none
--dataset_num_proc 1 --dataloader_num_workers 0
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of two steps of training: dependency, advantages before and after, masks; a tensor a micro-batch."""
    folder = tmp_path_factory.mktemp("swift")
    variables = {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, HERE, BENCH))),
        "PROBE": str(folder),
        "TINY": str(folder / "tiny"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }

    def run(*command: Any) -> None:
        done = subprocess.run(
            [sys.executable, *map(str, command)],
            env={**os.environ, **variables},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        assert done.returncode == 0, done.stdout[-6000:]

    run(BENCH / "bench_tiny.py", folder / "tiny")
    problems = []
    for number, colour in enumerate(["red", "green", "blue", "red"]):
        problems.append(
            {
                "messages": [{"role": "user", "content": f"<image>colour {number}?"}],
                "images": [str(folder / f"{number}.png")],
                "solution": colour,
            }
        )
    run("-c", f"from bench_tiny import picture\nfor n in range(4): picture(n, 'red').save(f'{folder}/{{n}}.png')")
    (folder / "problems.jsonl").write_text("\n".join(map(json.dumps, problems)))
    recipe = RECIPE.search((ROOT / "docs" / "other-trainers.md").read_text())
    assert recipe is not None
    (folder / "vppo_swift.py").write_text(recipe.group(1))
    where = ["--model", folder / "tiny", "--dataset", folder / "problems.jsonl", "--output_dir", folder / "out"]
    plugins = ["--external_plugins", HERE / "swift_probe.py", folder / "vppo_swift.py"]
    run(HERE / "swift_run.py", *where, *plugins, *OPTIONS.split())
    return torch.load(folder / "seen.pt")


def test_what_trains_are_the_advantages_of_vppo(seen: dict[str, Any]) -> None:
    steps = len(seen["dependency"]) // 2
    assert steps == 2 and all(len(values) == 4 for values in seen.values())
    for step in range(steps):
        of = slice(2 * step, 2 * step + 2)
        rows = {name: [row for batch in seen[name][of] for row in batch] for name in seen}
        before, dependency, mask, after = (
            torch.nn.utils.rnn.pad_sequence(rows[name], batch_first=True)
            for name in ("before", "dependency", "mask", "after")
        )
        expected = vppo_advantages(before, dependency, mask.bool())
        assert (expected != before).any()
        torch.testing.assert_close(after, expected)


def test_dependency_is_measured_where_tokens_are(seen: dict[str, Any]) -> None:
    for dependency, mask in zip(seen["dependency"], seen["mask"], strict=True):
        assert dependency.shape == mask.shape and (dependency[mask.bool()] > 0).any()
