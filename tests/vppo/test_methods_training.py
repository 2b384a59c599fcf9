"""The family in the trainer: each trains; PAPO's loss and gradient written out, whichever way rows pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from support import families
from support.runs import (
    fix_rollouts,
    generation_batch,
    group_advantages,
    perturbed_pixels,
    plain_dependency,
    plain_logits,
    plain_model,
    rows,
    trainer,
)
from test_training_pass import same_gradients, step
from torch import Tensor

from vppo import VPPOConfig, VPPOTrainer
from vppo.algorithms import REGISTRY
from vppo.methods import pgpo_weights, soft_mask_weights, vepo_weights
from vppo_kernels import reference
from vppo_kernels.statistics import DivergenceOutput

FOLDED = ("pgpo", "vepo", "soft")
WHOLE = {"per_device_train_batch_size": 8}
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, init_lora_weights=False)


@pytest.mark.parametrize("algorithm", [*FOLDED, "papo"])
def test_it_trains(algorithm: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, algorithm=algorithm, max_steps=3, per_device_train_batch_size=8)
    before = {name: weight.detach().clone() for name, weight in run.model.named_parameters()}
    run.train()
    steps = [log for log in run.state.log_history if "loss" in log]
    assert len(steps) == 3 and all(log["vppo/dependency_mean"] > 0 for log in steps)
    assert any(not torch.equal(weight, before[name]) for name, weight in run.model.named_parameters())
    if algorithm == "papo":
        assert all(log["vppo/papo_kl"] > 0 and log["vppo/papo_entropy_perturbed"] > 0 for log in steps)


@torch.no_grad()
def both_views(run: VPPOTrainer, batch: dict[str, Any], kind: str) -> DivergenceOutput:
    model = plain_model(run, torch.float64)
    clean, perturbed = (
        plain_logits(model, batch, pixels) for pixels in (batch["pixel_values"], perturbed_pixels(run, batch))
    )
    return reference.divergence(clean, perturbed, kind=kind)


@pytest.mark.parametrize("algorithm", FOLDED)
def test_weights_are_folded_into_the_advantages(algorithm: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, algorithm=algorithm, **WHOLE)
    fix_rollouts(run)
    batch = generation_batch(run, rows(2))
    mask = batch["completion_mask"].bool()
    views = both_views(run, batch, "jsd" if algorithm == "vepo" else "kl")
    expected = group_advantages(run, batch).unsqueeze(1) * mask
    if algorithm == "soft":
        alpha = reference.trajectory_scale(plain_dependency(run, batch), mask)
        expected = expected * alpha.unsqueeze(1) * soft_mask_weights(views, mask)
    else:
        expected = expected * {"pgpo": pgpo_weights, "vepo": vepo_weights}[algorithm](views, mask)
    torch.testing.assert_close(batch["advantages"].double(), expected, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("algorithm", ["vppo", "pgpo"])
def test_probability_drop(algorithm: str, tmp_path: Path) -> None:
    """`p(y) - q(y)` in the place of the divergence (VPPO, appendix G)."""
    run = trainer(tmp_path, algorithm=algorithm, divergence="prob_drop", **WHOLE)
    fix_rollouts(run)
    batch = generation_batch(run, rows(2))
    mask = batch["completion_mask"].bool()
    model, ids = plain_model(run, torch.float64), batch["completion_ids"].unsqueeze(-1)
    with torch.no_grad():
        p, q = (
            plain_logits(model, batch, view).softmax(-1).gather(-1, ids).squeeze(-1)
            for view in (batch["pixel_values"], perturbed_pixels(run, batch))
        )
    drop = torch.where(mask, p - q, 0)
    assert (drop < -1e-3).any() and (drop > 1e-3).any()
    expected = group_advantages(run, batch).unsqueeze(1) * mask
    if algorithm == "vppo":
        alpha = reference.trajectory_scale(drop, mask)
        expected = expected * alpha.unsqueeze(1) * reference.topk_mask(drop, mask, 0.4)
    else:
        expected = expected * pgpo_weights(DivergenceOutput(drop, drop, drop, None, None), mask)
    torch.testing.assert_close(batch["advantages"].double(), expected, rtol=2e-3, atol=1e-4)


# -- PAPO --------------------------------------------------------------------------------------------------------------


def papo_step(
    path: Path, images: tuple[int, ...] = (1, 1), **changes: Any
) -> tuple[VPPOTrainer, Tensor, dict[str, Tensor], dict[str, Any]]:
    run = trainer(path, algorithm="papo", **{**WHOLE, "papo_kl_coef": 0.3, "papo_entropy_coef": 0.2, **changes})
    run._keeps_groups = True  # rows stay in their order, however they pass
    loss, grads, _, inputs = step(run, images)
    return run, loss.detach(), grads, inputs


def written_out(
    run: VPPOTrainer, inputs: dict[str, Any], sampled: bool, sequences: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Equation 2 on ordinary logits in float64, with old log-probabilities equal to the policy's."""
    model = plain_model(run, torch.float64)
    # the views were drawn for these prompts before any optimizer step
    pixels = perturbed_pixels(run, inputs)
    log_p, log_q = (
        plain_logits(model, inputs, view).log_softmax(-1) for view in (inputs["pixel_values"], pixels)
    )  # fmt: skip
    ids, mask = inputs["completion_ids"].unsqueeze(-1), inputs["completion_mask"].bool()
    p, q = (log.gather(-1, ids).squeeze(-1) for log in (log_p, log_q))
    if sampled:
        kl, entropies = (q - p).exp() - (q - p) - 1, -p - q
    else:
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        entropies = -(log_p.exp() * log_p).sum(-1) - (log_q.exp() * log_q).sum(-1)
    surrogate = (p - p.detach()).exp() * group_advantages(run, inputs).unsqueeze(1)
    seen = (torch.tensor(inputs["num_images"]) > 0).unsqueeze(1)
    tokens = torch.where(mask, -surrogate + torch.where(seen, 0.2 * entropies - 0.3 * kl, 0), 0)
    loss = (tokens.sum(1) / mask.sum(1)).mean() if sequences else tokens.sum() / mask.sum()
    loss.backward()
    return loss.detach(), {name: w.grad for name, w in model.named_parameters() if w.grad is not None}


