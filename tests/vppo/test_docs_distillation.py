"""The snippets of docs/distillation.md: each is run, and its result compared with plain formulae."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from datasets import Dataset
from support import families
from support.distilling import text_model, text_tokenizer
from support.runs import rows
from torch import Tensor

from vppo.distill import Head, distillation_loss, visual_weights

PAGE = Path(__file__).parents[2] / "docs" / "distillation.md"
CODES = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.S | re.M)
B, T, D, E, V = 3, 5, 8, 12, 40
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]], dtype=torch.bool)


def scope_of(name: str) -> dict[str, Any]:
    """What the snippet that defines or builds this leaves behind."""
    (code,) = (code for code in CODES if re.search(rf"^def {name}\b", code, re.M))
    scope: dict[str, Any] = {}
    exec(compile(code, name, "exec"), scope)
    return scope


def kl(p: Tensor, q: Tensor) -> Tensor:
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def tensors(seed: int, *sizes: tuple[int, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=g, dtype=torch.float64) for size in sizes]


def test_every_snippet_is_run_here() -> None:
    assert len(CODES) == 5


def test_the_loop() -> None:
    student, teacher = text_model(32, 0).double(), text_model(48, 1).double()
    ids = torch.randint(len(families.SPECIAL), len(families.VOCABULARY), (3, 9))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    plain = copy.deepcopy(student)
    p, q = (model(**inputs).logits[:, -6:-1] for model in (plain, teacher))
    expected = kl(p, q.detach())[MASK].mean()
    expected.backward()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    found = scope_of("update")["update"](student, teacher, optimizer, inputs, MASK)
    torch.testing.assert_close(found.loss, expected)
    assert all(weight.grad is None for weight in teacher.parameters())
    for weight, same in zip(student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, same.grad)


def test_trls_trainer(tmp_path: Path) -> None:
    words = len(families.VOCABULARY)
    options = {
        "output_dir": str(tmp_path), "per_device_train_batch_size": 2, "max_completion_length": 4, "max_steps": 1,
        "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "logging_steps": 1, "generation_kwargs": {"suppress_tokens": families.PLACEHOLDERS},
    }  # fmt: skip
    scope: dict[str, Any] = {
        "student": text_model(32, 0), "teacher": text_model(48, 1, vocab=words + 5), "options": options,
        "dataset": Dataset.from_list([{"prompt": row["prompt"]} for row in rows(2)]), "tokenizer": text_tokenizer(),
    }  # fmt: skip
    (code,) = (code for code in CODES if "trainer.train()" in code)
    exec(compile(code, "trainer", "exec"), scope)
    (loss,) = (entry["loss"] for entry in scope["trainer"].state.log_history if "loss" in entry)
    assert loss > 0


def test_weights_by_visual_advantage() -> None:
    hidden, weight, taught, perturbed, theirs = tensors(0, (B, T, D), (V, D), (B, T, E), (B, T, E), (V, E))
    targets = torch.randint(V, (B, T))
    found = scope_of("weighted")["weighted"](hidden, Head(weight), taught, perturbed, Head(theirs), MASK, targets)
    clean, other = ((h @ theirs.T).log_softmax(-1) for h in (taught, perturbed))
    advantage = (clean - other).gather(-1, targets.unsqueeze(-1)).squeeze(-1).clamp_min(0)
    each = kl(hidden @ weight.T, taught @ theirs.T) * visual_weights(advantage, MASK)
    torch.testing.assert_close(found, ((each * MASK).sum(1) / MASK.sum(1)).mean(), check_dtype=False)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.5])
def test_the_contrasted_target(alpha: float) -> None:
    hidden, weight, taught, perturbed, theirs, bias = tensors(1, (B, T, D), (V, D), (B, T, E), (B, T, E), (V, E), (V,))
    contrasted = scope_of("contrasted")["contrasted"]
    found = contrasted(hidden, Head(weight), taught, perturbed, Head(theirs, bias), MASK, alpha)
    q, other = ((h @ theirs.T + bias).log_softmax(-1) for h in (taught, perturbed))
    expected = kl(q + alpha * (q - other), hidden @ weight.T)[MASK].mean()
    torch.testing.assert_close(found, expected)


def test_verls_bin_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = ModuleType("losses")
    vars(losses)["kl_divergence"] = lambda log_q, log_p: (log_p.exp() * (log_p - log_q)).sum(-1)  # verl 0.9.1's formula
    for name in ("verl", "verl.trainer", "verl.trainer.distillation", "verl.trainer.distillation.fsdp"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    vars(sys.modules["verl.trainer.distillation.fsdp"])["losses"] = losses
    scope_of("with_rest")
    hidden, weight, taught, theirs = tensors(2, (B, T, D), (V, D), (B, T, E), (V, E))
    p, q = (hidden @ weight.T).log_softmax(-1), (taught @ theirs.T).log_softmax(-1)
    top = q.topk(7, -1)
    found = losses.kl_divergence(log_q=p.gather(-1, top.indices), log_p=top.values)
    expected = distillation_loss(hidden, Head(weight), taught, Head(theirs), MASK, kind="topk", k=7).divergence
    torch.testing.assert_close(found[MASK].double(), expected[MASK], rtol=1e-4, atol=1e-6)
