"""Working memory at the sizes of real models on a GPU that is not here: shapes alone, every tensor counted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.chips import CHIPS, gpu
from support.views import PeakMemory
from torch import Tensor

from vppo_kernels import linear_divergence, linear_vppo_loss, tiling, workspace_limit
from vppo_kernels.linear_head import LinearHead
from vppo_kernels.logits import LogitTransform
from vppo_kernels.tiling import DEFAULT_WORKSPACE, MIB
from vppo_kernels.vocab_parallel import Shard
from vppo_kernels.walk import choose_walk

# as if other ranks held the rest of the vocabulary: tiles are of the size for all of it, and the walk is short
VOCAB, HELD = 152_064, 16_384
SHARD = Shard(0, HELD, VOCAB, VOCAB)
ROWS, WIDTH = 32_768, 5_120
WANTS = {
    "hidden and weight": ((True, True), True, True),
    "hidden": ((True, True), False, False),
    "one view": ((False, True), False, True),
    "weight": ((False, False), True, False),
}


def keep(*arguments: Any) -> Tensor:
    """A fold that leaves the statistics as they were."""
    return arguments[3]


OPS: Any = SimpleNamespace(
    SCRATCH=0,
    PEAK=2,
    fold=keep,
    fold_pair=keep,
    fold_jsd=lambda tile, pair, half, beta: half,
    gradient_=lambda *_: None,
    gradient_pair_=lambda *_: None,
)  # as Triton's: kernels in place


def head(
    views: int, active: int | None, wants: Any = None, like: LinearHead | None = None, width: int = WIDTH
) -> LinearHead:
    """A source; with `like` one of its very inputs."""
    if like is None:
        hidden = [torch.empty(ROWS, width, dtype=torch.bfloat16, device="meta") for _ in range(views)]
        weight = torch.empty(HELD, width, dtype=torch.bfloat16, device="meta")
        index = None if active is None else torch.empty(active, dtype=torch.int64, device="meta")
    else:
        hidden, weight, index = like.hidden, like.weight, like.active
    wanted = None if wants is None else (wants[0][-views:], *wants[1:])
    return LinearHead(hidden, weight, None, LogitTransform(), SHARD, index, wanted)


def gradients(source: LinearHead) -> int:
    hidden, weight, bias = source.gradients()
    return sum(x.nbytes for x in (*hidden, weight, bias) if x is not None)


@pytest.mark.parametrize(("chip", "add"), [("H100", False), ("B200", True)], ids=["H100, mm and add", "B200, addmm"])
@pytest.mark.parametrize("wants", WANTS.values(), ids=WANTS)
@pytest.mark.parametrize("active", [None, 13_107], ids=["all rows", "40 %"])
@pytest.mark.parametrize("views", [1, 2])
def test_the_backward_stays_within_its_bound(views: int, active: int | None, wants: Any, chip: str, add: bool) -> None:
    with gpu(chip, add):
        inputs = head(views, active)
        targets = torch.empty(inputs.rows, dtype=torch.int64, device="meta")
        packed = torch.empty(4 if views == 1 else 10, inputs.rows, device="meta")
        grads = torch.empty(2 if views == 1 else 5, inputs.rows, device="meta")
        with PeakMemory() as memory:
            source = head(views, active, wants, inputs)
            if views == 1:
                tiling.backward(source, OPS, packed, targets, grads, DEFAULT_WORKSPACE)
            else:
                tiling.backward_pair(source, OPS, packed, None, 0.5, targets, grads, DEFAULT_WORKSPACE)
            made = gradients(source)
    assert memory.peak - made <= DEFAULT_WORKSPACE, f"{(memory.peak - made) / MIB:.0f} MiB"
    assert memory.peak - made > DEFAULT_WORKSPACE / 8, "tiles could be larger"


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("active", [None, 13_107], ids=["all rows", "40 %"])
@pytest.mark.parametrize("kind", ["logprob", "kl", "jsd", "loss"])
def test_the_forward_stays_within_its_bound(kind: str, active: int | None, chip: str) -> None:
    if kind == "jsd" and (active is None or chip == "B200"):
        pytest.skip("it keeps all tiles of a few rows, whatever the rest is: once is enough")
    views = 2 if kind in ("kl", "jsd") else 1
    with gpu(chip):
        inputs = head(views, active)
        targets = torch.empty(inputs.rows, dtype=torch.int64, device="meta")
        with PeakMemory() as memory:
            source = head(views, active, WANTS["hidden and weight"] if kind == "loss" else None, inputs)
            if kind == "loss":
                tiling.forward_backward(source, OPS, targets, lambda view: view[:2] * 0, DEFAULT_WORKSPACE)
            elif kind == "logprob":
                tiling.forward(source, OPS, targets, DEFAULT_WORKSPACE)
            else:
                tiling.forward_pair(source, OPS, targets, DEFAULT_WORKSPACE, 0.5 if kind == "jsd" else None)
            made = gradients(source)
    assert memory.peak - made <= DEFAULT_WORKSPACE, f"{(memory.peak - made) / MIB:.0f} MiB"


@pytest.mark.parametrize(("width", "limit"), [(8_192, DEFAULT_WORKSPACE), (3_584, 64 * MIB)])
def test_what_the_loss_copies_for_its_forward_is_gone_in_its_backward(width: int, limit: int) -> None:
    with gpu("H100", True):
        inputs = head(1, 13_107, width=width)
        targets = torch.empty(inputs.rows, dtype=torch.int64, device="meta")
        with PeakMemory() as memory:
            source = head(1, 13_107, WANTS["hidden and weight"], inputs)
            tiling.forward_backward(source, OPS, targets, lambda view: view[:2] * 0, limit)
            made = gradients(source)
    assert memory.peak - made <= limit, f"{(memory.peak - made) / MIB:.0f} MiB"


@pytest.mark.parametrize("limit", [4, 16, 32])
def test_tiles_are_worth_a_launch_where_a_part_of_a_product_takes_a_small_workspace(limit: int) -> None:
    """As on a torch that cannot add a product in place."""
    with gpu("H100", False):
        for width in (1_536, WIDTH, 8_192):
            walk = choose_walk(head(1, None, WANTS["hidden and weight"], width=width), OPS, limit * MIB)
            for tiles in (walk.by_columns, walk.by_rows):
                assert tiles.rows * tiles.columns >= 1 << 14, (width, walk)


def test_views_of_two_dtypes_stay_within_their_bound() -> None:
    """Sums of the one that has 16 bits need memory, of whichever view it is."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(400, 512, generator=g), torch.randn(600, 512, generator=g).requires_grad_()
    views = [hidden.requires_grad_(), (hidden + 0.1).detach().bfloat16().requires_grad_()]
    for pair in (views, views[::-1]):
        with workspace_limit(MIB), PeakMemory() as memory:
            found = linear_divergence(*pair, weight, backend="torch", check=False).divergence
            gradients = torch.autograd.grad(found.sum(), (*pair, weight))
        assert memory.peak - sum(x.nbytes for x in gradients) <= MIB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loss_copies_no_rows(dtype: torch.dtype) -> None:
    """Its working memory does not grow with the rows that carry gradient."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, 512, generator=g).to(dtype).requires_grad_() for shape in ((8, 500), (300,)))
    tokens, mask = torch.randint(300, (8, 500), generator=g), torch.ones(8, 500, dtype=torch.bool)
    old, dependency = -5 - torch.rand(8, 500, generator=g), torch.rand(8, 500, generator=g)
    with workspace_limit(MIB), PeakMemory() as memory:
        loss, _ = linear_vppo_loss(
            hidden, weight, tokens, old, torch.ones(8), mask, dependency, keep_ratio=0.9, backend="torch", check=False
        )
        gradients = torch.autograd.grad(loss, (hidden, weight))
    copy = round(0.9 * 4000) * 512 * dtype.itemsize
    assert memory.peak - sum(g.nbytes for g in gradients) <= 1.5 * MIB < copy  # half a MiB for numbers per token