@pytest.mark.parametrize("sharing", ["on", "off"])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
@pytest.mark.parametrize("divergence", ["kl", "k3"])
def test_papo_loss_and_gradient(divergence: str, loss_type: str, sharing: str, tmp_path: Path) -> None:
    """The same from packed rows and from whole ones; gradient checkpointing changes nothing."""
    run, loss, grads, inputs = papo_step(
        tmp_path,
        divergence=divergence,
        loss_type=loss_type,
        prefix_sharing=sharing,
        gradient_checkpointing=divergence == "kl",
    )
    assert ("prompt" in inputs) == (sharing == "on")
    expected, gradients = written_out(run, inputs, divergence == "k3", loss_type == "grpo")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)
    size = torch.cat([grad.flatten() for grad in gradients.values()]).norm()
    assert size > 1e-2 and grads.keys() == gradients.keys()
    for name, grad in gradients.items():
        assert (grads[name].double() - grad).norm() <= 1e-4 * grad.norm() + 1e-6 * size, name


@pytest.mark.parametrize("images", [(1, 1), (2, 1), (1, 0)], ids=str)
@pytest.mark.parametrize("family", [f.name for f in families.FAMILIES])
def test_papo_of_families(family: str, images: tuple[int, int], tmp_path: Path) -> None:
    """Packed rows and whole ones agree."""
    found = [papo_step(tmp_path, images, family=family, prefix_sharing=way) for way in ("on", "off")]
    (_, loss, grads, inputs), (_, plain_loss, plain_grads, _) = found
    torch.testing.assert_close(loss, plain_loss, rtol=1e-5, atol=1e-6)
    same_gradients(grads, plain_grads)
    assert "prompt" in inputs and inputs["view"].tolist() == [0] * 4 + [4] * 4


def test_papo_of_a_view_for_every_rollout(tmp_path: Path) -> None:
    """Rows that share a prompt and not a view pass apart."""
    run, loss, grads, inputs = papo_step(tmp_path, perturbation_scope="rollout")
    assert inputs["view"].tolist() == list(range(8))
    expected, gradients = written_out(run, inputs, False, False)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)
    assert grads.keys() == gradients.keys()


