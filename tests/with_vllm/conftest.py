"""Tests with vLLM's own engine, on a CPU; without it there are none. `make test-vllm` runs them."""

from __future__ import annotations

import functools
import gc
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("vllm") is None or torch.version.cuda is not None:
    collect_ignore_glob = ["test_*.py"]
else:
    import cpu_engine

    cpu_engine.prepare()


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model after its warm-up, in float32."""
    from vppo.demo.model import build_model, build_processor
    from vppo.demo.warmup import warm_up

    processor = build_processor()
    model = build_model(processor, seed=0)
    warm_up(model, processor, seed=0)
    return cpu_engine.save_for_vllm(model, processor, tmp_path_factory.mktemp("digits"))


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """TRL's engine computes in float32, compiles nothing, and holds little: the memory of an engine comes back late."""
    from trl.generation import vllm_generation

    plain = functools.partial(vllm_generation.LLM, enforce_eager=True, dtype="float32", num_gpu_blocks_override=128)
    monkeypatch.setattr(vllm_generation, "LLM", plain)
    yield
    gc.collect()


def pytest_collection_modifyitems(items: list[Any]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.vllm)
