"""Settings of a plan from overrides for verl."""

from __future__ import annotations

from pathlib import Path

import pytest

from vppo.errors import InputError
from vppo.plan.settings import Sharding
from vppo.plan.verl_settings import read_overrides, settings_of

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_overrides_of_a_script_that_builds_on_another() -> None:
    given = read_overrides(EXAMPLES / "verl_qwen2_5_vl_32b.sh", ["trainer.nnodes=8", "+trainer.v1.vppo.divergence=jsd"])
    assert given["actor_rollout_ref.model.path"] == "Qwen/Qwen2.5-VL-32B-Instruct"
    assert given["data.max_response_length"] == 4096 and given["data.max_prompt_length"] == 2048
    assert given["trainer.nnodes"] == 8 and given["trainer.v1.vppo.divergence"] == "jsd"
    assert given["actor_rollout_ref.actor.optim.lr"] == 1e-6 or float(given["actor_rollout_ref.actor.optim.lr"]) == 1e-6


def test_the_seven_billion() -> None:
    """384 prompts x 8 over 8 GPUs; 16,384 tokens are four rows of 4,096."""
    plan = settings_of(read_overrides(EXAMPLES / "verl_qwen2_5_vl_7b.sh"), gpus=8)
    assert (plan.rows, plan.updates, plan.group, plan.micro_batch, plan.accumulation) == (384, 3, 8, 4, 32)
    assert (plan.prompt_tokens, plan.response_tokens) == (2048, 2048)
    assert plan.config.text_config.num_hidden_layers == 28 and plan.sharding == Sharding(sync=True)
    assert plan.sampler.share == 0.6 and plan.sampler.sleeps and plan.sampler.gpus == 1


def test_what_cannot_be_planned(tmp_path: Path) -> None:
    given = read_overrides(EXAMPLES / "verl_qwen2_5_vl_7b.sh")
    with pytest.raises(InputError, match=r"--gpus: got 16, trainer\.nnodes x trainer\.n_gpus_per_node is 1 x 8"):
        settings_of(given, gpus=16)
    with pytest.raises(InputError, match="strategy: got 'megatron', a plan takes 'fsdp2'"):
        settings_of({**given, "actor_rollout_ref.actor.strategy": "megatron"}, gpus=8)
    del given["data.max_response_length"]
    with pytest.raises(InputError, match=r"data\.max_response_length: missing"):
        settings_of(given, gpus=8)
    (tmp_path / "other.sh").write_text("echo")
    with pytest.raises(InputError, match="takes overrides for verl"):
        read_overrides(tmp_path / "other.sh")
    with pytest.raises(InputError, match="got 'nonsense', takes name=value"):
        read_overrides(EXAMPLES / "verl_qwen2_5_vl_7b.sh", ["nonsense"])
