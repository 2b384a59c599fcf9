"""TRL's distillation trainer with this library's divergence: stock TRL's training, and float64's loss."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import trl.trainer.distillation_trainer as stock
from peft import LoraConfig
from support import families
from support.distilling import micro_batch, text_model, trainer, vision_model
from support.runs import rows
from torch import Tensor
from trl import DistillationTrainer

from vppo.distill import visual_weights
from vppo.distill_trainer import ExactDistillationTrainer
from vppo.errors import InputError
from vppo.perturbations import Perturbation, PixelLayout, perturb, seeded
from vppo.seams import MovedSeamError

WORDS = len(families.VOCABULARY)
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0, "init_lora_weights": False}
CASES: dict[str, dict[str, Any]] = {
    "text, forward KL": {"vision": False, "beta": 0.0},
    "text, JSD, two micro-batches": {
        "vision": False, "beta": 0.3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
    },
    "text, caps, temperature": {"vision": False, "beta": 1.0, "capped": 5.0, "temperature": 0.7},
    "images, reverse KL": {"vision": True, "beta": 1.0},
    "images, JSD, LoRA": {"vision": True, "beta": 0.5, "lora": True},
    "images, checkpointed, two of them": {
        "vision": True, "beta": 0.0, "gradient_checkpointing": True, "data": rows(4, images=(1, 2)),
        "shuffle_dataset": False,
    },
    "images, bfloat16 teacher": {"vision": True, "beta": 0.0, "dtype": torch.bfloat16},
}  # fmt: skip


def pair(case: dict[str, Any]) -> tuple[Any, Any]:
    """A student, and a teacher that is wider."""
    if case["vision"]:
        student, teacher = vision_model(32, 0), vision_model(48, 1)
    else:
        student, teacher = (text_model(w, s, capped=case.get("capped")) for w, s in ((32, 0), (48, 1)))
    return student, teacher.to(case.get("dtype", torch.float32))


def run_of(kind: type, path: Path, case: dict[str, Any], **changes: Any) -> Any:
    student, teacher = changes.pop("models", None) or pair(case)
    options = {key: value for key, value in case.items() if key not in ("vision", "capped", "dtype", "lora")}
    if case.get("lora"):
        torch.manual_seed(0)
        options["peft_config"] = LoraConfig(**LORA)
    return trainer(kind, path, student, teacher, vision=case["vision"], **options, **changes)


def trained(kind: type, path: Path, case: dict[str, Any]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Updates of all weights by plain gradient descent, and what was logged."""
    run = run_of(kind, path, case)
    before = {name: weight.detach().clone() for name, weight in run.model.named_parameters()}
    teacher = copy.deepcopy(run.teacher_model.state_dict())
    run.train()
    assert all(torch.equal(value, teacher[name]) for name, value in run.teacher_model.state_dict().items())
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    return {name: weight.detach() - before[name] for name, weight in run.model.named_parameters()}, logs


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_same_training_as_stock_trls(case: dict[str, Any], tmp_path: Path) -> None:
    ours, our_logs = trained(ExactDistillationTrainer, tmp_path / "ours", case)
    theirs, their_logs = trained(DistillationTrainer, tmp_path / "trl", case)
    assert len(our_logs) == len(their_logs) == 3
    for one, other in zip(our_logs, their_logs, strict=True):
        for name in ("loss", "entropy", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
    assert our_logs[0]["loss"] > 1e-3
    moved = 0
    for name, update in theirs.items():
        scale = update.abs().max()
        moved += bool(scale)
        assert (ours[name] - update).abs().max() <= 1e-3 * scale + 1e-6, name
    assert moved


def logits(model: Any, batch: dict[str, Any], pixels: Tensor | None = None) -> Tensor:
    """`[B, T, V]` float64 logits of the responses, by the model's own forward in float64."""
    model = copy.deepcopy(model).double().eval()
    names = ("image_grid_thw", "mm_token_type_ids")
    inputs = {name: batch[name] for name in names if name in batch}
    if "pixel_values" in batch:
        inputs["pixel_values"] = (batch["pixel_values"] if pixels is None else pixels).double()
    ids, mask = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    return model(input_ids=ids, attention_mask=mask, **inputs).logits[:, -batch["completion_ids"].shape[1] - 1 : -1]


def forward_kl(p: Tensor, q: Tensor) -> Tensor:
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return (q.exp() * (q - p)).sum(-1)


def perturbed(run: Any, batch: dict[str, Any], view: Perturbation, draw: int) -> Tensor:
    """The pixels of each row perturbed by hand."""
    layout, pixels = PixelLayout.of(run.processing_class.image_processor), []
    grids = batch["image_grid_thw"].split(batch["num_images"])
    values = batch["pixel_values"].split([int(grid.prod(-1).sum()) for grid in grids])
    for row, (value, grid) in enumerate(zip(values, grids, strict=True)):
        generator = seeded(run.args.seed, run._step, draw, row)
        pixels.append(perturb(value, layout, view, generator, grid=grid) if len(grid) else value)
    return torch.cat(pixels)


@pytest.mark.parametrize("images", [(1,), (2, 1)])
@pytest.mark.parametrize("view", ["clean", "student's", "weighing", "both"])
def test_loss_and_gradient_are_those_of_full_float64_logits(view: str, images: tuple[int, ...], tmp_path: Path) -> None:
    student_view = Perturbation("grey") if view in ("student's", "both") else None
    weighing_view = Perturbation("noise") if view in ("weighing", "both") else None
    run = run_of(
        ExactDistillationTrainer, tmp_path, {"vision": True, "beta": 0.0},
        student_view=student_view, weighing_view=weighing_view,
    )  # fmt: skip
    batch = micro_batch(run, rows(4, images=images))
    mask = batch["completion_mask"].bool()
    loss = run.compute_loss(run.model, batch)
    loss.backward()

    shown = None if student_view is None else perturbed(run, batch, student_view, 0)
    plain = copy.deepcopy(run.model).double()
    plain.zero_grad()
    with mock.patch.object(copy, "deepcopy", lambda model: model):
        p = logits(plain, batch, shown)
    q = logits(run.teacher_model, batch).detach()
    weights = mask.double()
    if weighing_view is not None:
        other = logits(run.teacher_model, batch, perturbed(run, batch, weighing_view, 1)).detach()
        at = batch["completion_ids"].unsqueeze(-1)
        advantage = (q.log_softmax(-1) - other.log_softmax(-1)).gather(-1, at).squeeze(-1).clamp_min(0)
        weights = visual_weights(advantage, mask).double()
        assert not torch.allclose(weights, mask.double())
    expected = (forward_kl(p, q) * weights).sum() / mask.sum()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    if student_view is not None:
        unperturbed = (forward_kl(logits(run.model, batch), q) * weights).sum() / mask.sum()
        assert loss.item() != pytest.approx(unperturbed.item(), rel=1e-3)
    exact = dict(plain.named_parameters())
    for name, weight in run.model.named_parameters():
        truth = exact[name].grad
        assert (weight.grad is None) == (truth is None), name
        if truth is not None:
            assert (weight.grad.double() - truth).norm() <= 1e-3 * truth.norm() + 1e-7, name


@pytest.mark.parametrize("vision", [False, True])
def test_heads_that_are_padded_to_different_sizes(vision: bool, tmp_path: Path) -> None:
    make = vision_model if vision else text_model
    case = {"vision": vision, "beta": 0.0}
    with pytest.raises(ValueError, match="vocab_size"):  # TRL's own
        run_of(ExactDistillationTrainer, tmp_path, case, models=(make(32, 0), make(48, 1, vocab=WORDS + 9)))
    models = make(32, 0), make(48, 1, vocab=WORDS + 9)
    run = run_of(ExactDistillationTrainer, tmp_path, case, models=models, vocab_size=WORDS - 2)
    batch = micro_batch(run, rows(4) if vision else [{"prompt": row["prompt"]} for row in rows(4)])
    mask = batch["completion_mask"].bool()
    p, q = (logits(model, batch)[..., : WORDS - 2] for model in (run.model, run.teacher_model))
    expected = forward_kl(p, q)[mask].mean().item()
    assert run.compute_loss(run.model, batch).item() == pytest.approx(expected, rel=1e-4)
    run.train()
    assert all(entry["loss"] > 0 for entry in run.state.log_history if "loss" in entry)


def test_an_evaluation_averages_over_its_own_tokens(tmp_path: Path) -> None:
    run = run_of(ExactDistillationTrainer, tmp_path, {"vision": False, "beta": 0.0})
    batch = micro_batch(run, [{"prompt": row["prompt"]} for row in rows(4)])
    run.model.eval()
    expected = forward_kl(logits(run.model, batch), logits(run.teacher_model, batch))
    expected = expected[batch["completion_mask"].bool()].mean().item()
    assert run.compute_loss(run.model, batch).item() == pytest.approx(expected, rel=1e-4)


def test_results_of_tools_are_left_out(tmp_path: Path) -> None:
    run = run_of(ExactDistillationTrainer, tmp_path, {"vision": False, "beta": 0.0})
    batch = micro_batch(run, [{"prompt": row["prompt"]} for row in rows(4)])
    batch["tool_mask"] = torch.ones_like(batch["completion_mask"])
    batch["tool_mask"][0, 1:4] = 0
    chosen = (batch["completion_mask"] * batch["tool_mask"]).bool()
    batch["num_items_in_batch"] = chosen.sum()
    expected = forward_kl(logits(run.model, batch), logits(run.teacher_model, batch))[chosen].mean().item()
    assert run.compute_loss(run.model, batch).item() == pytest.approx(expected, rel=1e-4)


def test_a_student_learns_what_it_is_shown(tmp_path: Path) -> None:
    """A blind student is told the answer by a teacher that sees: the loss falls."""
    case = {"vision": True, "beta": 0.0, "max_steps": 12, "learning_rate": 0.2}
    run = run_of(ExactDistillationTrainer, tmp_path, case, student_view=Perturbation("grey"))
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]


