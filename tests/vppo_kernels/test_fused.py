"""The sweep with the product inside: what is its own, beside all that every backend is tested for."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from support.tensor_core import COMPILER, on_tensor_cores
from support.views import Views, make_views, worst

from vppo_kernels import linear_divergence, linear_logprob, reference
from vppo_kernels.backends import available
from vppo_kernels.reference import LOGPROB_BOUND
from vppo_kernels.statistics import DivergenceOutput
from vppo_kernels.tile_shape import splits_of

if "triton_fused" not in available("cpu"):
    pytest.skip("Triton's interpreter is not on", allow_module_level=True)

from vppo_kernels.backends import triton_fused as fused
from vppo_kernels.backends.turns import in_turns


def run(views: Views, bias: bool = True, **options: Any) -> DivergenceOutput:
    return linear_divergence(
        views.hidden, views.perturbed, views.weight, views.bias if bias else None, targets=views.targets,
        backend="triton_fused", **options,
    )  # fmt: skip


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 64, 65, 130])
def test_eights_that_are_not_full(rows: int) -> None:
    views = make_views(rows=rows, vocab=700, hidden_size=24)
    assert worst(run(views), views.truth(bias=True)) < 1
    single = linear_logprob(views.hidden, views.weight, views.targets, backend="triton_fused")
    truth = reference.logprob_output(views.to(torch.float64).logits()[0], views.targets)
    assert max((a - b).abs().max() for a, b in zip(single, truth, strict=True)) < LOGPROB_BOUND


def test_rows_alternate_in_eights() -> None:
    stacked = torch.arange(22.0).unsqueeze(1) + 1
    turns = in_turns(stacked).view(2, 2, 8)
    assert turns[0].tolist() == [list(range(1, 9)), list(range(12, 20))]
    assert turns[1].tolist() == [[9, 10, 11] + 5 * [0], [20, 21, 22] + 5 * [0]]


@pytest.mark.parametrize("gap", [0.0, 0.03, 1.0, 8.0, 40.0, 200.0])
@pytest.mark.parametrize("share", [1e-3, 0.5, 0.999])
def test_a_word_of_another_gap_in_a_later_tile(share: float, gap: float) -> None:
    """The mean gap so far is no help then, in some rows of a block; neither is the maximum so far."""
    rows, vocab, late = 20, 4000, 900  # the last tile of the first of four parts
    views = make_views(rows=rows, vocab=vocab, hidden_size=16, divergences=(1e-6, 1e-2))
    for hidden in (views.hidden, views.perturbed):
        hidden[:, 0] = 0
    views.weight[late] = 0
    views.weight[:, 0] = 0
    views.weight[late, 0] = 1
    rest = views.to(torch.float64).logits()[0].logsumexp(-1)
    views.hidden[:, 0] = rest + torch.tensor(share / (1 - share)).log()
    views.perturbed[:, 0] = views.hidden[:, 0]
    views.perturbed[::3, 0] -= gap
    assert worst(run(views, bias=False), views.truth()) < 1


def test_words_that_a_bias_masks() -> None:
    """Whole tiles, the first ones, single words, and all but one; a mask of one view is found by its weighted sum."""
    views = make_views(rows=12, vocab=1500, hidden_size=16)
    for masked in (slice(0, 600), slice(256, 512), slice(0, 1500, 2), slice(1, 1500)):
        views.bias[:] = 0
        views.bias[masked] = -torch.inf
        views.targets[:] = next(i for i in range(1500) if views.bias[i] == 0)
        assert worst(run(views), views.truth(bias=True)) < 1


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("eight_apart", [True, False], ids=["rows in turns", "views in turns"])
@pytest.mark.parametrize("descriptors", [True, False], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_way_to_read_and_to_multiply(dtype: torch.dtype, descriptors: bool, eight_apart: bool) -> None:
    views = make_views(rows=70, vocab=1100, hidden_size=200, dtype=dtype)
    cut = dtype != torch.float32
    describable = fused._describable
    with (
        mock.patch.object(fused, "_describable", lambda *x: descriptors and describable(*x)),
        mock.patch.object(fused, "_eight_apart", lambda x: eight_apart),
        on_tensor_cores(),
    ):
        got = run(views, temperature=0.8)
        assert worst(got, views.truth(bias=True, temperature=0.8), cut) < 1
        single = linear_logprob(views.hidden, views.weight, views.targets, backend="triton_fused")
    truth = reference.logprob_output(views.to(torch.float64).logits()[0], views.targets)
    bound = reference.LOGPROB_BOUND_CUT if cut else LOGPROB_BOUND
    assert max((a - b).abs().max() for a, b in zip(single, truth, strict=True)) < bound


@pytest.mark.parametrize("cores", [108, 132, 148])
@pytest.mark.parametrize("rows", [256, 683, 1366, 4096, 8192])
def test_no_multiprocessor_idles(rows: int, cores: int) -> None:
    blocks, tiles = -(-rows // 64), 594
    splits = splits_of(blocks, tiles, cores)
    span = -(-tiles // splits)
    assert blocks * tiles / (cores * -(-blocks * -(-tiles // span) // cores) * span) > 0.9
