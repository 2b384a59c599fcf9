"""PAPO's two forwards in two processes, which hold a part of the model (FSDP2) or all of it (DDP): what one does."""

from __future__ import annotations

import os
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
COPIED = ("whole model", "LoRA", "rows whole", "two micro-batches")


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


def copied(rank: int, port: int, path: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.save({name: trained(path / "run", CASES[name], 2) for name in COPIED}, path / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return launch(two, 2, tmp_path_factory.mktemp("papo"))


@pytest.fixture(scope="module")
def whole_copies(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return launch(copied, 2, tmp_path_factory.mktemp("papo"))


def same_as_alone(case: str, ranks: list[dict[str, Any]], path: Path) -> None:
    alone = trained(path, CASES[case], 1)
    assert all(norm > 1e-3 for norm in alone["grad_norm"]) and all(kl > 0 for kl in alone["vppo/papo_kl"])
    for found in (rank[case] for rank in ranks):
        assert found["loss"] == pytest.approx(alone["loss"], abs=2e-6)
        assert found["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-5)
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_that_share_the_model(case: str, sharded: list[dict[str, Any]], tmp_path: Path) -> None:
    same_as_alone(case, sharded, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", COPIED)
def test_two_processes_with_a_model_each(case: str, whole_copies: list[dict[str, Any]], tmp_path: Path) -> None:
    same_as_alone(case, whole_copies, tmp_path)
