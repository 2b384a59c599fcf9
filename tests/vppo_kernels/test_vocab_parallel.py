"""A vocabulary split over processes: the results and gradients of the whole, on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.views import Views, make_views, relative_error, tiles_of
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from vppo_kernels import divergence, linear_divergence, linear_logprob, linear_vppo_loss, workspace_limit

VOCAB, PADDED = 101, 110
# columns of each rank, padding at the end; a rank may hold padding only, or nothing
SPLITS = {"2 ranks": [40, 70], "3 ranks, uneven": [1, 60, 49], "3 ranks, one without vocabulary": [60, 41, 9],
          "3 ranks, one without rows": [60, 0, 50]}  # fmt: skip


def spawn(worker: Any, tmp_path: Path, processes: int, *arguments: Any) -> None:
    torch.multiprocessing.spawn(_enter, (worker, str(tmp_path / "store"), processes, *arguments), nprocs=processes)


def _enter(rank: int, worker: Any, store: str, processes: int, *arguments: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    try:
        worker(rank, *arguments)
    finally:
        dist.destroy_process_group()


def inputs(dtype: torch.dtype = torch.float64) -> Views:
    views = make_views(rows=9, vocab=PADDED, hidden_size=12, dtype=dtype)
    views.targets %= VOCAB
    return views.grad()


def gradients(outputs: Any, wanted: list[Tensor]) -> list[Tensor]:
    scale = torch.linspace(-1, 1, 9)
    return list(torch.autograd.grad(sum((scale * x).sum() for x in outputs if x is not None), wanted))


def assert_same(got: Any, expected: Any, what: str) -> None:
    for a, b in zip(got, expected, strict=True):
        error, tolerance = relative_error(a, b), 1e-10 if b.dtype == torch.float64 else 1e-5
        assert a.shape == b.shape and error < tolerance, (what, error)


def split_loss(rank: int, weight: Tensor, mine: slice, options: dict[str, Any]) -> None:
    """`linear_vppo_loss` under a split head, with statistics over ranks that hold other trajectories: here none."""
    alone = [dist.new_group([other]) for other in range(dist.get_world_size())][rank]
    g = torch.Generator().manual_seed(0)
    old, advantages = -torch.rand(3, 3, generator=g), torch.randn(3, generator=g)
    tokens = (old, advantages, torch.rand(3, 3, generator=g) < 0.9, torch.rand(3, 3, generator=g))
    for more in ({}, dict(entropy_coef=0.1), dict(loss_agg="none"), dict(check=True)):
        whole, part = inputs(weight.dtype), inputs(weight.dtype)
        mine_weight = weight.detach().clone().requires_grad_()
        targets = whole.targets.view(3, 3)
        one, _ = linear_vppo_loss(
            whole.hidden.view(3, 3, -1), whole.weight, targets, *tokens, **options, **more
        )  # fmt: skip
        two, _ = linear_vppo_loss(
            part.hidden.view(3, 3, -1), mine_weight, targets, *tokens, process_group=dist.group.WORLD,
            stats_group=alone, **options, **more,
        )  # fmt: skip
        expected = torch.autograd.grad(one.sum(), [whole.hidden, whole.weight])
        got = torch.autograd.grad(two.sum(), [part.hidden, mine_weight])
        assert_same([two, *got], [one, expected[0], expected[1][mine]], f"loss {more}")


def split_vocabulary(rank: int, sizes: list[int], backend: str) -> None:
    dtype = torch.float64 if backend == "torch" else torch.float32
    first = sum(sizes[:rank])
    mine = slice(first, first + sizes[rank])
    group = dist.group.WORLD
    options: dict[str, Any] = dict(vocab_size=VOCAB, softcap=25.0, backend=backend)
    for kind in ("kl", "reverse_kl", "jsd"):
        whole, part = inputs(dtype), inputs(dtype)
        weight, bias = (x.detach()[mine].clone().requires_grad_() for x in (part.weight, part.bias))
        one = linear_divergence(
            whole.hidden, whole.perturbed, whole.weight, whole.bias, targets=whole.targets, kind=kind, **options
        )
        with tiles_of(4, 17):
            two = linear_divergence(
                part.hidden, part.perturbed, weight, bias, targets=part.targets, kind=kind, process_group=group,
                check=True, **options,
            )  # fmt: skip
            got = gradients(two, [part.hidden, part.perturbed, weight, bias])
        assert_same(two, one, kind)
        expected = gradients(one, [whole.hidden, whole.perturbed, whole.weight, whole.bias])
        assert_same(got, [*expected[:2], expected[2][mine], expected[3][mine]], kind)

        z_p, z_q = (z.detach().requires_grad_() for z in whole.logits())
        mine_p, mine_q = (z.detach()[:, mine].clone().requires_grad_() for z in (z_p, z_q))
        one = divergence(z_p, z_q, targets=whole.targets, kind=kind, **options)
        two = divergence(mine_p, mine_q, targets=whole.targets, kind=kind, process_group=group, check=True, **options)
        assert_same(two, one, f"{kind} of logits")
        expected = gradients(one, [z_p, z_q])
        assert_same(gradients(two, [mine_p, mine_q]), [g[:, mine] for g in expected], f"{kind} of logits")

    whole, part = inputs(dtype), inputs(dtype)
    weight = part.weight.detach()[mine].clone().requires_grad_()
    single = linear_logprob(whole.hidden, whole.weight, whole.targets, **options)
    both = linear_logprob(part.hidden, weight, part.targets, process_group=group, check=True, **options)
    assert_same(both, single, "logprob")
    expected = gradients(single, [whole.hidden, whole.weight])
    assert_same(gradients(both, [part.hidden, weight]), [expected[0], expected[1][mine]], "logprob")
    split_loss(rank, weight, mine, options)

    for change, words in (
        (dict(vocab_size=PADDED + 1), f"takes None or an integer from 1 to {PADDED}"),
        (dict(hidden=part.hidden.detach() * (1 + rank)), "hidden: differs between ranks"),
        (dict(targets=part.targets.flip(0) if rank else part.targets), "targets: differs between ranks 0 and 1"),
        (dict(temperature=1.0 + rank), "temperature: differs between ranks 0 and 1"),
        (dict(softcap=9.0 if rank else None), "softcap: differs between ranks 0 and 1"),
        (dict(backend="auto" if rank else "torch"), "backend: differs between ranks 0 and 1"),
        (dict(vocab_size=VOCAB - rank), "vocab_size: differs between ranks 0 and 1"),
        ({}, "workspace_limit: differs between ranks 0 and 1"),
    ):
        memory = workspace_limit((3 if change else 3 + rank) << 20)
        with memory, pytest.raises(ValueError, match=words):
            linear_logprob(
                **{"hidden": part.hidden, "weight": weight, "targets": part.targets, "process_group": group, **change}  # type: ignore[arg-type]
            )


@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
def test_a_split_vocabulary(tmp_path: Path, sizes: list[int]) -> None:
    spawn(split_vocabulary, tmp_path, len(sizes), sizes, "torch")


def split_masked(rank: int, sizes: list[int]) -> None:
    """All words of the first rank are masked, by the bias; of logits, the others mask some words in one view each."""
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    whole, part = inputs(), inputs()
    bias = whole.bias.detach().clone()
    bias[: sizes[0]] = bias[::5] = -torch.inf
    whole.targets = part.targets = torch.tensor([sizes[0] + 1, 0, *[PADDED - 1] * 7])
    weight = whole.weight.detach()[mine].clone().requires_grad_()
    z_p, z_q = (z.detach().masked_fill(bias == -torch.inf, -torch.inf) for z in whole.logits())
    z_p[:4, -3:] = z_q[:2, -8:-5] = -torch.inf
    options: dict[str, Any] = dict(targets=whole.targets, check=True)
    for kind in ("kl", "reverse_kl", "jsd"):
        one = linear_divergence(whole.hidden, whole.perturbed, whole.weight, bias, kind=kind, **options)
        two = linear_divergence(
            part.hidden, part.perturbed, weight, bias[mine], kind=kind, process_group=dist.group.WORLD, **options
        )
        for a, b in zip(two, one, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        expected = gradients([x.nan_to_num(neginf=0.0) for x in one], [whole.hidden, whole.weight])
        got = gradients([x.nan_to_num(neginf=0.0) for x in two], [part.hidden, weight])
        assert_same(got, [expected[0], expected[1][mine]], f"{kind}, masked bias")
        one = divergence(z_p, z_q, kind=kind, **options)
        two = divergence(z_p[:, mine], z_q[:, mine], kind=kind, process_group=dist.group.WORLD, **options)
        assert torch.isinf(one.divergence).sum() == {"kl": 2, "reverse_kl": 4, "jsd": 0}[kind]
        for a, b in zip(two, one, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_masked_words_of_a_split_vocabulary(tmp_path: Path) -> None:
    spawn(split_masked, tmp_path, 3, [40, 30, 40])


def split_bfloat16(rank: int, sizes: list[int]) -> None:
    views = inputs(torch.bfloat16)
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    weight = views.weight.detach()[mine].clone().requires_grad_()
    options: dict[str, Any] = dict(targets=views.targets, vocab_size=VOCAB)
    whole = linear_divergence(views.hidden, views.perturbed, views.weight, **options)
    parts = linear_divergence(views.hidden, views.perturbed, weight, process_group=dist.group.WORLD, **options)
    assert_same(parts, whole, "divergence")
    expected = gradients(whole, [views.hidden, views.perturbed, views.weight])
    got = gradients(parts, [views.hidden, views.perturbed, weight])
    for a, b in zip(got, [*expected[:2], expected[2][mine]], strict=True):
        assert a.dtype == torch.bfloat16 and relative_error(a, b) < 2**-8


def test_a_split_vocabulary_in_bfloat16(tmp_path: Path) -> None:
    spawn(split_bfloat16, tmp_path, 2, SPLITS["2 ranks"])


@pytest.mark.parametrize("name", ["triton", "triton_fused"])
def test_a_split_vocabulary_on_other_backends(tmp_path: Path, name: str) -> None:
    spawn(split_vocabulary, tmp_path, 2, SPLITS["2 ranks"], name)


def ranks_cut_alike(rank: int) -> None:
    """One rank holds nearly everything, and the workspace is too small for all rows at a time."""
    views = make_views(rows=300, vocab=3000, hidden_size=4)
    mine = slice(0, 100) if rank == 0 else slice(100, 3000)
    with workspace_limit(1 << 20):
        one = linear_divergence(views.hidden, views.perturbed, views.weight, kind="jsd")
        two = linear_divergence(
            views.hidden, views.perturbed, views.weight[mine], kind="jsd", process_group=dist.group.WORLD
        )
    assert_same(two[:3], one[:3], "jsd in blocks")


def test_row_blocks_agree_between_uneven_ranks(tmp_path: Path) -> None:
    spawn(ranks_cut_alike, tmp_path, 2)


def sharded_tensor(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    whole, part = inputs(), inputs()
    weight, bias = (
        distribute_tensor(x.detach().clone(), mesh, [Shard(0)]).requires_grad_() for x in (part.weight, part.bias)
    )
    one = linear_logprob(whole.hidden, whole.weight, whole.targets, whole.bias, vocab_size=VOCAB)
    for hidden in (part.hidden, distribute_tensor(part.hidden.detach(), mesh, [Replicate()]).requires_grad_()):
        two = linear_logprob(hidden, weight, part.targets, bias, vocab_size=VOCAB)
        assert_same(two, one, "DTensor")
        got = gradients(two, [hidden, weight, bias])
        expected = gradients(linear_logprob(whole.hidden, whole.weight, whole.targets, whole.bias, vocab_size=VOCAB),
                             [whole.hidden, whole.weight, whole.bias])  # fmt: skip
        assert got[1].placements == (Shard(0),) and got[1].shape == (PADDED, 12)  # type: ignore[attr-defined]
        assert_same([g.full_tensor() if hasattr(g, "full_tensor") else g for g in got], expected, "DTensor")
    with pytest.raises(ValueError, match="bias: got a plain tensor"):
        linear_logprob(part.hidden, weight, part.targets, part.bias)
    with pytest.raises(ValueError, match="weight: got a DTensor placed"):
        linear_logprob(part.hidden, distribute_tensor(part.weight.detach(), mesh, [Shard(1)]), part.targets)


def test_a_weight_that_is_a_sharded_tensor(tmp_path: Path) -> None:
    spawn(sharded_tensor, tmp_path, 2)


OF_KIND: tuple[dict[str, Any], ...] = (
    dict(kind="kl"), dict(kind="reverse_kl"), dict(kind="jsd"), dict(kind="jsd", beta=0.2), dict(kind="topk", k=4),
    dict(kind="topk", k=70),
)  # fmt: skip


def split_heads(rank: int, sizes: list[int], backend: str) -> None:
    """A student's head and a wider teacher's: both split, or one of them whole on every rank."""
    dtype, padded = torch.float64 if backend == "torch" else torch.float32, 120
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    mesh, group = init_device_mesh("cpu", (len(sizes),)), dist.group.WORLD
    teachers = make_views(rows=9, vocab=padded, hidden_size=20, dtype=dtype, seed=1).grad()

    def tensors() -> list[Tensor]:
        student = inputs(dtype)
        found = [student.hidden, student.weight, student.bias, teachers.hidden, teachers.weight, teachers.bias]
        return [x.detach().clone().requires_grad_() for x in found]

    def run(given: list[Any], **options: Any) -> Any:
        student, weight, bias, teacher, weight_other, bias_other = given
        return linear_divergence(
            student, teacher, weight, bias, weight_other=weight_other, bias_other=bias_other, targets=targets,
            vocab_size=VOCAB, softcap_other=25.0, backend=backend, check=True, **options,
        )  # fmt: skip

    def part(x: Tensor) -> Tensor:
        return x.detach()[mine].clone().requires_grad_()

    def sharded(x: Tensor, placement: Any) -> Any:
        return distribute_tensor(x.detach().clone(), mesh, [placement]).requires_grad_()

    targets = inputs().targets
    for kind in OF_KIND:
        whole = tensors()
        one = run(whole, **kind)
        expected = gradients(one, whole)
        cases: dict[str, tuple[Any, Any, Any]] = {
            "both split": (part, part, group),
            "the other replicated": (part, lambda x: sharded(x, Replicate()), group),
        }
        if len(set(sizes)) == 1:  # DTensors are split evenly
            cases |= {
                "both sharded": (lambda x: sharded(x, Shard(0)), lambda x: sharded(x[: sum(sizes)], Shard(0)), None),
                "the first whole": (
                    lambda x: x.detach().clone().requires_grad_(),
                    lambda x: sharded(x[: sum(sizes)], Shard(0)),
                    None,
                ),
                "the other whole": (
                    lambda x: sharded(x, Shard(0)),
                    lambda x: x.detach().clone().requires_grad_(),
                    None,
                ),
            }
        for name, (own, other, of) in cases.items():
            student, *head, teacher = tensors()[:4]
            given = [student, *map(own, head), teacher, *map(other, tensors()[4:])]
            with tiles_of(4, 17):
                two = run(given, process_group=of, **kind)
                got = gradients(two, given)
            assert_same(two, one, f"{kind}, {name}")
            for a, b, x in zip(got, expected, given, strict=True):
                a = a.full_tensor() if hasattr(a, "full_tensor") else a
                if len(a) < len(b):  # this rank's part, or without the teacher's last rows, which are padding
                    b = b[mine] if own is part else b[: len(a)]
                assert_same([a], [b], f"gradient of {kind}, {name}, {list(x.shape)}")

    shifted = slice(mine.start + (rank > 0), mine.stop + (rank < len(sizes) - 1))
    given = [*tensors()[:1], *map(part, tensors()[1:3]), tensors()[3], *(x.detach()[shifted] for x in tensors()[4:])]
    with pytest.raises(ValueError, match=r"weight_other: its ranks hold .* words, takes the .* that those of weight"):
        run(given, process_group=group)
    alone = [dist.new_group([other]) for other in range(len(sizes))][rank]
    given[4:] = [sharded(x, Replicate()) for x in tensors()[4:]]
    lonely = distribute_tensor(tensors()[4].detach(), DeviceMesh.from_group(alone, "cpu"), [Shard(0)])
    with pytest.raises(ValueError, match=r"weight_other: got one split over ranks \[\d\], takes those of weight"):
        run([*given[:4], lonely, None], process_group=group)


@pytest.mark.parametrize(("sizes", "name"), [([55, 55], "torch"), ([40, 70], "torch"), ([40, 70], "triton")], ids=str)
def test_two_heads_of_a_split_vocabulary(tmp_path: Path, sizes: list[int], name: str) -> None:
    spawn(split_heads, tmp_path, len(sizes), sizes, name)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(make_views(rows=1, vocab=PADDED, hidden_size=12).weight)

    def forward(self, hidden: Tensor, perturbed: Tensor) -> Tensor:
        return linear_divergence(hidden, perturbed, self.weight, vocab_size=VOCAB).divergence.sum()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = nn.Linear(12, 12, bias=False), Head()
        nn.init.eye_(self.trunk.weight)

    def forward(self, hidden: Tensor, perturbed: Tensor) -> Tensor:
        return self.head(self.trunk(hidden), self.trunk(perturbed))


def fully_sharded(rank: int, own_unit: bool) -> None:
    """Every rank has rows of its own; FSDP averages the gradients of the ranks."""
    rows = [make_views(rows=5 + r, vocab=PADDED, hidden_size=12, seed=r) for r in range(2)]
    plain = Model()
    (sum(plain(v.hidden, v.perturbed) for v in rows) / 2).backward()
    model = Model()
    if own_unit:
        fully_shard(model.head)
    fully_shard(model)
    for _ in range(2):  # the second step meets weights that were gathered and dropped before
        model.zero_grad()
        model(rows[rank].hidden, rows[rank].perturbed).backward()
    for ours, exact in zip(model.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None and exact.grad is not None
        assert_same([ours.grad.full_tensor()], [exact.grad], f"own unit: {own_unit}")  # type: ignore[attr-defined]
    if own_unit:  # outside the head's forward the weight is sharded, but the ranks' rows differ: no split vocabulary
        with pytest.raises(ValueError, match="call the operation inside the head module's forward"):
            linear_divergence(rows[rank].hidden, rows[rank].perturbed, model.head.weight)


@pytest.mark.parametrize("own_unit", [True, False], ids=["own unit", "root unit"])
def test_a_head_under_fsdp2(tmp_path: Path, own_unit: bool) -> None:
    spawn(fully_sharded, tmp_path, 2, own_unit)