def test_mixed_precision_is_near(tmp_path: Path) -> None:
    losses = []
    for name, bf16 in (("exact", False), ("mixed", True)):
        run = run_of(ExactDistillationTrainer, tmp_path / name, {"vision": True, "beta": 0.0, "bf16": bf16})
        run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_views_differ_from_step_to_step_and_repeat(tmp_path: Path) -> None:
    run = run_of(ExactDistillationTrainer, tmp_path, {"vision": True, "beta": 0.0}, student_view=Perturbation("patch"))
    batch = micro_batch(run, rows(4))
    losses = []
    for step in (0, 1, 0):
        run._step = step
        losses.append(run.compute_loss(run.model, batch).item())
    assert losses[0] == losses[2] != losses[1]


def test_problems_without_any_image_have_one_view(tmp_path: Path) -> None:
    both = {"student_view": Perturbation("grey"), "weighing_view": Perturbation("grey")}
    found = []
    for name, views in (("plain", {}), ("views", both)):
        run = run_of(ExactDistillationTrainer, tmp_path / name, {"vision": True, "beta": 0.0}, **views)
        batch = micro_batch(run, [{"prompt": row["prompt"]} for row in rows(4)])
        found.append(run.compute_loss(run.model, batch).item())
    assert found[0] == found[1] > 0


