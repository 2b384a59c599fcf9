"""Bands of rows, as a GPU's backward takes them: the same gradients, every row copied once, few launches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.chips import gpu
from support.views import PeakMemory, Views, make_views, poisoned_buffers, relative_error, tiles_of, walks_of
from torch import Tensor

from vppo_kernels import linear_divergence, linear_logprob, linear_vppo_loss, reference, tensor_cores, tiling
from vppo_kernels.linear_head import LinearHead, _round_within
from vppo_kernels.logits import LogitTransform
from vppo_kernels.vocab_parallel import Shard
from vppo_kernels.walk import Walk, choose_walk

ROWS, VOCAB, WIDTH = 24, 300, 40
# tile, band, rows whose sums wait: one band; several and all sums; sums of half the rows, in their gradients' memory
WALKS = {
    "one band": (7, 64, ROWS, ROWS),
    "bands": (4, 130, 9, ROWS),
    "half": (5, 300, 10, ROWS // 2),
    "few": (3, 64, 7, 5),
    "none": (6, 100, 6, 0),
}
FIRST, SECOND, *_ = WALKS.values()
KINDS = ("kl", "jsd", "topk", "logprob")


@contextmanager
def narrow_products(add: bool = True) -> Iterator[None]:
    """16-bit operands are multiplied as on a GPU, with sums that are rounded as a CPU's."""

    def mm(a: Tensor, b: Tensor, out: Tensor) -> None:
        out.copy_(a.float() @ b.float())

    def addmm_(total: Tensor, a: Tensor, b: Tensor) -> None:
        total.add_(a.float() @ b.float())

    accepted = tensor_cores._Accepted(product=True, sum=add)
    with mock.patch.multiple(
        tensor_cores, _on_gpu=lambda x: True, _accepted=lambda x: accepted, _mm=mm, _addmm_=addmm_, PART=5
    ):
        yield


def gradients(views: Views, backend: str, kind: str, keep: Tensor, bias: bool) -> tuple[Tensor, ...]:
    leaves = views.grad()
    given_bias = leaves.bias if bias else None
    if kind == "logprob":
        outputs: Any = linear_logprob(leaves.hidden, leaves.weight, leaves.targets, given_bias, backend=backend)
    else:
        outputs = linear_divergence(
            leaves.hidden, leaves.perturbed, leaves.weight, given_bias, targets=leaves.targets, kind=kind,
            k=5 if kind == "topk" else None, backend=backend,
        )  # fmt: skip
    inputs = [leaves.hidden, leaves.weight] + [leaves.perturbed] * (kind != "logprob") + [leaves.bias] * bias
    return torch.autograd.grad(sum((x * keep).sum() for x in outputs if x is not None), inputs)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("walk", WALKS.values(), ids=WALKS)
def test_gradients_of_bands_are_those_of_single_tiles(backend: str, walk: tuple[int, ...], kind: str) -> None:
    """With all rows and with some, in both 16-bit dtypes, whether or not a band's rows are copied and sums added."""
    if backend == "triton_fused" or (backend == "triton" and (kind == "topk" or walk not in (FIRST, SECOND))):
        pytest.skip("gradients of the fused sweep are Triton's, and the interpreter takes its time")
    for index, dtype in enumerate((torch.bfloat16, torch.float16)):
        views, keep = make_views(ROWS, VOCAB, WIDTH, dtype=dtype), torch.ones(ROWS)
        keep[index :: 2 + index] = index
        with narrow_products(add=bool(index)):
            with tiles_of(ROWS, VOCAB):
                expected = gradients(views, backend, kind, keep, bias=bool(index))
            with walks_of(*walk, stacked=bool(index)), poisoned_buffers():
                got = gradients(views, backend, kind, keep, bias=bool(index))
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == dtype and relative_error(a, b) < 4e-3


