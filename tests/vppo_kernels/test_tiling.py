"""The driver: tiles of any shape give the same numbers, in bounded memory, and rows without gradient cost nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.views import (
    PeakMemory,
    Views,
    counted_products,
    make_views,
    poisoned_buffers,
    relative_error,
    tiles_of,
    worst,
)
from torch import Tensor

from vppo_kernels import divergence, linear_divergence, linear_logprob, topk_mask, workspace_limit
from vppo_kernels.reference import divergence_bound
from vppo_kernels.statistics import DivergenceOutput
from vppo_kernels.tiling import DEFAULT_WORKSPACE, MIB, current_workspace

KINDS = ("kl", "reverse_kl", "jsd")


def run(views: Views, backend: str, kind: str = "kl", **options: Any) -> DivergenceOutput:
    return linear_divergence(
        views.hidden,
        views.perturbed,
        views.weight,
        views.bias,
        targets=views.targets,
        kind=kind,
        backend=backend,
        **options,
    )


def run_with_gradients(views: Views, backend: str, kind: str = "kl") -> tuple[DivergenceOutput, tuple[Tensor, ...]]:
    leaves = views.grad()
    output = run(leaves, backend, kind)
    inputs = (leaves.hidden, leaves.perturbed, leaves.weight, leaves.bias)
    return output, torch.autograd.grad(sum(x.sum() for x in output if x is not None), inputs)  # type: ignore[arg-type]


# --- the shape of the tiles does not matter


@settings(max_examples=20)
@given(
    rows=st.integers(1, 40),
    vocab=st.integers(1, 90),
    tile=st.tuples(st.integers(8, 45), st.integers(16, 95)),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    leading=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_tiling_gives_the_truth_and_its_gradient(
    backend: str, rows: int, vocab: int, tile: tuple[int, int], kind: str, dtype: torch.dtype, leading: bool, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    hidden, move = 4 * torch.randn(rows, 8, generator=g), 0.1 * torch.randn(rows, 8, generator=g)
    weight, bias = torch.randn(vocab, 8, generator=g) / 3, torch.randn(vocab, generator=g)
    views = Views(hidden, hidden + move, weight, bias, torch.randint(vocab, (rows,), generator=g)).to(dtype)
    truth = views.truth(kind, bias=True)
    with tiles_of(*tile), poisoned_buffers():
        output, gradients = run_with_gradients(views, backend, kind)
    assert worst(output, truth) < 1
    _, whole = run_with_gradients(views, backend, kind)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for a, b in zip(gradients, whole, strict=True):
        assert a.shape == b.shape and a.dtype == dtype
        assert relative_error(a, b) < tolerance or float((a - b).norm()) < tolerance * 1e-2
    if leading and rows % 2 == 0:
        shaped = [x.unflatten(0, (2, rows // 2)) for x in (views.hidden, views.perturbed, views.targets)]
        with tiles_of(*tile):
            again = linear_divergence(shaped[0], shaped[1], views.weight, views.bias, kind=kind, backend=backend)
        assert ((again.divergence.flatten() - truth.divergence).abs() <= divergence_bound(truth.divergence)).all()


@pytest.mark.parametrize("tile", [(1, 1), (7, 1), (1, 13), (5, 128)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_small_odd_tiles_keep_the_bounds(backend: str, kind: str, tile: tuple[int, int]) -> None:
    # the interpreter takes its time over every tile
    views = make_views(rows=8, vocab=250) if backend == "torch" else make_views(rows=2, vocab=15)
    with tiles_of(*tile):
        assert worst(run(views, backend, kind), views.truth(kind, bias=True)) < 1


def test_given_logits_in_small_tiles(backend: str) -> None:
    views = make_views(rows=12, vocab=100)
    z_p, z_q = (z.requires_grad_() for z in views.logits())
    truth = DivergenceOutput(*(x.detach() for x in views.truth() if x is not None))
    results = []
    for tile in ((5, 7), (99, 999)):
        with tiles_of(*tile), poisoned_buffers():
            output = divergence(z_p, z_q, targets=views.targets, backend=backend)
            results.append(torch.autograd.grad(output.divergence.sum() + output.entropy.sum(), (z_p, z_q)))
        assert worst(output, truth) < 10  # these logits are rounded, the truth's are not
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("kind", ["kl", "jsd"])
def test_uninitialised_memory_is_never_read(backend: str, kind: str) -> None:
    views = make_views(rows=20, vocab=300)
    plain = run_with_gradients(views, backend, kind)
    scores = torch.rand(4, 30)
    kept = topk_mask(scores, scores > 0.3, 0.4)
    with poisoned_buffers():
        poisoned = run_with_gradients(views, backend, kind)
        assert torch.equal(topk_mask(scores, scores > 0.3, 0.4), kept)
    for a, b in zip((*plain[0], *plain[1]), (*poisoned[0], *poisoned[1]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_bitwise_repeatable(backend: str, kind: str) -> None:
    views = make_views(rows=40, vocab=3000)
    first, second = run_with_gradients(views, backend, kind), run_with_gradients(views, backend, kind)
    for a, b in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert torch.equal(a, b)


# --- the inputs


@pytest.mark.parametrize("kind", KINDS)
def test_strided_inputs_and_inputs_left_as_they_were(backend: str, kind: str) -> None:
    views = make_views(rows=16, vocab=200, hidden_size=24)
    expected, expected_gradients = run_with_gradients(views, backend, kind)
    strided = Views(
        torch.stack([views.hidden, views.hidden], -1)[..., 0],
        views.perturbed.T.contiguous().T,
        torch.cat([views.weight, views.weight], 1)[:, :24],
        torch.stack([views.bias, views.bias], 1)[:, 0],
        torch.stack([views.targets, views.targets], 1)[:, 1],
    )
    assert not any(x.is_contiguous() for x in vars(strided).values())
    before = [x.clone() for x in vars(strided).values()]
    leaves = [x.requires_grad_() for x in (strided.hidden, strided.perturbed, strided.weight, strided.bias)]
    output = run(strided, backend, kind)
    gradients = torch.autograd.grad(sum(x.sum() for x in output if x is not None), leaves)  # type: ignore[arg-type]
    for a, b in zip((*output, *gradients), (*expected, *expected_gradients), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(before, vars(strided).values(), strict=True))


def test_expanded_logits(backend: str) -> None:
    """One clean row against many perturbed ones, without copying it."""
    views = make_views(rows=6, vocab=50, divergences=(0.1, 1))
    z_p, z_q = views.logits()
    one = z_p[:1].clone().requires_grad_()
    many = z_p[:1].repeat(6, 1).requires_grad_()
    outputs = [divergence(z.expand(6, -1), z_q, backend=backend) for z in (one, many)]
    assert torch.equal(outputs[0].divergence, outputs[1].divergence)
    (a,), (b,) = (torch.autograd.grad(o.divergence.sum(), z) for o, z in zip(outputs, (one, many), strict=True))
    assert torch.allclose(a, b.sum(0, keepdim=True), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chosen", [(0,), (1,), (2,), (3,), (0, 2), (1, 3)], ids=str)
def test_only_the_wanted_gradients_are_made(backend: str, kind: str, chosen: tuple[int, ...]) -> None:
    views = make_views(rows=16, vocab=200, hidden_size=8)
    _, expected = run_with_gradients(views, backend, kind)
    tensors = [x.clone() for x in (views.hidden, views.perturbed, views.weight, views.bias)]
    for index in chosen:
        tensors[index].requires_grad_()
    output = run(Views(*tensors, views.targets), backend, kind)
    with counted_products() as products:
        sum(x.sum() for x in output if x is not None).backward()  # type: ignore[union-attr]
    recomputed, one_view, both_views = 2 * 16 * 200 * 8, 16 * 200 * 8, 2 * 16 * 200 * 8
    cost = {0: one_view, 1: one_view, 2: both_views, 3: 0}
    assert sum(products) == recomputed + sum(cost[index] for index in chosen)
    for index, tensor in enumerate(tensors):
        if index in chosen:
            assert tensor.grad is not None and torch.allclose(tensor.grad, expected[index], rtol=1e-5, atol=1e-7)
        else:
            assert tensor.grad is None


def test_nothing_is_recorded_where_no_gradient_is_wanted(backend: str) -> None:
    views = make_views(rows=4, vocab=50)
    assert not run(views, backend).divergence.requires_grad
    with torch.no_grad():
        assert not run(views.grad(), backend).divergence.requires_grad


@pytest.mark.parametrize("kind", ["kl", "jsd"])
def test_autocast_changes_nothing(backend: str, kind: str) -> None:
    views = make_views(rows=16, vocab=200)
    plain = run_with_gradients(views, backend, kind)
    leaves = views.grad()
    with torch.autocast("cpu", torch.bfloat16):
        output = run(leaves, backend, kind)
        single = linear_logprob(leaves.hidden, leaves.weight, leaves.targets, backend=backend)
        inputs = (leaves.hidden, leaves.perturbed, leaves.weight, leaves.bias)
        gradients = torch.autograd.grad(sum(x.sum() for x in output if x is not None), inputs)  # type: ignore[arg-type]
    for a, b in zip((*output, *gradients), (*plain[0], *plain[1]), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(single, linear_logprob(leaves.hidden, leaves.weight, leaves.targets, backend=backend), strict=True):
        assert torch.equal(a, b)


# --- rows without upstream gradient


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_upstream_gradient_meet_no_product(backend: str, kind: str) -> None:
    views = make_views(rows=40, vocab=300, hidden_size=16).grad()
    keep = torch.zeros(40)
    keep[torch.tensor([3, 17, 18, 39])] = torch.tensor([1.0, -2.0, 0.5, 3.0])
    output = run(views, backend, kind)
    wanted = (views.hidden, views.perturbed, views.weight)
    for name in output._fields:
        with counted_products() as products:
            hidden, perturbed, _ = torch.autograd.grad((getattr(output, name) * keep).sum(), wanted, retain_graph=True)
        assert sum(products) == 6 * 4 * 300 * 16, name
        assert not hidden[keep == 0].any() and not perturbed[keep == 0].any()
    with counted_products() as products:
        gradients = torch.autograd.grad((output.divergence * 0).sum(), wanted)
    assert products == []
    assert [g.shape for g in gradients] == [(40, 16), (40, 16), (300, 16)] and not any(g.any() for g in gradients)


def test_the_forward_multiplies_every_row_once(backend: str) -> None:
    views = make_views(rows=40, vocab=300, hidden_size=16)
    for kind in ("jsd",) if backend == "triton_fused" else KINDS:  # the fused sweep has no product of torch's
        with counted_products() as products:
            run(views, backend, kind)
        assert sum(products) == 2 * 40 * 300 * 16, kind


# --- memory


def measured(views: Views, backend: str, kind: str, limit: int) -> tuple[PeakMemory, PeakMemory, int]:
    """Forward, backward (of all outputs), and the bytes of the gradients."""
    leaves = views.grad()
    with workspace_limit(limit):
        with PeakMemory() as forward:
            output = run(leaves, backend, kind, softcap=30.0)
        loss = sum(x.sum() for x in output if x is not None)
        inputs = (leaves.hidden, leaves.perturbed, leaves.weight, leaves.bias)
        with PeakMemory() as backward:
            gradients = torch.autograd.grad(loss, inputs)  # type: ignore[arg-type]
    size = sum(g.nbytes for g in gradients)
    if views.hidden.dtype != torch.float32:  # the bias's is summed in float32, then rounded
        size += gradients[3].numel() * 4
    return forward, backward, size


@pytest.mark.parametrize("limit", [1, 3])
@pytest.mark.parametrize("hidden_size", [16, 1024])
@pytest.mark.parametrize("kind", ["kl", "jsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_workspace_stays_within_its_limit(
    backend: str, dtype: torch.dtype, kind: str, hidden_size: int, limit: int
) -> None:
    if backend == "triton_fused" or (backend == "triton" and (hidden_size, limit) == (1024, 1)):
        pytest.skip("the fused sweep has no tiles, and its gradient's are Triton's; the interpreter takes its time")
    rows, vocab = (300, 1000) if hidden_size == 16 else (70, 500)
    g = torch.Generator().manual_seed(0)
    shapes = (rows, hidden_size), (rows, hidden_size), (vocab, hidden_size), (vocab,)
    views = Views(*(torch.randn(*s, generator=g) * hidden_size**-0.5 for s in shapes), torch.zeros(rows).long()).to(
        dtype
    )
    forward, backward, gradients = measured(views, backend, kind, limit * MIB)
    assert forward.peak <= limit * MIB
    assert backward.peak - gradients <= limit * MIB
    if hidden_size == 16 and limit == 1:  # where the logits would be the largest tensor by far
        assert max(forward.largest, backward.largest) < rows * vocab * 4 / 2


def test_far_views_stay_within_the_limit_too(backend: str) -> None:
    """The detour that overflowing rows take holds more tiles at a time."""
    views = Views(
        torch.full((300, 4), 40.0),
        torch.full((300, 4), -40.0),
        torch.randn(3000, 4),
        torch.zeros(3000),
        torch.zeros(300).long(),
    )
    with workspace_limit(2 * MIB), PeakMemory() as forward:
        output = run(views, backend)
    assert output.divergence.min() > 100
    assert forward.peak <= 2 * MIB


@pytest.mark.parametrize("kind", KINDS)
def test_rare_rows_stay_within_the_limit_too(kind: str) -> None:
    """All rows take the detours: masked words, maxima far apart, a large divergence. Triton and native have none."""
    views = make_views(rows=300, vocab=3000, hidden_size=4)
    z_p, z_q = (z.requires_grad_() for z in views.logits())
    with torch.no_grad():
        z_p[:, ::3], z_q[:, ::3] = -math.inf, -math.inf
        z_p[:, 1] += 60
    with workspace_limit(2 * MIB):
        with PeakMemory() as forward:
            output = divergence(z_p, z_q, kind=kind, backend="torch")
        with PeakMemory() as backward:
            gradients = torch.autograd.grad(output.divergence.sum(), (z_p, z_q))
    assert forward.peak <= 2 * MIB and backward.peak - sum(g.nbytes for g in gradients) <= 2 * MIB


@pytest.mark.parametrize("vocab_size", [None, 2990])
def test_the_weight_gradient_is_not_made_twice(backend: str, vocab_size: int | None) -> None:
    weight, hidden = torch.randn(3000, 256, requires_grad=True), torch.randn(4, 256)
    with workspace_limit(MIB):
        output = linear_logprob(hidden, weight, torch.arange(4), vocab_size=vocab_size, backend=backend)
    with PeakMemory() as backward:
        (gradient,) = torch.autograd.grad(output.logprobs.sum(), weight)
    assert backward.peak < 1.5 * gradient.nbytes
    assert not gradient[2990:].any() if vocab_size else gradient[2990:].any()


def test_given_logits_are_not_copied_whole(backend: str) -> None:
    z_p, z_q = (torch.randn(400, 3000, requires_grad=True) for _ in range(2))
    with workspace_limit(2 * MIB):
        with PeakMemory() as forward:
            output = divergence(z_p, z_q, kind="jsd", backend=backend)
        with PeakMemory() as backward:
            gradients = torch.autograd.grad(output.divergence.sum(), (z_p, z_q))
    assert forward.peak <= 2 * MIB
    assert backward.peak - sum(g.nbytes for g in gradients) <= 2 * MIB


def test_the_limit_holds_inside_the_block_and_in_its_backward() -> None:
    assert current_workspace() == DEFAULT_WORKSPACE == 256 * MIB
    with workspace_limit(8 * MIB):
        with workspace_limit(2 * MIB):
            assert current_workspace() == 2 * MIB
        assert current_workspace() == 8 * MIB
    assert current_workspace() == DEFAULT_WORKSPACE
    with pytest.raises(ValueError, match=r"nbytes: got 1000, takes at least 1048576"), workspace_limit(1000):
        pass
    with pytest.raises(ZeroDivisionError), workspace_limit(2 * MIB):
        raise ZeroDivisionError
    assert current_workspace() == DEFAULT_WORKSPACE


def test_a_row_beyond_the_limit_still_works(backend: str) -> None:
    """The Jensen-Shannon divergence keeps a row of logits: 2.4 MiB of them against a limit of 1 MiB."""
    if backend != "torch":
        pytest.skip("hundreds of tiles: the interpreter would take a minute")
    views = make_views(rows=2, vocab=300_000, hidden_size=2, divergences=(0.1, 0.2))
    with workspace_limit(MIB):
        assert worst(run(views, backend, "jsd"), views.truth("jsd", bias=True)) < 1
    assert math.isfinite(float(run(views, backend, "jsd").divergence.sum()))


def test_wide_hidden_states_whose_columns_follow_each_other() -> None:
    """Their gradient lies as they do, so that no sums of rows fit into its memory."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(70_000, 4, generator=g).bfloat16().T.requires_grad_()
    weight = (torch.randn(8, 70_000, generator=g) / 260).bfloat16().requires_grad_()
    with workspace_limit(MIB):
        logprobs = linear_logprob(hidden, weight, torch.tensor([0, 1, 2, 3]), backend="torch").logprobs
        found = torch.autograd.grad(logprobs.sum(), (hidden, weight))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = (exact[0] @ exact[1].T).log_softmax(-1).diagonal()
    for grad, expected in zip(found, torch.autograd.grad(truth.sum(), exact), strict=True):
        assert (grad.double() - expected).norm() < 0.01 * expected.norm()
