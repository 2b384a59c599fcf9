"""What only a GPU can show: compiled kernels, 16-bit products, memory as the device counts it, no waiting.

`VPPO_TEST_DEVICE=cpu` runs all that a CPU can of these, under the interpreter.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.heads import make_heads
from support.views import Views, make_views, relative_error, worst
from torch import Tensor

from benchmarks.inputs import Shape, make_weight
from benchmarks.inputs import make_views as realistic_views
from vppo_kernels import (
    divergence,
    linear_divergence,
    linear_logprob,
    linear_vppo_loss,
    reference,
    tensor_cores,
    topk_mask,
    topk_mask_,
    vppo_loss,
    workspace_limit,
)
from vppo_kernels.backends import available
from vppo_kernels.reference import LOGPROB_BOUND, LOGPROB_BOUND_CUT
from vppo_kernels.statistics import DivergenceOutput
from vppo_kernels.tensor_cores import PRECISIONS
from vppo_kernels.tiling import MIB

DEVICE = os.environ.get("VPPO_TEST_DEVICE", "cuda")
HERE = DEVICE == "cpu" or torch.cuda.is_available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HERE, reason="no CUDA device")]
BACKENDS = available(DEVICE) if HERE else ["torch", "native", "native_fused", "triton", "triton_fused"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ("kl", "reverse_kl", "jsd")
needs_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="asks the CUDA allocator or runtime, or for tensor cores")


@pytest.fixture(params=BACKENDS)
def on_gpu(request: pytest.FixtureRequest) -> str:
    """Name of a backend that runs on the device."""
    return request.param


def run(views: Views, backend: str, kind: str = "kl", bias: bool = True, **options: Any) -> DivergenceOutput:
    """The test is skipped where the backend refuses the weight, as it should."""
    weight = views.weight
    copied = weight.dtype.itemsize == 2 and weight.stride(1) == 1 and weight.stride(0) % 8 == 0
    refused = backend == "native_fused" and not copied
    with pytest.raises(ValueError, match="got 'native_fused', which takes") if refused else nullcontext():
        return linear_divergence(
            views.hidden,
            views.perturbed,
            weight,
            views.bias if bias else None,
            targets=views.targets,
            kind=kind,
            backend=backend,
            **options,
        )
    pytest.skip("refused, with the reason")


def is_cut(dtype: torch.dtype) -> bool:
    """Whether operands of this dtype are multiplied on tensor cores, which cut off what they add."""
    return tensor_cores.multiply(torch.empty(1, 1, dtype=dtype, device=DEVICE))


@contextmanager
def no_waiting() -> Iterator[None]:
    """An error where the host waits for the device."""
    before = torch.cuda.get_sync_debug_mode() if DEVICE == "cuda" else 0
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode(before)


def home(output: Any) -> Any:
    return type(output)(*(None if x is None else x.detach().cpu() for x in output))


@pytest.mark.parametrize("kind", [dict(kind="kl"), dict(kind="jsd", beta=0.1), dict(kind="topk", k=20)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_heads(on_gpu: str, dtype: torch.dtype, kind: dict[str, Any]) -> None:
    heads = make_heads(64, 3000, 256, 384, padding=(8, 136), dtype=dtype, divergences=(1e-2, 5.0))
    here = replace(heads, **{name: x.to(DEVICE) for name, x in {**heads.tensors(), "targets": heads.targets}.items()})
    leaves, exact = here.grad(("student", "weight")), heads.double().grad(("student", "weight"))
    got = linear_divergence(
        leaves.student, leaves.teacher, leaves.weight, leaves.bias, weight_other=leaves.weight_other,
        bias_other=leaves.bias_other, targets=leaves.targets, vocab_size=leaves.vocab_size, softcap_other=30.0,
        backend=on_gpu, check=True, **kind,
    )  # fmt: skip
    truth = exact.truth(kind, other=dict(softcap_other=30.0))
    assert worst(home(got), truth, is_cut(dtype)) < 1
    sets = [
        torch.autograd.grad(x.divergence.sum(), (of.student, of.weight)) for x, of in ((got, leaves), (truth, exact))
    ]
    for a, b in zip(*sets, strict=True):
        assert relative_error(a.cpu(), b) < (1e-5 if dtype == torch.float32 else 2**-6)


@pytest.mark.parametrize("head", [{}, dict(temperature=0.7, softcap=30.0, logit_scale=1.2, vocab_size=1990)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_output_is_within_its_bound(on_gpu: str, dtype: torch.dtype, kind: str, head: dict) -> None:
    views, cut = make_views(dtype=dtype), is_cut(dtype)
    views.targets %= 1990
    got = home(run(views.to(DEVICE), on_gpu, kind, **head))
    assert worst(got, views.truth(kind, bias=True, **head), cut) < 1
    truth = reference.logprob_output(views.to(torch.float64).logits(bias=True, **head)[0], views.targets)
    on_device = views.to(DEVICE)
    single = home(
        linear_logprob(
            on_device.hidden, on_device.weight, on_device.targets, on_device.bias, backend=on_gpu, check=True, **head
        )
    )
    assert max((a - b).abs().max() for a, b in zip(single, truth, strict=True)) < (
        LOGPROB_BOUND_CUT if cut else LOGPROB_BOUND
    )


@needs_cuda
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("width", [3584, 5120])
def test_the_width_of_a_real_model(on_gpu: str, width: int, precision: str) -> None:
    """Where tensor cores cut off long sums: each precision within its own bound."""
    weight = make_weight(Shape(4096, width), torch.device("cpu"), torch.bfloat16)
    hidden, perturbed = realistic_views(weight, 32)
    targets = (hidden.double() @ weight.double().T).argmax(-1)
    views = Views(hidden, perturbed, weight, torch.zeros(4096, dtype=weight.dtype), targets)
    cut = precision == "default" and is_cut(weight.dtype)
    for kind in KINDS:
        got = home(run(views.to(DEVICE), on_gpu, kind, bias=False, precision=precision, check=True))
        assert worst(got, views.truth(kind), cut) < 1


@pytest.mark.parametrize("width", [40, 41], ids=["aligned rows", "rows that no descriptor takes"])
@pytest.mark.parametrize("vocab", [1, 63, 64, 1025, 5003])
@pytest.mark.parametrize("rows", [1, 65])
def test_odd_sizes(on_gpu: str, rows: int, vocab: int, width: int) -> None:
    views = make_views(
        rows=rows, vocab=max(vocab, 2), hidden_size=width, dtype=torch.bfloat16, divergences=(1e-3, 1e-1)
    )
    if vocab == 1:
        views.weight, views.bias, views.targets = views.weight[:1], views.bias[:1], views.targets * 0
    assert worst(home(run(views.to(DEVICE), on_gpu)), views.truth(bias=True), is_cut(torch.bfloat16)) < 1


def test_no_rows_and_strided_inputs(on_gpu: str) -> None:
    views = make_views(rows=16, vocab=200, hidden_size=24, dtype=torch.bfloat16).to(DEVICE)
    assert run(Views(views.hidden[:0], views.perturbed[:0], views.weight, views.bias, views.targets[:0]), on_gpu)[
        0
    ].shape == (0,)
    strided = Views(
        torch.stack([views.hidden, views.hidden], -1)[..., 0],
        views.perturbed.T.contiguous().T,
        views.weight.T.contiguous().T,
        torch.stack([views.bias, views.bias], 1)[:, 0],
        torch.stack([views.targets, views.targets], 1)[:, 1],
    )
    for a, b in zip(run(strided, on_gpu), run(views, on_gpu), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_err_no_more_than_torch_in_the_same_dtype(on_gpu: str, dtype: torch.dtype, kind: str) -> None:
    rounded = make_views(rows=70, vocab=3000, hidden_size=48, dtype=dtype)
    ours, plain = rounded.to(DEVICE).grad(), rounded.to(DEVICE).grad()
    exact = rounded.to(torch.float64).grad()
    scale = torch.linspace(-1, 1, 70)

    def gradients(output: DivergenceOutput, views: Views) -> tuple[Tensor, ...]:
        loss = sum((scale.to(x) * x).sum() for x in output if x is not None)
        return torch.autograd.grad(loss, (views.hidden, views.perturbed, views.weight, views.bias))  # type: ignore[arg-type]

    got = gradients(run(ours, on_gpu, kind), ours)
    usual = gradients(reference.divergence(*plain.logits(bias=True), plain.targets, kind), plain)
    truth = gradients(exact.truth(kind, bias=True), exact)
    for a, b, c in zip(got, usual, truth, strict=True):
        assert relative_error(a.cpu(), c) <= relative_error(b.cpu(), c) + 1e-6


def test_given_logits(on_gpu: str) -> None:
    views = make_views(rows=40, vocab=3001)
    z_p, z_q = (z.to(DEVICE) for z in views.logits())
    got = home(divergence(z_p, z_q, targets=views.targets.to(DEVICE), kind="jsd", backend=on_gpu))
    truth = reference.divergence(z_p.cpu().double(), z_q.cpu().double(), views.targets, "jsd")
    assert worst(got, truth) < 1


def test_far_views_and_large_logits(on_gpu: str) -> None:
    for offset, distance in ((1e4, 0.0), (-1e4, 0.0), (0.0, 60.0), (0.0, 500.0)):
        z_p = make_views(rows=6, vocab=300).logits()[0].round()
        z_q = z_p + 0.25 * (torch.arange(300) % 2)
        z_q[:, 0] += distance
        got = divergence(*(z.to(DEVICE) + offset for z in (z_p, z_q)), backend=on_gpu)
        truth = reference.divergence(*((z + offset).double() for z in (z_p, z_q)))
        assert worst(home(got), truth) < 1


def test_a_head_of_real_size(on_gpu: str) -> None:
    """152,064 tokens, more rows than one block, all within the default workspace."""
    rows, vocab, width = (4200, 152_064, 256) if DEVICE == "cuda" else (20, 3000, 16)
    g = torch.Generator(DEVICE).manual_seed(0)
    weight = torch.randn(vocab, width, device=DEVICE, generator=g).div_(width**0.5).bfloat16()
    hidden = torch.randn(rows, width, device=DEVICE, generator=g).mul_(4).bfloat16()
    perturbed = (hidden + 0.1 * torch.randn(rows, width, device=DEVICE, generator=g)).bfloat16()
    targets = torch.randint(vocab, (rows,), device=DEVICE, generator=g)
    linear_divergence(hidden, perturbed, weight, targets=targets, backend=on_gpu, check=True)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    keep = torch.arange(rows, device=DEVICE) % 5 < 2
    output = linear_logprob(*leaves, targets, backend=on_gpu, check=True)
    gradient, _ = torch.autograd.grad((output.logprobs * keep).sum(), leaves)
    assert not gradient[~keep].any() and gradient[keep].any(1).all()


@needs_cuda
@pytest.mark.parametrize("kind", ["kl", "jsd"])
def test_workspace_stays_within_its_limit(on_gpu: str, kind: str) -> None:
    views = (
        make_views(rows=3000, vocab=8000, hidden_size=256, dtype=torch.bfloat16, divergences=(0.1, 1)).to("cuda").grad()
    )
    run(views, on_gpu, kind)  # compiles, and lets cuBLAS take its own workspace
    torch.cuda.synchronize()
    with workspace_limit(32 * MIB):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        output = run(views, on_gpu, kind)
        assert torch.cuda.max_memory_allocated() - before <= 33 * MIB
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        leaves = (views.hidden, views.perturbed, views.weight)
        gradients = torch.autograd.grad(output.divergence.sum(), leaves)
        summed = sum(g.numel() * 4 for g in gradients[:2]) + sum(g.nbytes for g in gradients)
        assert torch.cuda.max_memory_allocated() - before <= 33 * MIB + summed


@needs_cuda
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "torch"])
def test_the_forward_never_waits_for_the_device(name: str) -> None:
    views = make_views(dtype=torch.bfloat16).to("cuda")
    run(views, name)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(views, name, "kl")
        run(views, name, "jsd")
        linear_logprob(views.hidden, views.weight, views.targets, backend=name)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "torch"])
@pytest.mark.parametrize("operation", [*KINDS, "logprob"])
def test_a_graph_records_the_forward(name: str, operation: str) -> None:
    """And computes from what its inputs hold when it is replayed; `test_capture.py` is what a CPU can say of it."""
    views, later = (make_views(dtype=torch.bfloat16, seed=seed).to("cuda") for seed in (0, 1))

    @torch.no_grad()
    def forward() -> Any:
        if operation == "logprob":
            return linear_logprob(views.hidden, views.weight, views.targets, views.bias, backend=name)
        return run(views, name, operation)

    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):  # compiles, and lets cuBLAS take its own workspace
        forward()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = forward()
    for tensor, value in zip(vars(views).values(), vars(later).values(), strict=True):
        tensor.copy_(value)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(recorded, forward(), strict=True))


@needs_cuda
def test_tf32_and_autocast_change_nothing(on_gpu: str) -> None:
    views = make_views().to("cuda")
    plain = run(views, on_gpu)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cuda", torch.bfloat16):
            again = run(views, on_gpu)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@needs_cuda
def test_compiled_by_inductor(on_gpu: str) -> None:
    views = make_views(dtype=torch.bfloat16).to("cuda").grad()

    def loss(hidden: Tensor, perturbed: Tensor, weight: Tensor) -> Tensor:
        return linear_divergence(hidden, 1.0 * perturbed, weight, backend=on_gpu).divergence.square().sum()

    leaves = (views.hidden, views.perturbed, views.weight)
    expected = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("coefficients", [{}, dict(entropy_coef=0.01, nll_coef=0.1)], ids=str)
def test_the_loss_from_hidden_states(on_gpu: str, coefficients: dict) -> None:
    views = make_views(rows=24, vocab=500).to(DEVICE).grad()
    g = torch.Generator().manual_seed(0)
    advantages, mask = torch.randn(4, generator=g).to(DEVICE), torch.ones(4, 6, device=DEVICE)
    dependency = torch.rand(4, 6, generator=g).to(DEVICE)
    logprobs = linear_logprob(views.hidden, views.weight, views.targets, backend="torch").logprobs.detach().view(4, 6)

    def value_and_gradients(backend: str) -> tuple[Tensor, ...]:
        loss, _ = linear_vppo_loss(
            views.hidden.view(4, 6, -1), views.weight, views.targets.view(4, 6), logprobs - 0.1, advantages, mask,
            dependency, backend=backend, check=True, **coefficients,
        )  # fmt: skip
        return (loss, *torch.autograd.grad(loss, (views.hidden, views.weight)))

    for a, b in zip(value_and_gradients(on_gpu), value_and_gradients("torch"), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (5, 37), (3, 4100), (1, 131_072)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_selection(on_gpu: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Ties, holes with NaN, packed rows and in place, bit for bit as on the CPU; nothing waits for the device."""
    g = torch.Generator().manual_seed(3)
    scores, mask = torch.randn(shape, generator=g).to(dtype), torch.rand(shape, generator=g) < 0.8
    scores[~mask] = float("nan")
    offsets = torch.arange(0, scores.numel() + 1, shape[1], dtype=torch.int32)
    on_device, there, packed = scores.to(DEVICE), mask.to(DEVICE), offsets.to(DEVICE)
    for ratio, threshold in ((0.4, None), (0.07, None), (1e-9, None), (1.0, None), (0.4, 0.3), (1.0, 0.0), (1.0, 9.0)):
        options: dict[str, Any] = dict(keep_threshold=threshold, backend=on_gpu, check=False)
        expected = topk_mask(scores, mask, ratio, keep_threshold=threshold, backend="torch")
        with no_waiting():
            keep = topk_mask(on_device, there, ratio, **options)
            flat = topk_mask(on_device.flatten(), there.flatten(), ratio, cu_seqlens=packed, **options)
            written = topk_mask_(on_device.clone(), there, ratio, **options)
        assert torch.equal(keep.cpu(), expected)
        assert torch.equal(flat.cpu(), expected.flatten())
        assert torch.equal(written.cpu(), expected.to(dtype))


