"""TRL's head with this library's operation inside: the same steps, without products for filtered tokens."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import trl.trainer.utils as seam
from accelerate import PartialState
from peft import LoraConfig
from support.runs import fix_rollouts, generation_batch, rows, trainer
from torch import Tensor

import vppo.packed_trainer
from vppo import fused_head
from vppo.trl_seams import warn_slower
from vppo_kernels.linear_head import LinearHead

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
CASES: dict[str, dict[str, Any]] = {
    "one step": {},
    "gradient accumulation": dict(per_device_train_batch_size=2, gradient_accumulation_steps=2),
    "two iterations": dict(num_iterations=2, max_steps=4),
    "LoRA": dict(peft_config=LORA, beta=0.1),
    "tied head": dict(family="qwen2_vl"),
    "softcap": dict(family="gemma3"),
    "entropy bonus": dict(entropy_coef=0.01),
}


def trained(path: Path, case: dict[str, Any]) -> tuple[dict[str, Tensor], list[float]]:
    """Updates of all weights by plain gradient descent, and the losses."""
    run = trainer(path, rows(4), optim="sgd", learning_rate=1.0, max_grad_norm=1e9, **case)
    fix_rollouts(run)
    before = {name: weight.detach().clone() for name, weight in run.model.named_parameters()}
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    return {name: weight.detach() - before[name] for name, weight in run.model.named_parameters()}, losses


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_same_training_as_with_trls_own(
    case: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, our_losses = trained(tmp_path / "ours", case)
    monkeypatch.setattr(vppo.packed_trainer, "fused_head", lambda *_, **__: nullcontext())
    trls, trl_losses = trained(tmp_path / "trl", case)
    assert our_losses == pytest.approx(trl_losses, rel=1e-4, abs=1e-6)
    moved = 0
    for name, update in trls.items():
        scale = update.abs().max()
        moved += bool(scale)
        assert (ours[name] - update).abs().max() <= 1e-3 * scale + 1e-6, name
    assert moved


def test_filtered_tokens_meet_no_product_of_the_backward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, keep_ratio=0.4)
    fix_rollouts(run)
    batch = generation_batch(run, rows(1))
    seen: list[int] = []
    accumulate = LinearHead.accumulate

    def counting(self: LinearHead, *args: Any) -> None:
        seen.append(self.rows)
        accumulate(self, *args)

    monkeypatch.setattr(LinearHead, "accumulate", counting)
    batch["num_items_in_batch"] = batch["completion_mask"].sum()
    run.compute_loss(run.model, batch).backward()
    active = int((batch["advantages"] * batch["completion_mask"] != 0).sum())
    assert seen and set(seen) == {active}
    assert 0 < active < 0.6 * batch["completion_mask"].sum()


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    warn_slower.cache_clear()
    PartialState()  # its logger needs one, whichever tests have run before
    caplog.set_level(logging.WARNING, logger="vppo.trl_seams")
    return caplog


@pytest.mark.skipif(not hasattr(seam, "_use_triton"), reason="TRL 1.15 has no such seam")
def test_a_seam_that_is_gone_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(seam, "_use_triton")
    for _ in range(2):
        with fused_head.fused_head(None, gathered=True):
            assert not isinstance(seam._ChunkedLogProbFunction, fused_head._Function)
    assert warnings.text.count("TRL's own head is used") == 1 and "_use_triton" in warnings.text


@pytest.mark.parametrize("arguments", [(1, 2), (*range(8), ("log_probs", "is_top1"))], ids=["signature", "outputs"])
def test_what_is_not_known_is_left_to_trl(arguments: tuple[Any, ...], warnings: pytest.LogCaptureFixture) -> None:
    original = mock.Mock()
    assert fused_head._Function(original, None).apply(*arguments) is original.apply.return_value
    original.apply.assert_called_once_with(*arguments)
    assert warnings.text.count("TRL's own head is used") == 1


def test_sharded_by_zero3_it_is_left_to_trl(warnings: pytest.LogCaptureFixture) -> None:
    before = seam._ChunkedLogProbFunction
    with fused_head.fused_head(None, gathered=False):
        assert seam._ChunkedLogProbFunction is before
    assert "ZeRO-3" in warnings.text
    with fused_head.fused_head(None, gathered=True):
        assert seam._ChunkedLogProbFunction is not before
    assert seam._ChunkedLogProbFunction is before