@pytest.mark.parametrize("sharing", ["on", "off"])
def test_papo_of_rows_without_an_image(sharing: str, tmp_path: Path) -> None:
    """They have no penalty: neither a divergence nor the entropies."""
    run, loss, grads, inputs = papo_step(tmp_path, (1, 0), prefix_sharing=sharing)
    assert inputs["num_images"] == [1] * 4 + [0] * 4
    expected, gradients = written_out(run, inputs, False, False)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)
    assert grads.keys() == gradients.keys()


def test_papo_of_groups_without_a_signal(tmp_path: Path) -> None:
    """Where all rewards are equal the penalty is the loss."""
    run = trainer(tmp_path, algorithm="papo", reward=lambda completions, **_: [1.0] * len(completions), **WHOLE)
    loss, grads, _, _ = step(run)
    assert loss != 0 and any(grad.norm() > 0 for grad in grads.values())


def test_papo_without_weight_is_dapo(tmp_path: Path) -> None:
    _, loss, grads, _ = papo_step(tmp_path, papo_kl_coef=0.0, papo_entropy_coef=0.0)
    plain = trainer(tmp_path, algorithm="dapo", **WHOLE)
    plain_loss, plain_grads, _, _ = step(plain)
    torch.testing.assert_close(loss, plain_loss.detach(), rtol=1e-5, atol=1e-6)
    same_gradients(grads, plain_grads)


def test_papo_of_an_adapter_and_reused_rollouts(tmp_path: Path) -> None:
    """LoRA, two micro-batches, each rollout in two updates."""
    torch.manual_seed(0)
    run = trainer(
        tmp_path, algorithm="papo", peft_config=LORA, num_iterations=2, gradient_accumulation_steps=2, max_steps=4
    )
    run.train()
    assert all(log["vppo/papo_kl"] > 0 for log in run.state.log_history if "loss" in log)


def test_papo_raises_the_divergence(tmp_path: Path) -> None:
    """On rewards that say nothing, ten steps of the penalty move it up."""
    run = trainer(
        tmp_path,
        algorithm="papo",
        papo_kl_coef=1.0,
        papo_entropy_coef=0.0,
        reward=lambda completions, **_: [1.0] * len(completions),
        max_steps=10,
        learning_rate=3e-3,
        **WHOLE,
    )
    fix_rollouts(run)
    run.train()
    seen = [log["vppo/papo_kl"] for log in run.state.log_history if "vppo/papo_kl" in log]
    assert seen[-1] > 2 * seen[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"divergence": "jsd"}, "divergence: got 'jsd', takes 'kl' or 'k3' with algorithm 'papo'"),
        ({"loss_type": "dr_grpo"}, "loss_type: got 'dr_grpo', takes 'dapo' or 'grpo' with algorithm 'papo'"),
        ({"draws": 2}, "draws: got 2, takes 1 with algorithm 'papo'"),
        ({"papo_kl_coef": -1.0}, "papo_kl_coef: got -1.0"),
        ({"papo_entropy_coef": float("inf")}, "papo_entropy_coef: got inf"),
    ],
)
def test_papo_refuses(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        VPPOConfig(str(tmp_path), algorithm="papo", use_cpu=True, bf16=False, **changes)


def test_papo_says_what_it_cannot_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vppo.two_views.exchangeable_head", lambda: "its fused head")
    with pytest.raises(ValueError, match="algorithm: got 'papo', takes another one here: TRL lacks its fused head"):
        trainer(tmp_path, algorithm="papo")


def test_an_entry_that_penalizes_needs_both_views() -> None:
    with pytest.raises(ValueError, match="penalizes: got True for 'papo', takes the score 'dependency'"):
        replace(REGISTRY["papo"], score="entropy")
    with pytest.raises(ValueError, match="score: got None for 'papo'"):
        replace(REGISTRY["papo"], score=None)


def test_the_entries_name_their_papers() -> None:
    assert {name: REGISTRY[name].paper for name in (*FOLDED, "papo")} == {
        "pgpo": "pgpo",
        "vepo": "vepo",
        "soft": "vppo",
        "papo": "papo",
    }
