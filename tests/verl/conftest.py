"""A tiny model, verl's engine and verl's trainer on a CPU; everything here is skipped where verl is not installed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

BENCH = Path(__file__).parent / "bench"
PATHS = os.pathsep.join(map(str, (BENCH, Path(__file__).parents[2])))
LEAN_PATHS = os.pathsep.join([str(BENCH / "lean"), PATHS])  # of what runs verl itself
STEPS = list[dict[str, float]]

try:
    version("verl")
except PackageNotFoundError:
    collect_ignore_glob = ["test_*.py"]
else:
    sys.path.insert(0, str(BENCH))
    os.environ.update(VERL_PLATFORM="cpu", VERL_USE_EXTERNAL_MODULES="bench_platform")  # where a test imports verl


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("verl")


def run_bench(script: str, *arguments: object, log: Path | None = None, **variables: str) -> None:
    """A script of the bench in a process of its own; it fails with the end of what it wrote."""
    done = subprocess.run(
        [sys.executable, BENCH / script, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS, **variables},
        cwd=None if log is None else log.parent,  # where hydra leaves a folder
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if log is not None:
        log.write_text(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.fixture(scope="session")
def bench() -> Callable[..., None]:
    return run_bench


@pytest.fixture(scope="session")
def tiny_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a model of a kind, its processor and `problems.parquet`; see `bench_tiny.py`."""

    @cache
    def make(kind: str) -> Path:
        folder = tmp_path_factory.mktemp("tiny")
        run_bench("bench_tiny.py", folder, kind)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny(tiny_of: Callable[[str], Path]) -> Path:
    return tiny_of("")


@pytest.fixture(scope="session")
def engine() -> Callable[..., None]:
    """Runs layouts of verl's engine on so many ranks; see `bench_engine.py`."""

    def run(tiny: Path, out: Path, ranks: int, *layouts: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, BENCH / "bench_engine.py", tiny, out, *layouts]
        logs = [out / f"{ranks}.{rank}.log" for rank in range(ranks)]
        processes = []
        for rank, log in enumerate(logs):
            variables = {**os.environ, **common, "PYTHONPATH": LEAN_PATHS, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with log.open("w") as file:
                processes.append(subprocess.Popen(command, env=variables, stdout=file, stderr=subprocess.STDOUT))
        try:
            codes = [process.wait(timeout=400) for process in processes]  # a rank that waits for ever is a fault, too
        finally:
            for process in processes:
                process.kill()
        assert codes == [0] * ranks, "\n".join(log.read_text()[-4000:] for log in logs)

    return run


@pytest.fixture(scope="session")
def train(tiny: Path) -> Callable[..., STEPS]:
    """Runs verl's trainer and returns each step's metrics; `out` gets its log, `folder` is of the model."""

    def run(
        out: Path, *overrides: str, nodes: int = 1, workers: int = 1, folder: Path = tiny, **variables: str
    ) -> STEPS:
        out.mkdir(parents=True, exist_ok=True)
        metrics = out / "metrics.jsonl"
        variables = {"VERL_FILE_LOGGER_PATH": str(metrics), "PYTHONPATH": LEAN_PATHS, **variables}
        run_bench("bench_run.py", nodes, workers, folder, *overrides, log=out / "log", **variables)
        return [json.loads(line)["data"] for line in metrics.read_text().splitlines()]

    return run
