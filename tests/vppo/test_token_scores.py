"""Batches of tokens, and no more work than there has to be."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import families
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import FAMILY, rows

from vppo.data import Problem
from vppo.perturbations import Perturbation
from vppo.prompts import Prompts
from vppo.token_scores import Scoring, score_tokens, token_batches


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50))), st.integers(1, 300))
def test_batches_hold_neighbours_within_the_limit(sizes: list[tuple[int, int]], most: int) -> None:
    parts = list(token_batches(sizes, most))
    assert [index for part in parts for index in part] == list(range(len(sizes)))

    def tokens(part: list[int]) -> int:
        return len(part) * sum(max(sizes[i][k] for i in part) for k in (0, 1))

    assert all(len(part) == 1 or tokens(part) <= most for part in parts)
    assert all(tokens([*a, b[0]]) > most for a, b in pairwise(parts)), "none is needlessly small"


def scored(model: Any, prompts: Prompts, **options: Any) -> list[Any]:
    ids = [[20, 21, 22], [23], [24, 25]]
    return list(score_tokens(model, prompts, [0, 0, 1], ids, [0, 1], Scoring(Perturbation(), **options)))


@pytest.fixture
def prepared() -> tuple[Any, Prompts]:
    model, processor = families.build(FAMILY)
    return model, Prompts(processor, [Problem(row["prompt"], row["images"], None) for row in rows(2)])


def test_one_clean_pass_and_one_for_each_draw(prepared: tuple[Any, Prompts]) -> None:
    model, prompts = prepared
    forwards: list[int] = []
    model.model.register_forward_pre_hook(lambda *args: forwards.append(1))
    scored(model, prompts, draws=3)
    assert len(forwards) == 4


def test_the_head_never_multiplies(prepared: tuple[Any, Prompts], monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = prepared
    head, linear, seen = model.get_output_embeddings(), torch.nn.functional.linear, []

    def watched(input: torch.Tensor, weight: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.append(weight.data_ptr() == head.weight.data_ptr())
        return linear(input, weight, *args)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    scored(model, prompts)
    assert seen and not any(seen)


def test_batches_do_not_matter(prepared: tuple[Any, Prompts]) -> None:
    model, prompts = prepared
    for whole, alone in zip(
        scored(model, prompts, draws=2), scored(model, prompts, draws=2, batch_tokens=1), strict=True
    ):
        for name, values in vars(whole).items():
            np.testing.assert_allclose(getattr(alone, name), values, rtol=1e-3, atol=1e-5, err_msg=name)


def test_overlap_of_kept_sets(prepared: tuple[Any, Prompts]) -> None:
    model, prompts = prepared
    (first, *_) = scored(model, prompts)
    object.__setattr__(first, "kl", np.array([3, 2, 1], np.float32))
    object.__setattr__(first, "k3", np.array([3, 1, 2], np.float32))
    assert first.overlap("kl", "k3", 0.6) == 0.5 and first.overlap("kl", "k3", 0.3) == 1.0
