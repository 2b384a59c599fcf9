"""Recipes "paper" and "official": loss and gradient of every micro-batch, written out by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import (
    fix_rollouts,
    generation_batch,
    group_advantages,
    plain_dependency,
    plain_logits,
    plain_model,
    rows,
    trainer,
)
from torch import Tensor

from vppo import VPPOTrainer
from vppo_kernels import reference

LENGTHS = (6, 3, 5, 1, 4, 6, 2, 5)


def micro_batches(run: VPPOTrainer) -> Iterator[tuple[dict[str, Any], dict[str, Any], list[int]]]:
    """Each micro-batch as the training loop gets it, the generation batch, and where the former's rows are in it."""
    batches: list[dict[str, Any]] = []
    generate = run._generate_and_score_completions

    def remembering(inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batches.append(generate(inputs))
        return batches[-1]

    run._generate_and_score_completions = remembering  # type: ignore[method-assign]
    run.model.train()
    run.current_gradient_accumulation_steps = run.args.gradient_accumulation_steps
    rollouts = [row for row in rows(2) for _ in range(run.num_generations)]
    for step in range(run.args.steps_per_generation):
        run._step = step
        part = run._prepare_inputs(rollouts)
        places = [(prompt.tolist(), ids.tolist()) for prompt, ids in _identities(batches[0])]
        yield part, batches[0], [places.index((prompt.tolist(), ids.tolist())) for prompt, ids in _identities(part)]


def _identities(batch: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(batch["prompt_ids"], batch["completion_ids"], strict=True)


def some_old(logprobs: Tensor, seed: int) -> Tensor:
    """Log-probabilities of a policy that differs: ratios from 0.7 to 5."""
    noise = torch.rand(logprobs.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return logprobs.detach() + 0.35 - 2 * noise


def check_step(run: VPPOTrainer, inputs: dict[str, Any], old: Tensor, expected: Tensor) -> None:
    """The trainer's loss is the expected one; both leave their gradients behind."""
    loss = run._compute_loss(run.model, {**inputs, "old_per_token_logps": old.float()})
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss.detach().double(), expected.detach(), rtol=1e-4, atol=1e-6)


def check_gradients(run: VPPOTrainer, model: Any) -> None:
    ours = dict(run.model.named_parameters())
    for name, weight in model.named_parameters():
        if weight.grad is None:
            assert ours[name].grad is None, name
        else:
            error = (ours[name].grad.double() - weight.grad).norm()
            assert error <= 1e-4 * weight.grad.norm() + 1e-7, name


def released_alpha(means: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The released code's factors: range of the device's mini-batch, mean of the micro-batch."""
    u = (means - low) / (high - low)
    top = 0.9 + 0.1 / (u.mean() + 1e-8)
    return 0.9 + u * (top - 0.9)


@pytest.mark.parametrize(("size", "windows"), [(4, 1), (2, 1), (2, 2), (1, 1), (1, 2)])
def test_official(size: int, windows: int, tmp_path: Path) -> None:
    """k3, dual clip, penalty, and statistics within the accumulation window; a lone minimum keeps the factor 0.9."""
    count = 8 // size
    accumulation = count // windows
    changes = {"gradient_accumulation_steps": accumulation, "steps_per_generation": count}
    run = trainer(tmp_path, recipe="official", per_device_train_batch_size=size, **changes)
    fix_rollouts(run, LENGTHS)
    model = plain_model(run, torch.float64)
    parts = list(micro_batches(run))
    order = [place for _, _, places in parts for place in places]
    clipped = 0
    for step, (inputs, whole, places) in enumerate(parts):
        run._step = step
        start = step // accumulation * accumulation * size
        window = order[start : start + accumulation * size]
        dependency, tokens = plain_dependency(run, whole), whole["completion_mask"].sum(1)
        means = dependency.sum(1) / tokens
        alpha = released_alpha(means[places], means[window].min(), means[window].max())
        mask = inputs["completion_mask"].bool()
        keep = reference.topk_mask(dependency[places], mask, 0.4)
        advantages = (group_advantages(run, whole)[places] * alpha).unsqueeze(1) * keep

        logprobs = reference.logprob(plain_logits(model, inputs, inputs["pixel_values"]), inputs["completion_ids"])
        old = some_old(logprobs, places[0])
        clipped += int((((logprobs - old).exp() > 3) & (advantages < 0)).sum())
        surrogate = reference.clipped_loss(logprobs, old, advantages, 0.2, 0.28, clip_dual=3.0)
        # TRL counts tokens by generation batch, and gives each of its windows an equal share
        expected = ((surrogate - 0.06 * logprobs) * mask).sum() / (tokens.sum() / windows)
        check_step(run, inputs, old, expected)
        assert run._metrics["train"]["vppo/alpha_min"][-1] == pytest.approx(alpha.min().item(), rel=1e-4)
        assert run._metrics["train"]["vppo/alpha_mean"][-1] == pytest.approx(alpha.mean().item(), rel=1e-4)
        assert run._metrics["train"]["vppo/alpha_max"][-1] == pytest.approx(alpha.max().item(), rel=1e-4)
    assert clipped, "the dual clip bites somewhere"
    check_gradients(run, model)


def test_official_draws_a_view_for_every_rollout(tmp_path: Path) -> None:
    args = trainer(tmp_path, recipe="official").args
    assert (args.perturbation_scope, args.divergence, args.delta) == ("rollout", "k3", 3.0)


@pytest.mark.parametrize("algorithm", ["dapo", "tgf"])
def test_official_without_shaping(algorithm: str, tmp_path: Path) -> None:
    """The dual clip and the penalty stay, the factors are 1."""
    run = trainer(tmp_path, recipe="official", algorithm=algorithm, gradient_accumulation_steps=2)
    fix_rollouts(run, LENGTHS)
    model = plain_model(run, torch.float64)
    for inputs, whole, places in micro_batches(run):
        mask, tokens = inputs["completion_mask"].bool(), whole["completion_mask"].sum()
        dependency = plain_dependency(run, whole)[places]
        keep = reference.topk_mask(dependency, mask, 0.4) if algorithm == "tgf" else mask
        logprobs = reference.logprob(plain_logits(model, inputs, inputs["pixel_values"]), inputs["completion_ids"])
        old = some_old(logprobs, places[0])
        advantages = group_advantages(run, whole)[places].unsqueeze(1) * keep
        surrogate = reference.clipped_loss(logprobs, old, advantages, 0.2, 0.28, clip_dual=3.0)
        check_step(run, inputs, old, ((surrogate - 0.06 * logprobs) * mask).sum() / tokens)
    check_gradients(run, model)


def test_official_leaves_out_rows_that_have_no_part(tmp_path: Path) -> None:
    """Text-only rows and rows without response tokens enter no statistic: their factor is 1."""
    run = trainer(tmp_path, recipe="official", mask_truncated_completions=True, per_device_train_batch_size=8)
    fix_rollouts(run, LENGTHS)
    whole_rows = run._generate_single_turn

    def truncating(*args: Any) -> Any:
        ids, none = whole_rows(*args)
        return [row[:-1] if i == 2 else row for i, row in enumerate(ids)], none

    run._generate_single_turn = truncating  # type: ignore[method-assign]
    batch = generation_batch(run, rows(2, images=(1, 0)))
    assert batch["trajectory_dependency"].isnan().tolist() == [False, False, True, False] + [True] * 4
    run._buffered_inputs, run._step = [batch], 0
    alpha = run._micro_batch_scale(batch["trajectory_dependency"])
    present = ~batch["trajectory_dependency"].isnan()
    means = batch["trajectory_dependency"][present].double()
    expected = released_alpha(means, means.min(), means.max())
    torch.testing.assert_close(alpha[present].double(), expected, rtol=1e-4, atol=1e-6)
    assert (alpha[~present] == 1).all()
    assert run._compute_loss(run.model, batch).isfinite()


def test_official_trains(tmp_path: Path) -> None:
    run = trainer(tmp_path, recipe="official", gradient_accumulation_steps=2)
    run.train()
    for log in run.state.log_history[:2]:
        assert 0.9 <= log["vppo/alpha_min"] <= log["vppo/alpha_mean"] <= log["vppo/alpha_max"]
        assert log["vppo/alpha_mean"] == pytest.approx(1.0, abs=1e-4)


def test_paper(tmp_path: Path) -> None:
    """Exact KL, statistics of the whole batch, mean over each sequence and then over the sequences."""
    run = trainer(tmp_path, recipe="paper", gradient_accumulation_steps=2)
    fix_rollouts(run, LENGTHS)
    model = plain_model(run, torch.float64)
    for inputs, whole, places in micro_batches(run):
        mask = inputs["completion_mask"].bool()
        dependency = plain_dependency(run, whole)
        alpha = reference.trajectory_scale(dependency, whole["completion_mask"])[places]
        keep = reference.topk_mask(dependency[places], mask, 0.4)
        advantages = (group_advantages(run, whole)[places] * alpha).unsqueeze(1) * keep
        logprobs = reference.logprob(plain_logits(model, inputs, inputs["pixel_values"]), inputs["completion_ids"])
        old = some_old(logprobs, places[0])
        surrogate = reference.clipped_loss(logprobs, old, advantages, 0.2, 0.28) * mask
        check_step(run, inputs, old, (surrogate.sum(1) / mask.sum(1)).mean() / 2)
    check_gradients(run, model)