@pytest.mark.parametrize("walk", WALKS.values(), ids=WALKS)
def test_they_err_no_more_than_torch_in_the_same_dtype(walk: tuple[int, ...]) -> None:
    views, upstream = make_views(ROWS, VOCAB, WIDTH, dtype=torch.bfloat16), torch.linspace(-1, 1, ROWS)
    with narrow_products(), walks_of(*walk, stacked=True):
        leaves = [x.requires_grad_() for x in (views.hidden, views.perturbed, views.weight)]
        value = linear_divergence(*leaves, backend="torch").divergence
        got = torch.autograd.grad(value, leaves, upstream)
    plain, exact = views.grad(), views.to(torch.float64).grad()
    usual, truth = (
        torch.autograd.grad(reference.kl(*v.logits()), (v.hidden, v.perturbed, v.weight), upstream.to(v.hidden))
        for v in (plain, exact)
    )
    for a, b, c in zip(got, usual, truth, strict=True):
        assert relative_error(a, c) <= relative_error(b, c) + 1e-6


@pytest.mark.parametrize("wants", [(0,), (1,), (2,), (0, 1), (0, 2)], ids=str)
@pytest.mark.parametrize("walk", [WALKS["bands"], WALKS["half"]], ids=["bands", "half"])
def test_only_wanted_gradients_of_bands(walk: tuple[int, ...], wants: tuple[int, ...]) -> None:
    views = make_views(ROWS, VOCAB, WIDTH, dtype=torch.bfloat16)
    found = []
    for every in (False, True):
        leaves = [views.hidden.clone(), views.perturbed.clone(), views.weight.clone()]
        for index in range(3) if every else wants:
            leaves[index].requires_grad_()
        with narrow_products(), walks_of(*walk, stacked=False):
            value = linear_divergence(*leaves, backend="torch").divergence
            found.append(torch.autograd.grad(value.sum(), [leaves[index] for index in wants]))
    for a, b in zip(*found, strict=True):
        assert relative_error(a, b) < 4e-3


@pytest.mark.parametrize("mixed", [False, True], ids=["16 bits", "a float32 teacher"])
def test_bands_of_two_heads(backend: str, mixed: bool) -> None:
    """The second head has its own width; where it is float32, its tiles are taken one by one."""
    if backend == "triton_fused":
        pytest.skip("its gradients are Triton's")
    student, teacher = make_views(ROWS, VOCAB, WIDTH, dtype=torch.bfloat16), make_views(ROWS, VOCAB, 24, seed=1)
    teacher = teacher if mixed else teacher.to(torch.bfloat16)
    found = []
    with narrow_products():
        for around in (tiles_of(ROWS, VOCAB), walks_of(4, 64, 4 if mixed else 12, ROWS, True)):
            leaves = [x.detach().clone().requires_grad_() for x in (student.hidden, student.weight)]
            others = [x.detach().clone().requires_grad_() for x in (teacher.hidden, teacher.weight)]
            with around:
                value = linear_divergence(
                    leaves[0], others[0], leaves[1], weight_other=others[1], kind="jsd", backend=backend
                ).divergence
                found.append(torch.autograd.grad(value.sum(), [*leaves, *others]))
    for a, b in zip(*found, strict=True):
        assert relative_error(a, b) < 4e-3


def test_the_loss_in_bands(backend: str) -> None:
    if backend == "triton_fused":
        pytest.skip("its gradients are Triton's")
    views, g = make_views(ROWS, VOCAB, WIDTH, dtype=torch.bfloat16), torch.Generator().manual_seed(0)
    tokens, dependency = views.targets.view(4, 6), torch.rand(4, 6, generator=g)
    old, advantages = -1 - torch.rand(4, 6, generator=g), torch.tensor([1.0, -1.0, 0.0, 2.0])
    found = []
    with narrow_products(), mock.patch.object(tiling, "SUMS", 1 << 40):  # so that tiles are made twice, as of many rows
        for around in (tiles_of(ROWS, VOCAB), walks_of(*WALKS["half"], stacked=False)):
            hidden, weight = (x.detach().clone().requires_grad_() for x in (views.hidden.view(4, 6, -1), views.weight))
            with around:
                loss, _ = linear_vppo_loss(
                    hidden, weight, tokens, old, advantages, torch.ones(4, 6), dependency, backend=backend
                )
                found.append(torch.autograd.grad(loss, (hidden, weight)))
    for a, b in zip(*found, strict=True):
        assert relative_error(a, b) < 4e-3 and bool(a.any())


