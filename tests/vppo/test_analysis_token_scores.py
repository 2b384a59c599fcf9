"""Scores of tokens apart from files: no more work than there has to be, and the same whatever the batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support import families
from support.runs import FAMILY, rows

from vppo.analysis.token_scores import Scoring, score_tokens
from vppo.data import Problem
from vppo.data.prompts import Prompts
from vppo.perturbations import Perturbation
from vppo.prefix_sharing import ResponsePasses


def scored(passes: ResponsePasses, prompts: Prompts, **options: Any) -> list[Any]:
    ids = [[20, 21, 22], [23], [24, 25]]
    return score_tokens(passes, prompts, [0, 0, 1], ids, [0, 1], Scoring(Perturbation(), **options))


@pytest.fixture
def prepared() -> tuple[Any, Prompts]:
    model, processor = families.build(FAMILY)
    return model, Prompts(processor, [Problem(row["prompt"], row["images"], None) for row in rows(2)])


def test_one_clean_pass_and_one_for_each_draw(prepared: tuple[Any, Prompts]) -> None:
    model, prompts = prepared
    forwards: list[int] = []
    model.model.register_forward_pre_hook(lambda *args: forwards.append(1))
    scored(ResponsePasses(model, sharing="off"), prompts, draws=3)
    assert len(forwards) == 4


def test_the_head_never_multiplies(prepared: tuple[Any, Prompts], monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = prepared
    head, linear, seen = model.get_output_embeddings(), torch.nn.functional.linear, []

    def watched(input: torch.Tensor, weight: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.append(weight.data_ptr() == head.weight.data_ptr())
        return linear(input, weight, *args)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    scored(ResponsePasses(model), prompts)
    assert seen and not any(seen)


def test_batches_do_not_matter(prepared: tuple[Any, Prompts]) -> None:
    model, prompts = prepared
    ways = [ResponsePasses(model, sharing="on"), ResponsePasses(model, sharing="off", memory=1)]
    for whole, alone in zip(*(scored(passes, prompts, draws=2) for passes in ways), strict=True):
        for name, values in vars(whole).items():
            np.testing.assert_allclose(getattr(alone, name), values, rtol=1e-3, atol=1e-5, err_msg=name)


def test_overlap_of_kept_sets(prepared: tuple[Any, Prompts]) -> None:
    model, prompts = prepared
    (first, *_) = scored(ResponsePasses(model), prompts)
    object.__setattr__(first, "kl", np.array([3, 2, 1], np.float32))
    object.__setattr__(first, "k3", np.array([3, 1, 2], np.float32))
    assert first.overlap("kl", "k3", 0.6) == 0.5 and first.overlap("kl", "k3", 0.3) == 1.0
