"""Which tokens carry gradient: the threshold, several draws, the controls, weights of one's own, and what is logged."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import (
    fix_rollouts,
    generation_batch,
    group_advantages,
    listen,
    plain_dependency,
    plain_logits,
    plain_model,
    rows,
    trainer,
)
from torch import Tensor

import vppo.scoring_trainer
from vppo import VPPOTrainer
from vppo.algorithms import REGISTRY
from vppo.batch import Batch
from vppo.monitoring.measured import Measured
from vppo.perturbations import seeded
from vppo.scoring_trainer import RANDOM_TOKENS
from vppo.sight import PATIENCE, ImageWatch
from vppo_kernels import reference


def logged(run: VPPOTrainer, name: str) -> float:
    return run._metrics["train"][f"vppo/{name}"][-1]


def kept(batch: dict[str, Any]) -> Tensor:
    return batch["completion_mask"].bool() & (batch["advantages"] != 0)


def counted_forwards(run: VPPOTrainer) -> list[int]:
    seen: list[int] = []
    run.model.model.register_forward_pre_hook(lambda m, a, k: seen.append(1), with_kwargs=True)
    return seen


# -- a threshold -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.4, 1.0])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_a_threshold_in_loss_and_gradient(ratio: float, loss_type: str, tmp_path: Path) -> None:
    """Written out in float64; the loss is a mean over all response tokens, whatever was kept."""
    gate = {"keep_ratio": ratio, "keep_threshold": 0.3}
    run = trainer(tmp_path, per_device_train_batch_size=8, algorithm="tgf", loss_type=loss_type, **gate)
    fix_rollouts(run)
    batch = generation_batch(run, rows(2))
    mask, model = batch["completion_mask"].bool(), plain_model(run, torch.float64)
    dependency = plain_dependency(run, batch)
    keep = reference.topk_mask(dependency, mask, ratio, 0.3)
    assert 0 < keep.sum() < reference.topk_mask(dependency, mask, ratio).sum()
    assert torch.equal(kept(batch), keep & (group_advantages(run, batch) != 0).unsqueeze(1))
    assert logged(run, "responses_without_kept") == (~keep.any(1)).sum()
    assert logged(run, "kept_fraction") == pytest.approx(keep.sum().item() / mask.sum().item())

    logprobs = reference.logprob(plain_logits(model, batch, batch["pixel_values"]), batch["completion_ids"])
    tokens = reference.clipped_loss(logprobs, logprobs.detach(), group_advantages(run, batch).unsqueeze(1) * keep)
    expected = (tokens * mask).sum() / mask.sum() if loss_type == "dapo" else (tokens.sum(1) / mask.sum(1)).mean()
    expected.backward()
    loss = run._compute_loss(run.model, dict(batch))
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)
    ours = dict(run.model.named_parameters())
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            assert (ours[name].grad.double() - weight.grad).norm() <= 1e-4 * weight.grad.norm() + 1e-7, name


def test_responses_that_nowhere_exceed_it_carry_no_gradient(tmp_path: Path) -> None:
    run = trainer(tmp_path, keep_threshold=1e6)
    run.train()
    assert run.state.log_history[0]["grad_norm"] == 0
    assert run.state.log_history[0]["vppo/kept_fraction"] == 0
    assert run.state.log_history[0]["vppo/responses_without_kept"] > 0
    assert "vppo/kept_unseen_fraction" not in run.state.log_history[0]  # of no token


def test_without_a_threshold_nothing_changes(tmp_path: Path) -> None:
    """To the bit."""
    batches = []
    for options in ({}, {"keep_threshold": None, "draws": 1}):
        run = trainer(tmp_path, **options)
        fix_rollouts(run)
        batches.append(generation_batch(run, rows(2))["advantages"])
    assert torch.equal(*batches)


# -- several draws -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"divergence": "k3"}, {"perturbation_scope": "rollout"}, {"prefix_sharing": "off"}, {"scoring_memory": 1e-6}],
    ids=str,
)
def test_draws_are_averaged(changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three views, each of its own key, against plain forwards in float64; prompts of two sizes."""
    run = trainer(tmp_path, draws=3, **changes)
    fix_rollouts(run)
    seen, scores = listen(monkeypatch), []
    real = vppo.scoring_trainer.measure
    monkeypatch.setattr(vppo.scoring_trainer, "measure", lambda *a, **k: scores.append(real(*a, **k)) or scores[-1])
    batch = generation_batch(run, rows(2, sizes=((56, 28), (28, 56))))
    each = torch.stack([plain_dependency(run, batch, draw=draw) for draw in range(3)])
    assert (each.std(0)[batch["completion_mask"].bool()] > 0).any()
    torch.testing.assert_close(seen[0].double(), each.mean(0), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(scores[0].stderr.double(), each.std(0) / 3**0.5, rtol=1e-3, atol=1e-6)
    tokens = batch["completion_mask"].bool()
    assert logged(run, "dependency_stderr") == pytest.approx((each.std(0) / 3**0.5)[tokens].mean().item(), rel=1e-3)


def test_what_comes_with_the_divergence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entropies and log-probabilities of both views at every token, of one draw and of two."""
    for draws in (1, 2):
        run = trainer(tmp_path, draws=draws)
        fix_rollouts(run)
        found: list[Any] = []
        real = vppo.scoring_trainer.measure
        with monkeypatch.context() as patch:
            patch.setattr(
                vppo.scoring_trainer,
                "measure",
                lambda *a, real=real, found=found, **k: found.append(real(*a, **k)) or found[0],
            )
            batch = generation_batch(run, rows(1))
        mask, outputs = batch["completion_mask"].bool(), found[0].outputs
        clean = plain_logits(plain_model(run, torch.float64), batch, batch["pixel_values"], run.args.temperature)
        for ours, truth in (
            (outputs.entropy, reference.entropy(clean)),
            (outputs.logprobs, reference.logprob(clean, batch["completion_ids"])),
        ):
            torch.testing.assert_close(ours[mask].double(), truth[mask], rtol=1e-4, atol=1e-5)
            assert not ours[~mask].any()
        assert (outputs.entropy_perturbed[mask] > 0).all() and (outputs.logprobs_perturbed[mask] < 0).all()
        assert not torch.equal(outputs.logprobs_perturbed, outputs.logprobs)


def test_draws_of_a_pass_fit_the_memory(tmp_path: Path) -> None:
    """One pass of all views where memory allows, and more of them where it does not; the same numbers."""
    counts, advantages = {}, []
    for memory in (4.0, 1e-7):
        run = trainer(tmp_path, draws=4, scoring_memory=memory)
        fix_rollouts(run)
        generation_batch(run, rows(2))  # the first pass of all is compared with the plain one
        forwards = counted_forwards(run)
        advantages.append(generation_batch(run, rows(2))["advantages"])
        counts[memory] = len(forwards)
    torch.testing.assert_close(*advantages, rtol=1e-3, atol=1e-5)
    assert counts[4.0] == 2 < counts[1e-7]  # the clean view, and four perturbed ones together


# -- controls ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["random", "entropy"])
def test_controls_keep_as_many_tokens_as_filtering(algorithm: str, tmp_path: Path) -> None:
    masks = {}
    for name in ("tgf", algorithm):
        run = trainer(tmp_path, algorithm=name)
        fix_rollouts(run)
        masks[name] = kept(generation_batch(run, rows(2)))
    assert torch.equal(masks[algorithm].sum(1), masks["tgf"].sum(1))
    assert not torch.equal(masks[algorithm], masks["tgf"])
    assert "vppo/dependency_mean" not in run._metrics["train"] and logged(run, "kept_fraction") > 0.3
    assert logged(run, "scored_fraction") == 1 and logged(run, "alpha_max") == 1


def test_entropy_keeps_where_the_policy_is_least_sure(tmp_path: Path) -> None:
    run = trainer(tmp_path, algorithm="entropy")
    fix_rollouts(run)
    batch = generation_batch(run, rows(2))
    logits = plain_logits(plain_model(run, torch.float64), batch, batch["pixel_values"], run.args.temperature)
    expected = reference.topk_mask(reference.entropy(logits), batch["completion_mask"], 0.4)
    assert torch.equal(kept(batch), expected & (group_advantages(run, batch) != 0).unsqueeze(1))


def test_random_tokens_belong_to_seed_step_and_rollout(tmp_path: Path) -> None:
    def tokens(step: int, **changes: Any) -> Tensor:
        run = trainer(tmp_path, algorithm="random", **changes)
        fix_rollouts(run, (6, 6, 6, 6))
        run.state.global_step = step
        generation_batch(run, rows(2))  # packed rows are compared with plain ones once
        forwards = counted_forwards(run)
        batch = generation_batch(run, rows(2))
        assert not forwards  # neither view passes
        return kept(batch)

    first = tokens(0)
    assert torch.equal(first, tokens(0))
    assert not torch.equal(first, tokens(1)) and not torch.equal(first, tokens(0, seed=43))
    assert len({row.numpy().tobytes() for row in first}) > 2


def test_an_oracle_names_the_tokens(tmp_path: Path) -> None:
    class Oracle(VPPOTrainer):
        def token_scores(self, batch: Batch, scored: Tensor) -> Tensor:
            return (torch.arange(batch.mask.shape[1]) % 2 == 0).float().expand(batch.mask.shape)

    run = trainer(tmp_path, algorithm="oracle", kind=Oracle)
    fix_rollouts(run)
    batch = generation_batch(run, rows(2))
    even = (torch.arange(batch["completion_mask"].shape[1]) % 2 == 0) & batch["completion_mask"].bool()
    assert torch.equal(kept(batch), even & (group_advantages(run, batch) != 0).unsqueeze(1))
    run.train()
    with pytest.raises(ValueError, match="algorithm 'oracle', takes it of a subclass whose token_scores"):
        trainer(tmp_path, algorithm="oracle")


@pytest.mark.parametrize("algorithm", ["random", "entropy", "tgf"])
def test_controls_train_and_are_evaluated(algorithm: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, eval_data=rows(2), algorithm=algorithm, max_steps=1)
    run.train()
    found = run.evaluate()
    assert found["eval_vppo/dependency_mean"] > 0 and 0.3 < found["eval_vppo/kept_fraction"] < 0.8


# -- weights of one's own ----------------------------------------------------------------------------------------------


def halves(outputs: Any, mask: Tensor) -> Tensor:
    """0 at tokens of less dependency than the mean, else half the entropy."""
    mean = outputs.divergence[mask].mean()
    return torch.where(outputs.divergence >= mean, outputs.entropy / 2, 0.0)


def test_weights_multiply_the_advantages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = replace(REGISTRY["tgf"], filters=False, token_weights=f"{__name__}:halves")
    monkeypatch.setitem(REGISTRY, "tgf", own)
    run = trainer(tmp_path, algorithm="tgf", eval_data=rows(1))
    fix_rollouts(run)
    batch = generation_batch(run, rows(2))
    mask, dependency = batch["completion_mask"].bool(), plain_dependency(run, batch)
    logits = plain_logits(plain_model(run, torch.float64), batch, batch["pixel_values"], run.args.temperature)
    expected = torch.where(dependency >= dependency[mask].mean(), reference.entropy(logits) / 2, 0.0) * mask
    torch.testing.assert_close(
        batch["advantages"].double(), group_advantages(run, batch).unsqueeze(1) * expected, rtol=1e-4, atol=1e-5
    )
    assert logged(run, "kept_fraction") == pytest.approx(((expected != 0) & mask).sum().item() / mask.sum().item())
    run.evaluate()


# -- what is logged ----------------------------------------------------------------------------------------------------


def test_metrics_of_what_was_kept(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    fix_rollouts(run)
    batch = generation_batch(run, rows(2))
    mask, dependency = batch["completion_mask"].bool(), plain_dependency(run, batch)
    keep, alpha = reference.topk_mask(dependency, mask, 0.4), reference.trajectory_scale(dependency, mask)
    share = (dependency * keep).sum() / (dependency * mask).sum()
    assert logged(run, "kept_dependency_fraction") == pytest.approx(share.item(), rel=1e-4)
    unseen = ((dependency < 0.01) & keep).sum() / keep.sum()
    assert logged(run, "kept_unseen_fraction") == pytest.approx(unseen.item())
    assert logged(run, "alpha_std") == pytest.approx(alpha.std(correction=0).item(), rel=1e-3)
    assert logged(run, "responses_without_kept") == 0


def measured(values: list[float], keep: list[int]) -> Measured:
    return Measured(torch.tensor(values), torch.tensor(keep).float(), [len(values)], [True])


def test_one_warning_where_too_many_tokens_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    watch = ImageWatch("vppo")
    blind = measured([2.0, 0.001, 0.002, 0.0, 0.0], [1, 1, 1, 0, 0])
    with caplog.at_level(logging.WARNING):
        for batch in range(PATIENCE + 5):
            watch.kept(measured([], []), 0.4)
            watch.kept(blind, 0.4)
            assert len(caplog.records) == (batch + 1 >= PATIENCE)
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.removeprefix("[RANK 0] ") == (
        "keep_ratio: got 0.4, which is above the share of visual tokens: 67% of the tokens that carry gradient depend "
        "on the image by less than 0.01 nats, over 10 generation batches. To train on those alone that look, set "
        "keep_threshold to 0.01 or more, or keep_ratio to about 0.20."
    )


def test_no_warning_where_the_kept_tokens_look(caplog: pytest.LogCaptureFixture) -> None:
    watch = ImageWatch("vppo")
    with caplog.at_level(logging.WARNING):
        for _ in range(PATIENCE + 5):
            watch.kept(measured([2.0, 0.5, 0.002, 0.0], [1, 1, 1, 0]), 0.4)
    assert not caplog.records


# -- drift -------------------------------------------------------------------------------------------------------------


def test_drift_of_kept_and_of_filtered_tokens(tmp_path: Path) -> None:
    """k3 of the sampled tokens, where another update of the same rollouts has come before."""
    run = trainer(tmp_path, per_device_train_batch_size=8, algorithm="tgf")
    fix_rollouts(run)
    batch = generation_batch(run, rows(2))
    mask = batch["completion_mask"].bool()
    logprobs = plain_logits(plain_model(run, torch.float64), batch, batch["pixel_values"], run.args.temperature)
    logprobs = reference.logprob(logprobs, batch["completion_ids"]).detach()
    gap = 0.3 * torch.randn(mask.shape, generator=torch.Generator().manual_seed(5)).double()
    old = torch.where(mask, logprobs - gap, 0).float()
    run._compute_loss(run.model, {**batch, "old_per_token_logps": old})
    assert not any("drift" in name for name in run._metrics["train"])  # the first update, of the policy that sampled
    run.state.global_step += 1
    run._compute_loss(run.model, {**batch, "old_per_token_logps": old})
    k3, keep = gap.exp() - gap - 1, kept(batch)
    assert logged(run, "drift_kept") == pytest.approx(k3[keep].mean().item(), rel=1e-3)
    assert logged(run, "drift_filtered") == pytest.approx(k3[mask & ~keep].mean().item(), rel=1e-3)


@pytest.mark.parametrize(("iterations", "steps"), [(1, 1), (2, 2)])
def test_drift_is_logged_where_several_updates_share_rollouts(iterations: int, steps: int, tmp_path: Path) -> None:
    """And by no pass of its own, so not at all where each batch has one update."""
    run = trainer(tmp_path, algorithm="tgf", num_iterations=iterations, max_steps=steps, learning_rate=1e-3)
    run.train()
    found = [log["vppo/drift_filtered"] for log in run.state.log_history if "vppo/drift_filtered" in log]
    assert len(found) == steps - 1 and all(value > 0 for value in found)


def test_the_seed_of_random_tokens_is_no_views() -> None:
    scores, view = (torch.rand(4, generator=seeded(42, 0, 0, *rest)) for rest in ((0, RANDOM_TOKENS), (0,)))
    assert not torch.equal(scores, view)
