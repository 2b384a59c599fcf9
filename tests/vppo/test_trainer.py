"""The trainer on one tiny model: what it does to a generation batch, to the loss, to the model and to the metrics."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from support import families
from support.runs import (
    FAMILY,
    fix_rollouts,
    generation_batch,
    group_advantages,
    listen,
    options,
    perturbed_pixels,
    plain_dependency,
    plain_logits,
    plain_model,
    response,
    rows,
    trainer,
    varied_reward,
)
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

import vppo.packed_trainer
import vppo.scoring_trainer
from vppo import VPPOConfig, VPPOTrainer
from vppo.prefix_sharing import ResponsePasses
from vppo_kernels import reference

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)


def weights(run: GRPOTrainer) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in run.model.named_parameters()}


def count_forwards(run: VPPOTrainer) -> list[int]:
    """A list that receives the number of rows of every forward of the language model's backbone from here on."""
    seen: list[int] = []
    policy = run.accelerator.unwrap_model(run.model)
    backbone = getattr(policy, "get_base_model", lambda: policy)().base_model
    backbone.register_forward_pre_hook(lambda m, a, k: seen.append(len(k["input_ids"])), with_kwargs=True)
    return seen


def one_group_for_nothing(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
    """The rollouts of prompt 0 are all worth the same."""
    return [0.5 if a == "0" else r for a, r in zip(answer, varied_reward(completions), strict=True)]


# -- the loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["dapo", "grpo"])
def test_without_dependency_it_is_trls_trainer(algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, with TRL's own head; that ours does the same is tested in `test_fused_head.py`."""
    monkeypatch.setattr(vppo.packed_trainer, "fused_head", lambda *_, **__: nullcontext())
    run = trainer(tmp_path, algorithm=algorithm)
    run.train()
    model, processor = families.build(FAMILY)
    same = {"top_p": 0.99, "weight_decay": 0.01, "lr_scheduler_type": "constant", "loss_type": "dapo"}
    plain = GRPOTrainer(
        model=model,
        reward_funcs=varied_reward,
        args=GRPOConfig(**options(tmp_path, epsilon_high=0.28 if algorithm == "dapo" else None, **same)),
        train_dataset=Dataset.from_list(rows(4)),
        processing_class=processor,
    )
    assert plain.args.learning_rate == run.args.learning_rate
    plain.train()
    for name, weight in weights(plain).items():
        assert torch.equal(weight, weights(run)[name]), name
    for ours, theirs in zip(run.state.log_history, plain.state.log_history, strict=True):
        assert ours["loss" if "loss" in ours else "train_loss"] == theirs["loss" if "loss" in ours else "train_loss"]
        assert ours.keys() == theirs.keys()


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
@pytest.mark.parametrize("algorithm", ["vppo", "tas", "tgf"])
def test_loss_and_gradient_are_the_papers(algorithm: str, loss_type: str, tmp_path: Path) -> None:
    """Mask, factor and clip written out on ordinary logits in float64; some ratios are far enough to be clipped."""
    run = trainer(tmp_path, per_device_train_batch_size=8, algorithm=algorithm, loss_type=loss_type)
    fix_rollouts(run)
    batch = generation_batch(run, rows(2))
    mask = batch["completion_mask"].bool()
    model = plain_model(run, torch.float64)

    logprobs = reference.logprob(plain_logits(model, batch, batch["pixel_values"]), batch["completion_ids"])
    old = logprobs.detach() + 0.3 * torch.randn(mask.shape, generator=torch.Generator().manual_seed(5)).double()
    dependency = plain_dependency(run, batch)
    keep = reference.topk_mask(dependency, mask, 0.4) if algorithm != "tas" else mask
    alpha = reference.trajectory_scale(dependency, mask) if algorithm != "tgf" else torch.ones(len(mask))
    advantages = (group_advantages(run, batch) * alpha).unsqueeze(1) * keep
    tokens = reference.clipped_loss(logprobs, old, advantages, 0.2, 0.28) * mask
    expected = tokens.sum() / mask.sum() if loss_type == "dapo" else (tokens.sum(1) / mask.sum(1)).mean()
    expected.backward()

    loss = run._compute_loss(run.model, {**batch, "old_per_token_logps": old.float()})
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)
    ours = dict(run.model.named_parameters())
    for name, weight in model.named_parameters():
        if weight.grad is None:
            assert ours[name].grad is None, name
            continue
        error = (ours[name].grad.double() - weight.grad).norm()
        assert error <= 1e-4 * weight.grad.norm() + 1e-7, name
    assert max(weight.grad.norm() for weight in model.parameters() if weight.grad is not None) > 1e-2


# -- the batch ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "jsd", "k3"])
def test_divergences(divergence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, divergence=divergence, check_kernels=True)
    fix_rollouts(run)
    seen = listen(monkeypatch)
    batch = generation_batch(run, rows(1))
    torch.testing.assert_close(seen[0].double(), plain_dependency(run, batch), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("perturbation", ["patch", "noise", "blur", "grey"])
def test_perturbations(perturbation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, perturbation=perturbation)
    fix_rollouts(run)
    seen = listen(monkeypatch)
    batch = generation_batch(run, rows(1))
    assert seen[0].max() > 1e-3
    torch.testing.assert_close(seen[0].double(), plain_dependency(run, batch), rtol=1e-4, atol=1e-6)


def test_a_batch_of_text_alone(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    fix_rollouts(run)
    generation_batch(run, rows(2, images=(0,)))  # compares the shared pass with the plain one, once in a run
    forwards = count_forwards(run)
    batch = generation_batch(run, rows(2, images=(0,)))
    expected = group_advantages(run, batch).unsqueeze(1) * batch["completion_mask"]
    torch.testing.assert_close(batch["advantages"].double(), expected)
    assert forwards == [] and "vppo/dependency_mean" not in run._metrics["train"]


def test_training_on_text_beside_images(tmp_path: Path) -> None:
    run = trainer(tmp_path, rows(4, images=(1, 0)), per_device_train_batch_size=8)
    run.train()
    for log in run.state.log_history[:2]:
        assert log["vppo/scored_fraction"] == 0.5 and log["vppo/dependency_mean"] > 1e-3


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_micro_batches_of_text_from_a_batch_with_images(beta: float, tmp_path: Path) -> None:
    """Models refuse image inputs of length 0; the step is that of one micro-batch."""
    after = []
    for size in (1, 8):
        settings = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 1, "weight_decay": 0.0, "beta": beta}
        run = trainer(
            tmp_path, rows(2, images=(1, 0)), per_device_train_batch_size=size, shuffle_dataset=False,
            gradient_accumulation_steps=8 // size, peft_config=LORA if beta else None, **settings,
        )  # fmt: skip
        fix_rollouts(run)
        run.train()
        after.append(weights(run))
    for name, weight in after[1].items():
        torch.testing.assert_close(after[0][name], weight, rtol=1e-4, atol=1e-5)


def test_groups_without_a_signal_are_not_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, reward=one_group_for_nothing, prefix_sharing="off")
    fix_rollouts(run)
    seen = listen(monkeypatch)
    forwards = count_forwards(run)
    batch = generation_batch(run, rows(2))
    assert forwards == [4, 4], "one clean and one perturbed pass over the four rows of prompt 1"
    assert not seen[0][:4].any() and not batch["advantages"][:4].any()
    assert run._metrics["train"]["vppo/scored_fraction"] == [0.5]
    dependency, mask = plain_dependency(run, batch)[4:], batch["completion_mask"][4:]
    alpha, keep = reference.trajectory_scale(dependency, mask), reference.topk_mask(dependency, mask, 0.4)
    expected = (group_advantages(run, batch)[4:] * alpha).unsqueeze(1) * keep
    torch.testing.assert_close(batch["advantages"][4:].double(), expected, rtol=1e-4, atol=1e-5)


def test_no_group_with_a_signal(tmp_path: Path) -> None:
    run = trainer(tmp_path, reward=lambda completions, **kwargs: [1.0] * len(completions))
    fix_rollouts(run)
    generation_batch(run, rows(2))  # compares the shared pass with the plain one, once in a run
    forwards = count_forwards(run)
    batch = generation_batch(run, rows(2))
    assert forwards == [] and not batch["advantages"].any()
    assert batch["advantages"].shape == batch["completion_ids"].shape
    assert run._metrics["train"]["vppo/scored_fraction"] == [0.0, 0.0]


def test_truncated_rows_that_are_masked_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows without response tokens: no NaN, and no part in the statistics."""
    run = trainer(tmp_path, mask_truncated_completions=True, per_device_train_batch_size=1, steps_per_generation=4)
    fix_rollouts(run)
    cut = run._generate_single_turn

    def truncating(*args: Any) -> Any:
        ids, none = cut(*args)
        return [row[:-1] if i in (0, 4) else row for i, row in enumerate(ids)], none

    run._generate_single_turn = truncating
    seen = listen(monkeypatch)
    batch = generation_batch(run, rows(2))
    mask = batch["completion_mask"]
    assert mask.sum(1).tolist() == [0, 3, 5, 1, 0, 3, 5, 1]
    assert batch["advantages"].isfinite().all() and not batch["advantages"][[0, 4]].any()
    alpha = reference.trajectory_scale(seen[0].double(), mask)
    assert run._metrics["train"]["vppo/alpha_max"][0] == pytest.approx(alpha.max().item(), rel=1e-4)


# -- the perturbed view ------------------------------------------------------------------------------------------------


def views_of(run: VPPOTrainer, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The perturbed pixels of each row of one generation batch."""
    real, seen = vppo.scoring_trainer.measure, []

    def listening(passes: Any, batch: Any, rows: Any, clean: Any, perturbed: Any, **kwargs: Any) -> Any:
        seen.extend(perturbed.pixels[perturbed.keys[row]] for row in rows)
        return real(passes, batch, rows, clean, perturbed, **kwargs)

    monkeypatch.setattr(vppo.scoring_trainer, "measure", listening)
    same_image = [{**row, "images": [families.picture(0, (112, 112))]} for row in rows(2)]
    fix_rollouts(run)
    generation_batch(run, same_image)
    monkeypatch.undo()
    return seen


@pytest.mark.parametrize("scope", ["prompt", "rollout"])
def test_what_a_view_is_drawn_from(scope: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One image for all prompts, so that views differ by their draw alone."""
    run = trainer(tmp_path, perturbation_scope=scope)
    views = views_of(run, monkeypatch)
    assert len(views) == 8
    distinct = {view.numpy().tobytes() for view in views}
    assert len(distinct) == (2 if scope == "prompt" else 8)
    if scope == "prompt":
        assert all(torch.equal(view, views[0]) for view in views[:4])
    assert all(map(torch.equal, views, views_of(run, monkeypatch))), "the same step gives the same views"
    assert all(map(torch.equal, views, views_of(trainer(tmp_path, perturbation_scope=scope), monkeypatch)))
    run.state.global_step = 1
    assert not any(view.numpy().tobytes() in distinct for view in views_of(run, monkeypatch))
    other_seed = trainer(tmp_path, perturbation_scope=scope, seed=43)
    assert not any(view.numpy().tobytes() in distinct for view in views_of(other_seed, monkeypatch))


def test_later_steps_use_their_own_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, learning_rate=0.0, max_steps=2)
    seen = listen(monkeypatch)
    batches: list[dict[str, Any]] = []
    generate = run._generate_and_score_completions
    run._generate_and_score_completions = lambda inputs: batches.append(generate(inputs)) or batches[-1]  # type: ignore
    run.train()
    for step, (dependency, batch) in enumerate(zip(seen, batches, strict=True)):
        truth = plain_dependency(run, batch, step)
        torch.testing.assert_close(dependency.double(), truth, rtol=1e-4, atol=1e-6)


def test_blind_model_is_warned_about_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = trainer(tmp_path)
    merger = run.model.model.visual.merger
    with torch.no_grad():
        for parameter in merger.parameters():
            parameter.zero_()
    fix_rollouts(run)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert generation_batch(run, rows(1))["advantages"].isfinite().all()
    warnings = [record for record in caplog.records if "perturbed view changes nothing" in record.message]
    assert len(warnings) == 1 and "projector" in warnings[0].message


def test_seeing_model_is_not_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = trainer(tmp_path)
    fix_rollouts(run)
    generation_batch(run, rows(1))
    assert not [record for record in caplog.records if "perturbed view" in record.message]


# -- TRL's own passes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "steps", [{"num_iterations": 2}, {"gradient_accumulation_steps": 1, "steps_per_generation": 2}], ids=str
)
def test_trls_clean_pass_is_reused(steps: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = listen(monkeypatch)
    counts = []
    for changes in (steps, {}):
        run = trainer(tmp_path, prefix_sharing="off", **changes)
        fix_rollouts(run)
        forwards = count_forwards(run)
        batch = generation_batch(run, rows(2))
        assert ("old_per_token_logps" in batch) == bool(changes)
        counts.append(forwards)
    assert counts == [[4, 4, 8], [8, 8]], "TRL's clean and our perturbed pass; or our clean and our perturbed"
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("family", [f.name for f in families.FAMILIES])
@pytest.mark.parametrize("long", [False, True])
def test_sampling_leaves_the_clean_view(
    family: str, long: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the head was given while TRL sampled is what a pass of the clean view would give; with ends of responses."""
    likely = {"temperature": 1.0, "generation_kwargs": {"suppress_tokens": families.PLACEHOLDERS}}
    if long:
        ends = families.VOCABULARY["<eos>"]
        likely["generation_kwargs"] = {"suppress_tokens": [*families.PLACEHOLDERS, ends]}
    run = trainer(tmp_path, family=family, **likely)
    monkeypatch.setattr(ResponsePasses, "hidden", None)  # the clean pass
    seen = listen(monkeypatch)
    batch = generation_batch(run, rows(2, ((56, 28), (30, 60))))
    assert "old_per_token_logps" not in batch
    assert not long or batch["completion_mask"].all()
    torch.testing.assert_close(seen[0].double(), plain_dependency(run, batch), rtol=1e-4, atol=1e-6)


def test_sampling_in_half_precision_is_not_the_clean_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There decoding and passing whole round differently, which would look like dependency."""
    model, _ = families.build(FAMILY)
    run = trainer(tmp_path, model=model.bfloat16(), patch_probability=0.0)
    seen = listen(monkeypatch)
    generation_batch(run, rows(1))
    assert not run._generated and seen[0].abs().max() < 1e-9


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_reference_pass_of_lora_is_not_taken_for_the_clean_view(
    num_iterations: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path, peft_config=LORA, beta=0.1, num_iterations=num_iterations, prefix_sharing="off")
    with torch.no_grad():
        for name, weight in run.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.5)
    fix_rollouts(run)
    seen = listen(monkeypatch)
    forwards = count_forwards(run)
    batch = generation_batch(run, rows(2))
    assert "ref_per_token_logps" in batch
    assert sum(forwards) == 8 * 3, "reference and perturbed, and one clean pass, whoever makes it"
    torch.testing.assert_close(seen[0].double(), plain_dependency(run, batch), rtol=1e-4, atol=1e-6)
    with run.model.disable_adapter():
        assert (plain_dependency(run, batch) - seen[0]).abs().max() > 1e-3


def test_lora_trains(tmp_path: Path) -> None:
    run = trainer(tmp_path, peft_config=LORA, beta=0.1)
    before = weights(run)
    run.train()
    changed = {name for name, weight in weights(run).items() if not torch.equal(weight, before[name])}
    assert changed and all("lora" in name for name in changed)


def drop_lora(path: Path) -> VPPOTrainer:
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.5, init_lora_weights=False)
    return trainer(path, peft_config=config, num_iterations=2, patch_probability=0.0)


def drop_vision_attention(path: Path) -> VPPOTrainer:
    model, _ = families.build("llava")
    model.config.vision_config.attention_dropout = 0.5
    for module in model.modules():
        if type(module).__name__ == "CLIPAttention":
            module.dropout = 0.5
    return trainer(path, family="llava", model=model, num_iterations=2, patch_probability=0.0)


@pytest.mark.parametrize("dropping", [drop_lora, drop_vision_attention])
def test_dropout_does_not_tell_equal_views_apart(
    dropping: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = dropping(tmp_path)
    fix_rollouts(run)
    seen = listen(monkeypatch)
    first = generation_batch(run, rows(1))["old_per_token_logps"]
    second = generation_batch(run, rows(1))["old_per_token_logps"]
    assert not torch.equal(first, second), "TRL's own pass does drop"
    assert seen[0].abs().max() < 1e-9


# -- the model afterwards, the metrics, the errors ---------------------------------------------------------------------


HEADS = {
    "in float32 by TRL": {"cast_lm_head_to_fp32": True},
    "trained whole beside LoRA": {
        "peft_config": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    },
}


@pytest.mark.parametrize("head", HEADS)
def test_heads_that_are_wrapped(head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, **HEADS[head])
    own = run.model.get_output_embeddings().__dict__.get("forward")
    fix_rollouts(run)
    seen = listen(monkeypatch)
    batch = generation_batch(run, rows(1))
    torch.testing.assert_close(seen[0].double(), plain_dependency(run, batch).double(), rtol=1e-4, atol=1e-5)
    assert run.model.get_output_embeddings().__dict__.get("forward") is own


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    fix_rollouts(run)
    use_cache = run.model.config.get_text_config().use_cache
    batch = generation_batch(run, rows(1))
    assert all(module.training for module in run.model.modules())
    assert "forward" not in run.model.get_output_embeddings().__dict__
    assert run.model.config.get_text_config().use_cache == use_cache
    assert not any(parameter.grad is not None for parameter in run.model.parameters())
    assert plain_logits(run.model, batch, batch["pixel_values"]).shape[-1] == len(families.VOCABULARY)


def test_a_baselines_later_evaluation_is_trls(tmp_path: Path) -> None:
    """Made without an evaluation set, it has nothing to measure with."""
    run = trainer(tmp_path, per_device_eval_batch_size=4, algorithm="dapo")
    fix_rollouts(run)
    run.eval_dataset = Dataset.from_list(rows(1))
    forwards = count_forwards(run)
    metrics = run.evaluate()
    assert metrics["eval_loss"] is not None and not any("vppo" in name for name in metrics)
    assert forwards == [4], "the loss alone"


def test_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, reward=one_group_for_nothing, per_device_train_batch_size=8)
    fix_rollouts(run)
    seen = listen(monkeypatch)
    batch = generation_batch(run, rows(2))
    log = {name: values[0] for name, values in run._metrics["train"].items() if name.startswith("vppo/")}
    mask = batch["completion_mask"][4:].bool()
    values = seen[0][4:][mask].double()
    assert log["vppo/dependency_mean"] == pytest.approx(values.mean().item())
    for name, quantile in (("q50", 0.5), ("q90", 0.9), ("q99", 0.99)):
        lower = values.quantile(quantile, interpolation="lower").item()
        assert log[f"vppo/dependency_{name}"] == pytest.approx(lower)
    keep = reference.topk_mask(seen[0][4:], mask, 0.4)
    assert log["vppo/kept_fraction"] == pytest.approx((keep.sum() / mask.sum()).item())
    alpha = reference.trajectory_scale(seen[0][4:].double(), mask)
    assert log["vppo/alpha_min"] == pytest.approx(alpha.min().item(), rel=1e-4)
    assert log["vppo/alpha_mean"] == pytest.approx(1.0, rel=1e-4)
    assert log["vppo/alpha_max"] == pytest.approx(alpha.max().item(), rel=1e-4)
    assert log["vppo/scored_fraction"] == 0.5
    assert 0 < log["vppo/seconds_scoring"] < 60

    far = {**batch, "old_per_token_logps": torch.full(batch["completion_mask"].shape, -2.0)}
    far["old_per_token_logps"][:, 0] = -9.0
    run._compute_loss(run.model, far)
    logits = plain_logits(run.model, batch, batch["pixel_values"])
    ratio = (reference.logprob(logits, batch["completion_ids"]) - far["old_per_token_logps"]).exp()
    advantages = batch["advantages"]
    clipped = ((ratio < 0.8) & (advantages < 0)) | ((ratio > 1.28) & (advantages > 0))
    active = batch["completion_mask"].bool() & (advantages != 0)
    expected = (clipped & active).sum() / active.sum()
    assert 0 < expected < 1
    assert run._metrics["train"]["vppo/clip_ratio_kept"] == [pytest.approx(expected.item())]


def test_metrics_reach_the_callbacks(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.train()
    names = {"dependency_mean", "dependency_q50", "dependency_q90", "dependency_q99", "kept_fraction", "alpha_min"}
    names |= {"alpha_mean", "alpha_max", "alpha_std", "scored_fraction", "clip_ratio_kept", "seconds_scoring"}
    names |= {"kept_dependency_fraction", "kept_unseen_fraction", "responses_without_kept"}
    for log in run.state.log_history[:2]:
        assert {name for name in log if name.startswith("vppo/")} == {f"vppo/{name}" for name in names}


def test_other_arguments_than_vppos_are_refused(tmp_path: Path) -> None:
    model, processor = families.build(FAMILY)
    with pytest.raises(TypeError, match=r"args: got GRPOConfig, takes a vppo\.VPPOConfig"):
        VPPOTrainer(model, varied_reward, GRPOConfig(**options(tmp_path)), processing_class=processor)


def test_a_plain_tokenizer_is_refused(tmp_path: Path) -> None:
    model, processor = families.build(FAMILY)
    arguments = {"train_dataset": Dataset.from_list(rows(4)), "processing_class": processor.tokenizer}
    with pytest.raises(ValueError, match=r"processing_class: got .*Tokenizer.*, takes a processor with an image"):
        VPPOTrainer(model, varied_reward, VPPOConfig(**options(tmp_path)), **arguments)
    VPPOTrainer(model, varied_reward, VPPOConfig(**options(tmp_path, algorithm="dapo")), **arguments)


def test_rollouts_in_these_tests_are_what_they_say(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    fix_rollouts(run)
    batch = generation_batch(run, rows(1))
    assert batch["completion_ids"][1, :3].tolist() == response(1, 3)
    assert not torch.equal(perturbed_pixels(run, batch), batch["pixel_values"])


def test_a_micro_batch_without_any_image(tmp_path: Path) -> None:
    """Rows pass one by one: TRL hands over the text-only ones with images of no rows, at which models fail."""
    settings: dict[str, Any] = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    run = trainer(tmp_path, rows(2, images=(1, 0)), num_iterations=2, max_steps=1, **settings)
    run.train()
    assert run.state.log_history[0]["grad_norm"] > 0
    assert run.state.log_history[0]["vppo/scored_fraction"] == 0.5
