"""PAPO's two forwards under FSDP2: two processes that each hold a part of the model do what one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.shards import shard_over_cpus
from test_trainer_fsdp import launch, run_of, whole

PAPO = {"algorithm": "papo", "papo_kl_coef": 0.3, "papo_entropy_coef": 0.2}
CASES: dict[str, dict[str, Any]] = {
    "whole model": {},
    "tied head": {"family": "qwen2_vl"},
    "LoRA": {"lora": True},
    "rows whole": {"prefix_sharing": "off"},
    "two micro-batches": {"gradient_accumulation_steps": 2},
    "a process with text alone": {"images": (1, 0, 0), "shuffle_dataset": False},
}


def trained(path: Path, case: dict[str, Any], world: int) -> dict[str, Any]:
    run = run_of(path, world, **{**PAPO, **case})
    run.train()
    steps = [log for log in run.state.log_history if "loss" in log]
    return {
        "weights": {name: whole(weight) for name, weight in run.model.named_parameters()},
        **{name: [log[name] for log in steps] for name in ("loss", "grad_norm", "vppo/papo_kl")},
    }


def two(rank: int, port: int, path: Path) -> None:
    shard_over_cpus(rank, 2, port)
    torch.save({name: trained(path / "run", case, 2) for name, case in CASES.items()}, path / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return launch(two, 2, tmp_path_factory.mktemp("papo"))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(case: str, ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    alone = trained(tmp_path, CASES[case], 1)
    assert all(norm > 1e-3 for norm in alone["grad_norm"]) and all(kl > 0 for kl in alone["vppo/papo_kl"])
    for found in (rank[case] for rank in ranks):
        assert found["loss"] == pytest.approx(alone["loss"], abs=2e-6)
        assert found["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-5)
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=2e-6)