@pytest.mark.parametrize("agg", ["token-mean", "none"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 37), (70, 5), (3, 4100)], ids=str)
def test_the_loss_from_log_probabilities(on_gpu: str, shape: tuple[int, int], agg: str) -> None:
    """Every term at once: loss, gradients and metrics against float64, without waiting for the device."""
    g = torch.Generator().manual_seed(4)
    names = ("logprobs", "old_logprobs", "ref_logprobs", "entropy", "is_weights", "dependency")
    given = {name: torch.rand(shape, generator=g).sub(float(name.endswith("logprobs"))) for name in names}
    given["advantages"] = torch.randn(shape[0], generator=g)
    given["mask"] = torch.rand(shape, generator=g) < 0.8
    options: dict[str, Any] = dict(
        clip_dual=1.5, nll_coef=0.06, entropy_coef=0.02, kl_coef=0.1, loss_agg=agg, check=False
    )
    found = []
    for backend, dtype, device in (("torch", torch.float64, "cpu"), (on_gpu, torch.float32, DEVICE)):
        inputs = {name: x if name == "mask" else x.to(dtype) for name, x in given.items()}
        inputs = {name: x.to(device) for name, x in inputs.items()}
        leaves = [inputs[name].requires_grad_() for name in ("logprobs", "entropy")]
        with no_waiting():
            loss, metrics = vppo_loss(**inputs, **options, backend=backend)
            gradients = torch.autograd.grad(loss.sum(), leaves)
        found.append([x.detach().cpu().double() for x in (loss, *gradients, *metrics.values())])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-4, atol=1e-5)
