"""Several processes of which some have prompts of text alone: training runs, and all keep the same weights."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from support import families
from support.runs import FAMILY, fix_rollouts, rows, trainer

from vppo.monitoring.completions import CompletionLog

LENGTHS = (6, 3, 5, 1, 4, 6, 2, 5)
PLAIN = {"optim": "sgd", "learning_rate": 0.1, "weight_decay": 0.0, "max_steps": 1, "shuffle_dataset": False}
WORLDS = (2, 3)


def nothing_to_learn(completions: list[Any], **kwargs: Any) -> list[float]:
    return [1.0] * len(completions)


def images_of(case: str, world: int) -> tuple[int, ...]:
    """Images of the prompts, four rollouts each; every process has two prompts."""
    return {
        "the first alone has images": (1, 1, *[0] * (2 * world - 2)),
        "the last alone has images": (*[0] * (2 * world - 2), 2, 1),
        "one prompt in all": (*[0] * (2 * world - 1), 1),
        "images and text everywhere": (1, 0) * world,
        "text alone": (0,) * (2 * world),
    }[case]


CASES = (
    "the first alone has images",
    "the last alone has images",
    "one prompt in all",
    "images and text everywhere",
    "text alone",
)
# what a run is given beside: in micro-batches of two rows
WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {"recipe": "paper"},
    "official": {"recipe": "official"},
    "dapo": {"algorithm": "dapo"},
    "logged": {"log_completions": True, "log_multimodal": True},
    "several steps": {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "max_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "nothing to learn": {"reward": nothing_to_learn},
}


def train(path: Path, case: str, way: str, world: int, processes: int) -> dict[str, Any]:
    """Weights and log after training on the rows of `world` processes."""
    settings = {"gradient_accumulation_steps": 4 * world // processes, **PLAIN, **WAYS[way]}
    data = rows(2 * world, images=images_of(case, world))
    run = trainer(path, data, per_device_train_batch_size=2, **settings)
    fix_rollouts(run, LENGTHS)
    size = 8 * world
    run._completions["train"] = CompletionLog(run.reward_func_names, rows=size, images=size)  # as loggers of images ask
    run.train()
    weights = {name: weight.detach().clone() for name, weight in run.model.named_parameters()}
    return {"weights": weights, "log": run.state.log_history, "images": run._completions["train"].pictures()}


def process(rank: int, world: int, port: int, path: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    results = {}
    for way in WAYS:
        for case in CASES if way in ("default", "official") else CASES[:1]:
            results[way, case] = train(path / "run", case, way, world, world)
    torch.save(results, path / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module", params=WORLDS)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each process found."""
    path = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(process, args=(request.param, port, path), nprocs=request.param)
    return [torch.load(path / f"{rank}.pt", weights_only=False) for rank in range(request.param)]


@pytest.mark.slow
def test_all_processes_go_on_together(ranks: list[dict[Any, Any]]) -> None:
    before = dict(families.build(FAMILY)[0].named_parameters())
    for key, first in ranks[0].items():
        assert all(weight.isfinite().all() for weight in first["weights"].values()), key
        moved = max((weight - before[name]).abs().max() for name, weight in first["weights"].items())
        assert (moved > 1e-4) == (key[0] != "nothing to learn"), key
        for other in ranks[1:]:
            assert all(torch.equal(w, other[key]["weights"][name]) for name, w in first["weights"].items()), key


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_they_train_as_one_process_does(case: str, ranks: list[dict[Any, Any]], tmp_path: Path) -> None:
    alone = train(tmp_path, case, "default", len(ranks), 1)
    for name, weight in ranks[0]["default", case]["weights"].items():
        torch.testing.assert_close(weight, alone["weights"][name], rtol=1e-4, atol=1e-5)
    shared = [key for key in alone["log"][0] if key.startswith(("vppo/", "reward")) and "seconds" not in key]
    assert "vppo/scored_fraction" in shared
    log = ranks[0]["default", case]["log"][0]
    assert {key: log[key] for key in shared} == pytest.approx({key: alone["log"][0][key] for key in shared}, rel=1e-4)


@pytest.mark.slow
def test_pictures_are_logged_beside_their_prompts(ranks: list[dict[Any, Any]]) -> None:
    images = ranks[0]["logged", CASES[0]]["images"]
    assert [len(shown or ()) for shown in images] == [1] * 8 + [0] * (8 * len(ranks) - 8)
