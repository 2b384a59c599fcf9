"""The fused sweep of Hopper chips on the emulated chip; `test_gpu.py` has what a real one can show.

`test_emulated_cuda.py` runs these with the library that it builds. Widths of real models are in `test_tensor_cores.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.tensor_core import on_tensor_cores
from support.views import Views, make_views, poisoned_buffers, worst
from torch import Tensor

from vppo_kernels import linear_divergence, linear_logprob, reference, workspace_limit
from vppo_kernels.backends import available
from vppo_kernels.linear_head import LinearHead
from vppo_kernels.logits import LogitTransform
from vppo_kernels.native_library import library
from vppo_kernels.reference import LOGPROB_BOUND_CUT
from vppo_kernels.statistics import DivergenceOutput, finish, finish_pair, unpack_pair_stats, unpack_stats
from vppo_kernels.tiling import MIB
from vppo_kernels.vocab_parallel import Shard

if "native_fused" not in available("cpu"):
    pytest.skip("the native library here is not the emulated one", allow_module_level=True)

from vppo_kernels.backends import native_fused as fused

DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def tensor_cores() -> Iterator[None]:
    """Of a CPU, for the products that are torch's."""
    with on_tensor_cores():
        yield


def run(views: Views, bias: bool = True, **options: Any) -> DivergenceOutput:
    return linear_divergence(
        views.hidden, views.perturbed, views.weight, views.bias if bias else None, targets=views.targets,
        **dict(backend="native_fused") | options,
    )  # fmt: skip


def logprob_error(views: Views, bias: bool = True, **head: Any) -> float:
    """Of both outputs of one view, as a multiple of their bound."""
    bias_of = views.bias if bias else None
    got = linear_logprob(views.hidden, views.weight, views.targets, bias_of, backend="native_fused", **head)
    truth = reference.logprob_output(views.to(torch.float64).logits(bias=bias, **head)[0], views.targets)
    errors = [float((a.double() - b).abs().max()) for a, b in zip(got, truth, strict=True)]
    return math.inf if any(map(math.isnan, errors)) else max(errors) / LOGPROB_BOUND_CUT


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 64, 65, 130])
def test_eights_and_blocks_that_are_not_full(rows: int, dtype: torch.dtype) -> None:
    views = make_views(rows=rows, vocab=700, hidden_size=24, dtype=dtype)
    with poisoned_buffers():
        assert worst(run(views), views.truth(bias=True), cut=True) < 1
        assert logprob_error(views) < 1