@settings(max_examples=40)
@given(data=st.data())
def test_sums_are_rounded_where_they_lie(data: st.DataObject) -> None:
    """Whatever rows they are of: every row goes to its place, the others are 0."""
    rows, width = data.draw(st.integers(2, 70)), data.draw(st.integers(1, 5))
    count = data.draw(st.integers(1, rows // 2))
    places = torch.tensor(sorted(data.draw(st.sets(st.integers(0, rows - 1), min_size=count, max_size=count))))
    every = data.draw(st.booleans())
    gradient = torch.zeros(rows, width, dtype=torch.bfloat16)
    total = gradient.view(-1)[: 2 * count * width].view(torch.float32).view(count, width)
    total.copy_(torch.randn(count, width, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))))
    expected = torch.zeros(rows, width, dtype=torch.bfloat16)
    expected[torch.arange(count) if every else places] = total.bfloat16()
    with mock.patch("vppo_kernels.linear_head.PART_BYTES", data.draw(st.sampled_from([1, 50, 1000]))):
        _round_within(total, gradient, None if every else places)
    assert torch.equal(gradient, expected)


# --- what a GPU would be given, on shapes alone


WIDE, LARGE = 5120, 152_064
HELD = 16_384  # as if other ranks held the rest, so that the walk is short


