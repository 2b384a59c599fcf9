"""vLLM behind TRL's own server command: prompts and features agree; what a CPU cannot do is to take new weights."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cpu_engine
import pytest
from colocated import AGREES, logged, reading_digits
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration
from trl.scripts.vllm_serve import ScriptArguments, build_command

from vppo import vllm_engine
from vppo.checkpoints import saved_step
from vppo.errors import InputError
from vppo.loading import load_processor

STARTING = 420.0  # seconds


@dataclass
class Server:
    url: str
    process: subprocess.Popen[bytes]


@pytest.fixture(scope="module")
def server(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`trl vllm-serve`, with what the CPU's build needs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    served = ScriptArguments(
        model=str(digits), host="127.0.0.1", port=port, dtype="float32", max_model_len=256, enforce_eager=True
    )
    command = [sys.executable, str(Path(cpu_engine.__file__)), *build_command(served)[3:]]
    log = tmp_path_factory.mktemp("server") / "log"
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + STARTING
    try:
        while not vllm_engine.answers(url, 1.0):
            assert process.poll() is None and time.monotonic() < end, log.read_text(errors="replace")[-4000:]
        yield Server(url, process)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_weights_need_a_gpu(server: Server, digits: Path, tmp_path: Path) -> None:
    """This is what stops `vllm_mode: server` on a CPU."""
    reason = r"NCCL weight-transfer engine, which needs a CUDA device, got 'cpu(:0)?'"
    with pytest.raises(NotImplementedError, match=reason):
        reading_digits(tmp_path, digits, vllm_mode="server", vllm_server_base_url=server.url)


def test_other_image_limits_are_refused(server: Server, digits: Path, tmp_path: Path) -> None:
    processor = load_processor(str(digits), min_pixels=784, max_pixels=2 * 784)
    with pytest.raises(InputError, match="restart it with --mm-processor-kwargs"):
        reading_digits(tmp_path, digits, vllm_mode="server", vllm_server_base_url=server.url, processor=processor)


def test_a_run_until_the_server_is_gone(
    server: Server, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without new weights the first step's are the server's; the last of these tests, since it ends the server."""
    monkeypatch.setattr(VLLMClient, "init_communicator", lambda self, device: None)
    monkeypatch.setattr(VLLMGeneration, "sync_weights", lambda self: None)
    run = reading_digits(
        tmp_path, digits, vllm_mode="server", vllm_server_base_url=server.url, max_steps=4, learning_rate=1e-12
    )
    sample, calls = run.vllm_generation.generate, iter(range(9))

    def generate(*args: object, **kwargs: object) -> object:
        if next(calls) == 2:
            os.killpg(server.process.pid, signal.SIGKILL)
            server.process.wait()
        return sample(*args, **kwargs)

    monkeypatch.setattr(run.vllm_generation, "generate", generate)
    started = time.monotonic()
    with pytest.raises(InputError, match=r"no longer answers; the run can go on from .*checkpoint-2"):
        run.train()
    gaps, rewards = logged(run, "vppo/sampler_gap_mean"), logged(run, "reward")
    print(f"server: gap {gaps}, reward {rewards}, {time.monotonic() - started:.0f} s in all")
    assert len(gaps) == 2 and max(gaps) < AGREES
    assert saved_step(tmp_path / "checkpoint-2") == 2