@pytest.mark.parametrize("width", [1, 8, 41, 64, 65, 520])
@pytest.mark.parametrize("vocab", [11, 255, 256, 257, 1100])
def test_odd_vocabularies_and_widths(vocab: int, width: int) -> None:
    """Slices and tiles that are not full; rows of the weight that begin at multiples of 16 bytes, with NaN between."""
    views = make_views(rows=13, vocab=vocab, hidden_size=width, dtype=torch.bfloat16, divergences=(1e-3, 1e-1))
    wide = torch.full((vocab + 3, -(-width // 8) * 8), math.nan, dtype=torch.bfloat16)
    wide[:vocab, :width] = views.weight
    views.weight = wide[:vocab, :width]
    truth = views.truth(bias=False)
    assert worst(run(views, bias=False), truth, cut=True) < 1
    assert logprob_error(views, bias=False) < 1
    views.weight = wide[:, :width]
    assert worst(run(views, bias=False, vocab_size=vocab), truth, cut=True) < 1


@pytest.mark.parametrize("kind", ["kl", "reverse_kl"])
@pytest.mark.parametrize("head", [dict(temperature=0.7, logit_scale=1.2), dict(vocab_size=990)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_every_output_is_within_its_bound(bias: bool, head: dict[str, Any], kind: str) -> None:
    views = make_views(rows=70, vocab=1100, hidden_size=200, dtype=torch.bfloat16)
    views.targets %= 990
    assert worst(run(views, bias, kind=kind, **head), views.truth(kind, bias=bias, **head), cut=True) < 1
    assert logprob_error(views, bias, **head) < 1


@pytest.mark.parametrize("gap", [0.0, 0.03, 1.0, 8.0, 40.0, 200.0])
@pytest.mark.parametrize("share", [1e-3, 0.5, 0.999])
def test_a_word_of_another_gap_in_a_later_tile(share: float, gap: float) -> None:
    """The mean gap so far is no help then, in some rows of a block; neither is the maximum so far."""
    rows, vocab, late = 20, 4000, 900
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
    views = views.to(torch.bfloat16)
    assert worst(run(views, bias=False), views.truth(), cut=True) < 1


def test_words_that_a_bias_masks() -> None:
    """Whole tiles, the first ones, single words, and all but one."""
    views = make_views(rows=12, vocab=1500, hidden_size=16, dtype=torch.bfloat16)
    for masked in (slice(0, 600), slice(256, 512), slice(0, 1500, 2), slice(1, 1500)):
        views.bias[:] = 0
        views.bias[masked] = -torch.inf
        views.targets[:] = next(i for i in range(1500) if views.bias[i] == 0)
        assert worst(run(views), views.truth(bias=True), cut=True) < 1
        assert logprob_error(views) < 1
    views.targets[:] = 1  # a masked one
    assert torch.isneginf(run(views).logprobs).all()  # type: ignore[arg-type]


def test_a_nan_stays_in_its_row() -> None:
    views = make_views(rows=20, vocab=600, hidden_size=16, dtype=torch.bfloat16)
    clean = run(views)
    views.hidden[9, 3] = math.nan
    got = run(views)
    others = torch.arange(20) != 9
    for a, b in zip(got, clean, strict=True):
        assert torch.equal(a[others], b[others])  # type: ignore[index]
    assert all(x[9].isnan() for x in (got.divergence, got.entropy, got.logprobs))  # type: ignore[index]


@pytest.mark.parametrize("pair", [True, False], ids=["two views", "one view"])
@pytest.mark.parametrize("places", [1, 3, 40])
@pytest.mark.parametrize("cluster", [1, 2, 4])
def test_parts_of_a_vocabulary_and_of_a_shard(
    cluster: int, places: int, pair: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many blocks share the weight; targets are counted from the first word of the whole vocabulary."""
    monkeypatch.setattr(fused, "CLUSTER", cluster)
    monkeypatch.setattr(fused, "places", lambda device, ranks: places)
    views = make_views(rows=300, vocab=2100, hidden_size=72, dtype=torch.bfloat16)
    hidden = [views.hidden, views.perturbed] if pair else [views.hidden]
    part = slice(500, 2000)
    head = LinearHead(hidden, views.weight[part], None, LogitTransform(), Shard(500, 1500, 1500, 2100))
    here = views.to(torch.float64).logits()[0][:, part]
    inside = (views.targets >= 500) & (views.targets < 2000)
    expected = torch.where(inside, here.gather(1, (views.targets - 500).clamp(0, 1499)[:, None])[:, 0], -torch.inf)
    if pair:
        stats = unpack_pair_stats(fused.sweep_pair(head, slice(0, 300), views.targets))
        truth = reference.kl(here, views.to(torch.float64).logits()[1][:, part])
        error = (finish_pair(stats).kl.double() - truth).abs() / reference.divergence_bound(truth, cut=True)
        assert error.max() < 1
        target = stats.p.target
    else:
        stats = unpack_stats(fused.sweep(head, slice(0, 300), views.targets))
        entropy = torch.special.entr(here.softmax(-1)).sum(-1)
        assert (finish(stats).entropy.double() - entropy).abs().max() < LOGPROB_BOUND_CUT
        target = stats.target
    assert torch.equal(target.isneginf(), ~inside)
    assert (target[inside].double() - expected[inside]).abs().max() < LOGPROB_BOUND_CUT


@pytest.mark.parametrize("rows", [5, 70, 200])
def test_the_order_of_threads_and_copies_does_not_matter(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What changes with it is a race."""
    views = make_views(rows=rows, vocab=900, hidden_size=400, dtype=torch.bfloat16)
    forwards = run(views)
    monkeypatch.setenv("EMULATED_CUDA_ORDER", "reversed")
    assert all(torch.equal(a, b) for a, b in zip(run(views), forwards, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options", [dict(kind="jsd"), dict(kind="topk", k=5), dict(softcap=30.0), dict(precision="exact")], ids=str
)
def test_what_goes_through_tiles(options: dict[str, Any]) -> None:
    views = make_views(rows=10, vocab=600, hidden_size=16, dtype=torch.bfloat16)
    tiles = run(views, backend="native", **options)
    assert all(torch.equal(a, b) for a, b in zip(run(views, **options), tiles, strict=True))  # type: ignore[arg-type]


def test_gradients_go_through_tiles() -> None:
    found = []
    for backend in ("native", "native_fused"):
        views = make_views(rows=10, vocab=600, hidden_size=16, dtype=torch.bfloat16).grad()
        output = run(views, backend=backend)
        found.append(torch.autograd.grad(output.divergence.sum(), (views.hidden, views.perturbed, views.weight)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_rows_go_in_sweeps_that_fill_the_chip() -> None:
    """As many as half of the cache and of the workspace take, in whole clusters."""
    for rows, limit in ((3000, 256), (3000, 1), (70, 256)):
        views = Views(
            *(torch.zeros(rows, 512).bfloat16() for _ in range(2)), torch.zeros(300, 512).bfloat16(), *2 * [None]
        )
        head = LinearHead(
            [views.hidden, views.perturbed], views.weight, None, LogitTransform(), Shard(0, 300, 300, 300)
        )
        taken = fused.rows(head, 1, limit * MIB)
        assert taken == rows or taken % 256 == 0
        assert taken == min(rows, 256) or 4 * 2 * 2 * 512 * taken <= limit * MIB


def test_a_sweep_of_few_rows_after_others() -> None:
    views = make_views(rows=600, vocab=300, hidden_size=64, dtype=torch.bfloat16)
    with workspace_limit(MIB):
        assert worst(run(views), views.truth(bias=True), cut=True) < 1


def unaligned(x: Tensor) -> Tensor:
    """The same numbers, from 2 bytes behind a multiple of 16 on."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)


def test_what_it_refuses() -> None:
    views = make_views(rows=10, vocab=600, hidden_size=24)
    with pytest.raises(ValueError, match=r"got 'native_fused', which takes .*bfloat16 or all float16; got float32"):
        run(views)
    narrow = views.to(torch.bfloat16)
    with pytest.raises(ValueError, match="got bfloat16 and float32"):
        run(Views(narrow.hidden, narrow.perturbed, views.weight, views.bias, views.targets))
    for weight in (unaligned(narrow.weight), narrow.weight.T.contiguous().T, narrow.weight[:, :20].contiguous()):
        width = weight.shape[1]
        given = Views(narrow.hidden[:, :width], narrow.perturbed[:, :width], weight, narrow.bias, narrow.targets)
        with pytest.raises(ValueError, match=r"got 'native_fused', .* multiples of 16 bytes; got strides"):
            run(given)
    with pytest.raises(ValueError, match="native_fused"):
        run(views.to(torch.float64))


def test_hidden_states_may_lie_anywhere() -> None:
    views = make_views(rows=10, vocab=600, hidden_size=24, dtype=torch.bfloat16)
    expected = linear_logprob(views.hidden, views.weight, views.targets, backend="native_fused")
    strided = torch.stack([views.targets, views.targets], 1)[:, 1]
    for hidden in (unaligned(views.hidden), views.hidden.T.contiguous().T):
        got = linear_logprob(hidden, views.weight, strided, backend="native_fused")
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


WRONG = {
    "hidden: .* takes 16 rows": dict(hidden=torch.zeros(15, 8).bfloat16()),
    "hidden: .* takes rows of 8": dict(hidden=torch.zeros(16, 16).bfloat16()),
    "hidden: got dtype float16": dict(hidden=torch.zeros(16, 8).half()),
    "weight: got dtype float32": dict(weight=torch.zeros(5, 8)),
    "weight: .* sizes from 1": dict(weight=torch.zeros(0, 8).bfloat16()),
    "weight: .* consecutive entries": dict(weight=torch.zeros(8, 5).bfloat16().T),
    "weight: .* multiples of 16 bytes": dict(weight=torch.zeros(5, 9).bfloat16()[:, 1:]),
    "bias: got shape": dict(bias=torch.zeros(4)),
    "targets: got dtype": dict(targets=torch.zeros(3, dtype=torch.int32)),
    "ranks: got 3": dict(ranks=3),
    "stats: got shape": dict(stats=torch.zeros(9, 3)),
    r"parts: got shape \[6": dict(parts=torch.zeros(6, 10, 3)),
    r"parts: got shape \[1": dict(parts=torch.zeros(1, 10, 2)),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_of_the_library(message: str) -> None:
    right = dict(
        hidden=torch.zeros(16, 8).bfloat16(), weight=torch.zeros(5, 8).bfloat16(), bias=torch.zeros(5),
        targets=torch.zeros(3, dtype=torch.int64), first=0, scale=1.0, ranks=1, parts=torch.zeros(2, 10, 3),
        stats=torch.zeros(10, 3),
    )  # fmt: skip
    library("cpu").sweep(*right.values())
    with pytest.raises((ValueError, TypeError), match=message):
        library("cpu").sweep(*(right | WRONG[message]).values())