class Calls(PeakMemory):
    """Counts every operation that is a kernel on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func._schema.name.removeprefix("aten::")] += 1
        return super().__torch_dispatch__(func, types, args, kwargs)


KERNELS = ("mm", "addmm", "copy_", "index_select", "index", "_to_copy", "add_", "mul_", "zero_", "clone")


VIEWS = {"view", "slice", "select", "t", "transpose", "split", "unbind", "permute", "alias"}  # which launch nothing


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("views", [1, 2])
def test_a_tile_of_the_forward_is_two_launches(views: int, temperature: float) -> None:
    """A product and a fold; a temperature scales the tile in a third. Counted is what twice as many columns add."""

    def of_columns(held: int) -> tuple[int, Counter[str]]:
        counts: Counter[str] = Counter()

        def fold(*arguments: Any) -> Tensor:
            counts["fold"] += 1
            return arguments[3]

        ops: Any = SimpleNamespace(SCRATCH=0, PEAK=2, fold=fold, fold_pair=fold)
        with gpu("H100"), mock.patch.object(tensor_cores, "_mm", lambda *_: counts.update(["product"])):
            hidden = [torch.empty(4096, WIDE, dtype=torch.bfloat16, device="meta") for _ in range(views)]
            weight = torch.empty(held, WIDE, dtype=torch.bfloat16, device="meta")
            source = LinearHead(hidden, weight, None, LogitTransform(temperature), Shard(0, held, LARGE, LARGE))
            targets = torch.empty(4096, dtype=torch.int64, device="meta")
            shape = tiling.choose_tiling(source, ops, tiling.DEFAULT_WORKSPACE)
            with Calls() as calls:
                if views == 1:
                    tiling.forward(source, ops, targets, tiling.DEFAULT_WORKSPACE)
                else:
                    tiling.forward_pair(source, ops, targets, tiling.DEFAULT_WORKSPACE)
        tiles = len(list(shape.row_tiles(4096))) * len(list(shape.column_tiles(held)))
        return tiles, counts + calls.counts

    (few, before), (many, after) = of_columns(HELD), of_columns(2 * HELD)
    added = {name: count for name, count in (after - before).items() if name not in VIEWS}
    kernels = ("product", "fold") if temperature == 1.0 else ("product", "fold", "mul_")
    assert added == dict.fromkeys(kernels, many - few) and many > few


def of_backward(views: int, rows: int, active: int | None) -> tuple[Walk, Counter[str]]:
    """The walk on an H100 and how often each kernel is launched; "product", "sum" and "gradient" are ours."""
    counts: Counter[str] = Counter()

    def counting(name: str) -> Any:
        return lambda *_: counts.update([name])

    ops: Any = SimpleNamespace(
        SCRATCH=0, PEAK=2, gradient_=counting("gradient"), gradient_pair_=counting("gradient")
    )  # fmt: skip
    with ExitStack() as stack:
        stack.enter_context(gpu("H100"))
        stack.enter_context(mock.patch.multiple(tensor_cores, _mm=counting("product"), _addmm_=counting("sum")))
        hidden = [torch.empty(rows, WIDE, dtype=torch.bfloat16, device="meta") for _ in range(views)]
        weight = torch.empty(HELD, WIDE, dtype=torch.bfloat16, device="meta")
        index = None if active is None else torch.empty(active, dtype=torch.int64, device="meta")
        wants = (True,) * views, True, False
        source = LinearHead(hidden, weight, None, LogitTransform(), Shard(0, HELD, LARGE, LARGE), index, wants)
        targets = torch.empty(source.rows, dtype=torch.int64, device="meta")
        packed = torch.empty(4 if views == 1 else 10, source.rows, device="meta")
        grads = torch.empty(2 if views == 1 else 5, source.rows, device="meta")
        walk = choose_walk(source, ops, tiling.DEFAULT_WORKSPACE)
        with Calls() as calls:
            if views == 1:
                tiling.backward(source, ops, packed, targets, grads, tiling.DEFAULT_WORKSPACE)
            else:
                tiling.backward_pair(source, ops, packed, None, 0.5, targets, grads, tiling.DEFAULT_WORKSPACE)
    counts.update({name: calls.counts[name] for name in KERNELS})
    return walk, counts


@pytest.mark.parametrize("rows", [1024, 4096, 16_384])
def test_a_tile_of_the_loss_is_two_launches_and_a_column_of_tiles_two_more(rows: int) -> None:
    """At 40 % of the rows: rows are copied once in all, and no tile is made or converted twice."""
    active = round(0.4 * rows)
    walk, counts = of_backward(1, rows, active)
    tiles, bands = len(list(walk.by_columns.row_tiles(active))), len(list(walk.by_columns.bands(slice(0, active))))
    columns = len(list(walk.by_columns.column_tiles(HELD)))
    assert walk.together == active and bands == 1
    assert counts["product"] == counts["gradient"] == tiles * columns
    assert counts["sum"] == counts["mm"] == columns
    assert counts["index_select"] == 1
    rounding = counts["copy_"] + counts["_to_copy"] + counts["clone"] + counts["zero_"]
    assert rounding <= 4 * (active * WIDE * 4 // (1 << 24) + 1) + 2, counts  # of the sums, at the end
    assert not any(counts[name] for name in ("addmm", "add_", "mul_", "index"))


def test_a_band_of_both_views_is_one_product() -> None:
    walk, counts = of_backward(2, 1024, None)
    tiles, columns = len(list(walk.by_columns.row_tiles(1024))), len(list(walk.by_columns.column_tiles(HELD)))
    assert walk.together == 1024 and walk.stacked and walk.by_columns.band == 1024
    assert counts["gradient"] == tiles * columns and counts["product"] == (1 if tiles == 1 else 2 * tiles) * columns
    assert counts["sum"] == 2 * columns and counts["mm"] == columns


@pytest.mark.parametrize("views", [1, 2])
def test_rows_that_lie_together_are_never_copied(views: int) -> None:
    """With more rows than fit beside the gradients, each view's product with the band is added to the column's sum."""
    walk, counts = of_backward(views, 32_768, None)
    columns = len(list(walk.by_columns.column_tiles(HELD)))
    assert walk.together >= 16_384 and not walk.stacked
    assert counts["index_select"] == counts["index"] == 0
    bands, again = list(walk.by_columns.bands(slice(0, 32_768))), list(walk.by_rows.bands(slice(walk.together, 32_768)))
    tiles = sum(len(list(walk.by_columns.tiles_of(band))) for band in bands) * columns
    tiles += sum(len(list(walk.by_rows.tiles_of(band))) for band in again) * len(list(walk.by_rows.column_tiles(HELD)))
    first = columns if len(bands) * views > 1 else 0  # products that the sum of a tile of columns begins with
    assert counts["gradient"] == tiles and counts["product"] == views * tiles + first
    assert counts["mm"] == (0 if first else columns)
