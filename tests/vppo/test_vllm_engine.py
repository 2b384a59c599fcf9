"""Versions of vLLM, image limits, and servers that are missing, silent or gone."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from packaging.version import Version
from support import families
from support.runs import FAMILY, rows, trainer

from vppo import vllm_engine
from vppo.checkpoints import saved_step
from vppo.errors import InputError
from vppo.train import train
from vppo.train_config import make_arguments


class Server(BaseHTTPRequestHandler):
    """Answers as far as a trainer asks before its first step; `info` is what it says of itself."""

    info: ClassVar[dict[str, Any]] = {}
    status = 200
    requests = 0

    def do_GET(self) -> None:
        type(self).requests += 1
        body = json.dumps({"vllm_config": {"model_config": self.info}}).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def server() -> Iterator[tuple[str, type[Server]]]:
    kind = type("OwnServer", (Server,), {})
    http = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}", kind
    http.shutdown()
    http.server_close()


def arguments(url: str, patience: float = 0.0) -> Any:
    return SimpleNamespace(vllm_server_base_url=url, vllm_server_timeout=patience)


def test_the_range_is_trls() -> None:
    """Its package and its own check say the same."""
    import warnings

    from trl import import_utils

    versions = vllm_engine.supported()
    assert "0.31.0" in versions and "0.22.0" in versions and "0.21.9" not in versions and "0.32.0" not in versions
    with pytest.MonkeyPatch.context() as patch:
        for number, warned in (("0.31.0", False), ("0.32.0", True)):
            patch.setattr(import_utils, "_is_package_available", lambda *_, number=number, **__: (True, number))
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                import_utils.is_vllm_available()
            assert bool(caught) == warned == (Version(number) not in versions)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, r"use_vllm: vLLM is not installed: pip install 'vllm>=0\.22\.0,<=0\.31\.0'"),
        ("0.32.1", r"found vLLM 0\.32\.1, and TRL 1\.16.* supports >=0\.22\.0,<=0\.31\.0: pip install 'vllm>=0\.22"),
        ("0.21.0", r"found vLLM 0\.21\.0"),
        ("0.31.0+cpu", None),
        ("0.24.0+cu129", None),
    ],
)
def test_versions(found: str | None, message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "installed", lambda: found)
    if message is None:
        vllm_engine.check_version()
        return
    with pytest.raises(InputError, match=message):
        vllm_engine.check_version()
    config = {"model": "nowhere", "dataset": "nowhere", "output_dir": str(tmp_path), "use_vllm": True, "use_cpu": True}
    with pytest.raises(InputError, match=message):  # before anything is loaded
        train(config)


def test_a_missing_server_is_told_within_a_minute() -> None:
    _, _, args = make_arguments({"model": "m", "dataset": "d", "output_dir": "o", "use_cpu": True})
    assert args.vllm_server_timeout + vllm_engine.CONNECT < 60
    with pytest.raises(InputError, match=r"http://127.0.0.1:9: no vLLM server has answered within 0.1 s"):
        vllm_engine.check_server(arguments("http://127.0.0.1:9", 0.1), {}, differ=False)


def test_a_server_that_is_not_well_is_no_server(server: tuple[str, type[Server]]) -> None:
    url, kind = server
    assert vllm_engine.answers(url, 0)
    kind.status = 503
    assert not vllm_engine.answers(url, 0)


LIMITS = {"min_pixels": 784, "max_pixels": 1568}


@pytest.mark.parametrize(
    ("told", "differ", "refused"),
    [
        (None, False, False),
        (None, True, True),
        (LIMITS, True, False),
        (LIMITS, False, False),
        ({**LIMITS, "max_pixels": 3136}, False, True),
        ({"max_pixels": 1568}, True, True),
        ({"fps": 1}, False, False),
    ],
)
def test_image_limits_of_a_server(told: Any, differ: bool, refused: bool, server: tuple[str, type[Server]]) -> None:
    url, kind = server
    kind.info = {"multimodal_config": {"mm_processor_kwargs": told}}
    if not refused:
        vllm_engine.check_server(arguments(url), LIMITS, differ)
        return
    with pytest.raises(InputError, match=r"restart it with --mm-processor-kwargs '\{\"min_pixels\": 784, \"max_pixels"):
        vllm_engine.check_server(arguments(url), LIMITS, differ)


def test_image_limits_of_a_processor(tmp_path: Path) -> None:
    processor = families.build(FAMILY)[1]
    model = families.build(FAMILY)[0]
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert vllm_engine.image_options(str(tmp_path), processor) == {}
    processor.image_processor.size = {"shortest_edge": 784, "longest_edge": 1568}
    assert vllm_engine.image_options(str(tmp_path), processor) == LIMITS
    processor.image_processor.do_resize = False
    with pytest.raises(InputError, match="processing_class: do_resize, size: vLLM reads its image processor from"):
        vllm_engine.image_options(str(tmp_path), processor)


def test_a_request_fails_where_its_server_is_gone(server: tuple[str, type[Server]]) -> None:
    """After retries that are over in 14 s and five connections; here they are all refused at once."""
    url, kind = server
    requests = pytest.importorskip("requests", reason="TRL's client needs requests, which comes with vLLM")
    session = requests.Session()
    vllm_engine.notice_silence(session)
    assert session.get(f"{url}/health").ok
    adapter = session.get_adapter(url)
    waits = [min(2**n, 120) for n in range(1, vllm_engine.RETRIES)]  # none before the first retry
    assert adapter.max_retries.total == vllm_engine.RETRIES
    assert sum(waits) + (vllm_engine.RETRIES + 1) * vllm_engine.CONNECT < 60
    probed = dict((name, value) for _, name, value in adapter.poolmanager.connection_pool_kw["socket_options"])
    import socket

    assert probed[socket.SO_KEEPALIVE] == 1
    silence = probed[socket.TCP_KEEPIDLE] + probed[socket.TCP_KEEPINTVL] * probed[socket.TCP_KEEPCNT]
    assert silence < 60
    adapter.max_retries = adapter.max_retries.new(total=1)
    started = time.monotonic()
    with pytest.raises(requests.ConnectionError):
        session.post("http://127.0.0.1:9/generate", json={})
    assert time.monotonic() - started < 60
    kind.status = 500
    before = kind.requests
    with pytest.raises(requests.exceptions.RetryError):
        session.get(f"{url}/health")
    assert kind.requests - before == 2


class Client:
    """TRL's side of a server, whose answers are fixed."""

    def __init__(self, gone_in: int | None) -> None:
        self.calls, self.gone_in = 0, gone_in

    def sync_weights(self) -> None:
        """Nothing to do."""

    def generate(self, prompts: list[Any], num_generations: int, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.gone_in:
            raise ConnectionError("Connection refused")
        letters = [families.VOCABULARY[character] for character in "abcdefgh"]
        answers = [[letters[i % 8], families.VOCABULARY["<eos>"]] for i in range(len(prompts))]
        return prompts, answers, [[[None]] * 2 for _ in answers], None


@pytest.mark.parametrize("moment", ["between steps", "while it answers"])
def test_a_server_that_is_gone_ends_the_run_with_a_checkpoint(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path, rows(4), max_steps=4, vllm_server_base_url="http://127.0.0.1:9")
    run.use_vllm, run.vllm_mode, run._last_loaded_step = True, "server", -1
    run.vllm_generation = Client(gone_in=3 if moment == "while it answers" else None)  # type: ignore[assignment]
    there = iter([True, True, moment == "while it answers"])
    monkeypatch.setattr(vllm_engine, "answers", lambda url, patience: next(there))
    with pytest.raises(InputError, match=r":9 no longer answers; the run can go on from .*checkpoint-2"):
        run.train()
    assert saved_step(tmp_path / "checkpoint-2") == 2
    weights = {name: weight.clone() for name, weight in run.model.named_parameters()}
    again = trainer(tmp_path, rows(4), max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 4
    assert any(not torch.equal(weights[name], weight) for name, weight in again.model.named_parameters())
