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
    assert plan.image_tokens == 1003520 // 28**2
    assert plan.config.text_config.num_hidden_layers == 28 and plan.sharding == Sharding(sync=True)
    assert plan.sampler.share == 0.6 and plan.sampler.sleeps and plan.sampler.gpus == 1


@pytest.mark.parametrize(
    ("override", "divergence"),
    [
        ("trainer.v1.trainer_mode=sync", None),
        ("+trainer.v1.vppo.algorithm=dapo", None),
        ("+trainer.v1.vppo.algorithm=tgf", "kl"),
        ("+trainer.v1.vppo.recipe=official", "k3"),
        ("trainer.v1.trainer_mode=vppo_colocate_async", "kl"),
    ],
)
def test_the_perturbed_view_is_planned_where_it_passes(override: str, divergence: str | None) -> None:
    assert settings_of(read_overrides(EXAMPLES / "verl_qwen2_5_vl_7b.sh", [override]), gpus=8).divergence == divergence


def test_weights_are_on_the_cpu_during_an_update_by_offload_policy_alone() -> None:
    """verl brings what `param_offload` and `optimizer_offload` put away back to the GPU for every update."""
    fsdp = "actor_rollout_ref.actor.fsdp_config"

    def sharding(*overrides: str) -> Sharding:
        return settings_of(read_overrides(EXAMPLES / "verl_qwen2_5_vl_7b.sh", overrides), gpus=8).sharding

    assert sharding(f"{fsdp}.param_offload=True", f"{fsdp}.optimizer_offload=True") == Sharding(sync=True)
    assert sharding(f"{fsdp}.offload_policy=True") == Sharding(sync=True, offload=True)
    assert sharding(f"{fsdp}.use_no_sync_for_gradient_accumulation=True") == Sharding()


def test_what_a_script_does_not_say_is_as_verl_has_it() -> None:
    given = read_overrides(EXAMPLES / "verl_qwen2_5_vl_7b.sh")
    del given["actor_rollout_ref.model.enable_gradient_checkpointing"]
    plan = settings_of(given, gpus=8)
    assert plan.checkpointing and plan.dtype == "float32"
    bf16 = {**given, "actor_rollout_ref.actor.fsdp_config.model_dtype": "bf16"}
    assert settings_of(bf16, gpus=8).dtype == "bfloat16"


def test_what_cannot_be_planned(tmp_path: Path) -> None:
    given = read_overrides(EXAMPLES / "verl_qwen2_5_vl_7b.sh")
    with pytest.raises(InputError, match=r"--gpus: got 16, trainer\.nnodes x trainer\.n_gpus_per_node is 1 x 8"):
        settings_of(given, gpus=16)
    with pytest.raises(InputError, match="strategy: got 'megatron', a plan takes 'fsdp2'"):
        settings_of({**given, "actor_rollout_ref.actor.strategy": "megatron"}, gpus=8)
    for owner in ("actor_rollout_ref.actor", "actor_rollout_ref.actor.fsdp_config"):
        with pytest.raises(InputError, match=rf"{owner}\.ulysses_sequence_parallel_size: got 2, a plan takes 1"):
            settings_of({**given, f"{owner}.ulysses_sequence_parallel_size": 2}, gpus=8)
    with pytest.raises(InputError, match=r"trainer\.v1\.vppo\.algorithm: got 'vpo', takes one of"):
        settings_of({**given, "trainer.v1.vppo.algorithm": "vpo"}, gpus=8)
    del given["data.max_response_length"]
    with pytest.raises(InputError, match=r"data\.max_response_length: missing"):
        settings_of(given, gpus=8)
    (tmp_path / "other.sh").write_text("echo")
    with pytest.raises(InputError, match="takes overrides for verl"):
        read_overrides(tmp_path / "other.sh")
    with pytest.raises(InputError, match="got 'nonsense', takes name=value"):
        read_overrides(EXAMPLES / "verl_qwen2_5_vl_7b.sh", ["nonsense"])
