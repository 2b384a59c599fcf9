"""The examples for large runs fit the GPUs that they are written for, by their plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from vppo.plan.estimate import estimate
from vppo.plan.run import RESERVE
from vppo.plan.sampler import sampler_memory
from vppo.plan.settings import Settings, Sharding, from_config, read_accelerate
from vppo.prefix_sharing import GIB
from vppo.train_config import load_config

EXAMPLES = Path(__file__).parents[2] / "examples"
GPUS = {"qwen2_5_vl_7b": 8, "qwen2_5_vl_32b": 32}
MEMORY = 80 * GIB


def settings_of(name: str) -> Settings:
    gpus = GPUS[name]
    config = load_config(EXAMPLES / f"{name}.yaml")
    return from_config(
        config, gpus=gpus, accelerate=read_accelerate(EXAMPLES / "accelerate" / f"fsdp2_{gpus}_gpus.yaml")
    )


@pytest.mark.parametrize("name", GPUS)
def test_they_are_the_papers(name: str) -> None:
    """384 prompts x 8 responses for three updates of 128 prompts; every layer and every micro-batch by itself."""
    plan, gpus = settings_of(name), GPUS[name]
    assert plan.rows * gpus == 384 * 8 and plan.group == 8 and plan.updates == 3
    assert plan.micro_batch * plan.accumulation * gpus == 128 * 8
    assert plan.response_tokens == (2048 if name == "qwen2_5_vl_7b" else 4096)
    assert plan.sharding == Sharding(sync=True) and plan.precision == "bf16" and plan.checkpointing


@pytest.mark.slow
@pytest.mark.parametrize("name", GPUS)
def test_they_fit(name: str) -> None:
    plan = settings_of(name)
    found = estimate(plan)
    sampler = sampler_memory(plan, found.parameters, MEMORY)
    assert found.peak < MEMORY * (1 - RESERVE) - sampler.held
    assert sampler.fits


@pytest.mark.slow
def test_whole_gradients_do_not_fit_at_32b() -> None:
    """Why the example reduces them after every micro-batch: in 16 bits they take two bytes for each weight."""
    plan = settings_of("qwen2_5_vl_32b")
    plan = replace(plan, sharding=Sharding(sync=False), rows=32, response_tokens=256, image_tokens=64, text_tokens=64)
    found = estimate(plan, scoring=False)
    assert found.peaks["training pass"]["gradients"] >= 2 * found.parameters
    assert sum(found.peaks["training pass"].values()) > MEMORY * (1 - RESERVE)


@pytest.mark.parametrize("gpus", GPUS.values())
def test_every_line_for_accelerate_says_what_it_is(gpus: int) -> None:
    lines = (EXAMPLES / "accelerate" / f"fsdp2_{gpus}_gpus.yaml").read_text().splitlines()
    assert all(" # " in line or line.startswith("#") for line in lines if line)