def refused(path: Path, models: Any = None, vision: bool = False, **changes: Any) -> str:
    with pytest.raises(InputError) as caught:
        run_of(ExactDistillationTrainer, path, {"vision": vision, "beta": 0.0}, models=models, **changes)
    return str(caught.value)


def test_bad_inputs(tmp_path: Path) -> None:
    student, teacher = text_model(32, 0), text_model(48, 1)
    assert refused(tmp_path, (student, None)).startswith("teacher_model: got None")
    assert "takes a loaded model" in refused(tmp_path, (student, "Qwen/Qwen2.5-7B"), vocab_size=WORDS)
    for wrong in (0, WORDS + 1):
        assert f"vocab_size: got {wrong}, takes 1 to {WORDS}" in refused(tmp_path, (student, teacher), vocab_size=wrong)
    message = refused(tmp_path, (student, teacher), student_view=Perturbation("grey"))
    assert message.startswith("processing_class: got TokenizersBackend, takes a processor of images")


def test_a_processor_of_tiles_is_refused() -> None:
    from vppo.distill_trainer import _pixel_views

    with pytest.raises(InputError, match="cuts pictures into tiles"):
        _pixel_views(families.build("idefics3")[1])


def test_another_trl_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(stock.DistillationTrainer, "_get_last_hidden_state")
    with pytest.raises(MovedSeamError, match=r"_get_last_hidden_state; takes trl>=1\.15,<1\.17"):
        run_of(ExactDistillationTrainer, tmp_path, {"vision": False, "beta": 0.0})
