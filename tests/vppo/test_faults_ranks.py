"""Two processes of a run of which one is told to end, or is killed: both stop at the same step, and all goes on."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from support.faultruns import before, die, ending, prepare

from vppo.checkpoints import last_complete_checkpoint

WORLD, STEPS, SECONDS = 2, 3, 300


def outcome(config: dict[str, Any], run: Path, **changes: Any) -> str:
    """How a run ended."""
    from vppo.errors import InputError
    from vppo.train import train

    try:
        train({**config, "output_dir": str(run), **changes})
    except (InputError, SystemExit) as error:
        return f"{type(error).__name__} {error}"
    return "done"


def process(rank: int, port: int, path: Path, config: dict[str, Any], part: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    import transformers

    found: dict[str, str] = {}
    if part == "first":
        found["straight"] = outcome(config, path / "straight")
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                tell = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
                before(transformers.Trainer, "training_step", tell, patch.setattr, 2)
            found["told"] = outcome(config, path / "told", save_steps=100)
        found["other seed"] = outcome(config, path / "told", resume=True, seed=3)
        found["resumed"] = outcome(config, path / "told", resume=True)
        if rank == 1:
            before(transformers.Trainer, "_save_rng_state", die, call=2)
        found["alone"] = outcome(config, path / "killed")
    else:
        found["resumed"] = outcome(config, path / "killed", resume=True)
    (path / f"{part}-{rank}.json").write_text(json.dumps(found))


def start(path: Path, config: dict[str, Any], part: str) -> list[int | None]:
    """Exit codes of both processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=process, args=(rank, port, path, config, part)) for rank in range(WORLD)]
    for one in processes:
        one.start()
    for one in processes:
        one.join(SECONDS)
    codes = [one.exitcode for one in processes]
    for one in processes:
        one.kill()
    return codes


@pytest.mark.slow
def test_one_of_two_processes_is_told_to_end_or_killed(tmp_path: Path) -> None:
    config = prepare(tmp_path, max_steps=STEPS, ddp_timeout=30)
    assert start(tmp_path, config, "first") == [0, -signal.SIGKILL]
    first = json.loads((tmp_path / "first-0.json").read_text())
    assert (first["straight"], first["told"], first["resumed"]) == ("done", "SystemExit 143", "done")
    assert first["other seed"].startswith("InputError seed: got 3, but the run in ")
    assert ending(tmp_path / "told") == ending(tmp_path / "straight")
    assert sorted(path.name for path in (tmp_path / "told").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]

    assert first["alone"].startswith("InputError process 0: another process of this run has ended or does not answer")
    assert last_complete_checkpoint(tmp_path / "killed") == tmp_path / "killed" / "checkpoint-1"
    assert start(tmp_path, config, "second") == [0, 0]
    assert ending(tmp_path / "killed") == ending(tmp_path / "straight")
