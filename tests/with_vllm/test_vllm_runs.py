"""Resuming, and an analysis whose responses vLLM samples."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import pytest
import vllm
from colocated import AGREES, logged, reading_digits

import vppo
from vppo.demo.digits import strips


def test_a_resumed_run_samples_from_its_own_weights(digits: Path, tmp_path: Path) -> None:
    """The engine starts with the folder's weights, which the run has left behind."""
    saving = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 5e-3}
    reading_digits(tmp_path, digits, max_steps=2, **saving).train()
    run = reading_digits(tmp_path, digits, max_steps=3, **saving)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    gaps = logged(run, "vppo/sampler_gap_mean")
    print(f"resumed: {gaps}")
    assert run.state.global_step == 3 and len(gaps) == 3 and max(gaps) < AGREES


def test_an_analysis_samples_with_it(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "LLM", functools.partial(vllm.LLM, enforce_eager=True, num_gpu_blocks_override=128))
    items = list(itertools.islice(strips("held-out", 24, seed=0), 24))
    rows = [item.row for item in items]
    found = {
        sampler: vppo.analyze(
            str(digits), rows, sampler=sampler, temperature=0.0, max_tokens=20, dtype="float32", device="cpu", draws=1
        )
        for sampler in ("transformers", "vllm")
    }
    tables = [found[sampler].trajectories for sampler in ("transformers", "vllm")]
    same = sum(a == b for a, b in zip(*(table["text"] for table in tables), strict=True))
    print(f"{same} of {len(rows)} greedy responses are the same")
    assert same >= 22
    assert tables[1]["mean_dependency"].mean() > 0.1
