"""Distillation of models that FSDP2 shards over two processes: what one process does with the whole batch."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support.distilling import text_model, trainer, vision_model
from support.shards import shard_over_cpus
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from vppo.distill_trainer import ExactDistillationTrainer
from vppo.perturbations import Perturbation

CASES: dict[str, dict[str, Any]] = {
    "text": {"vision": False, "beta": 0.0},
    "a teacher that came sharded": {"vision": False, "beta": 1.0, "shard_teacher": True},
    "images, checkpointed": {"vision": True, "beta": 0.5, "gradient_checkpointing": True},
    "images, two views": {
        "vision": True, "beta": 1.0, "student_view": Perturbation("grey"), "weighing_view": Perturbation("blur"),
    },
}  # fmt: skip


def whole(weight: Tensor) -> Tensor:
    return (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach().clone()


def trained(path: Path, case: dict[str, Any], world: int) -> dict[str, Any]:
    make = vision_model if case["vision"] else text_model
    student, teacher = make(32, 0), make(48, 1)
    if case.get("shard_teacher") and world > 1:  # accelerate leaves it whole
        teacher = fully_shard(teacher, reshard_after_forward=True)  # a root stays gathered, and has no backward
    settings = {name: value for name, value in case.items() if name != "shard_teacher"}
    settings |= {"per_device_train_batch_size": 4 // world, "max_steps": 2}
    run = trainer(ExactDistillationTrainer, path, student, teacher, **settings)
    start = {name: whole(weight) for name, weight in run.model.named_parameters()}
    run.train()
    weights = dict(run.model.named_parameters())
    return {
        "moved": {name: whole(weight) - start[name] for name, weight in weights.items()},
        "losses": [log["loss"] for log in run.state.log_history if "loss" in log],
        "entropies": [log["entropy"] for log in run.state.log_history if "entropy" in log],
        "sharded": [
            all(isinstance(w, DTensor) for w in model.parameters()) for model in (run.model, run.teacher_model)
        ],
    }


def two(rank: int, port: int, path: Path) -> None:
    shard_over_cpus(rank, 2, port)
    torch.save({name: trained(path / "run", case, 2) for name, case in CASES.items()}, path / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    path = tmp_path_factory.mktemp("fsdp")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(two, args=(port, path), nprocs=2)
    return [torch.load(path / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(case: str, ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    alone = trained(tmp_path, CASES[case], 1)
    assert alone["sharded"] == [False, False] and max(moved.abs().max() for moved in alone["moved"].values()) > 1e-3
    for found in (rank[case] for rank in ranks):
        assert found["sharded"] == [True, CASES[case].get("shard_teacher", False)]
        for name in ("losses", "entropies"):
            assert found[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-6)
        for name, moved in alone["moved"].items():
            assert (found["moved"][name] - moved).abs().max() <= 1e-4 * moved.abs().max() + 1e-6, name
