"""Settings of the process around the operations: they change no result, and no operation changes them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.views import make_views
from torch import Tensor

from vppo_kernels import (
    divergence,
    linear_divergence,
    linear_logprob,
    linear_vppo_loss,
    sampled_divergence,
    topk_mask,
    topk_mask_,
    trajectory_scale,
    trajectory_stats,
    vppo_advantages,
    vppo_loss,
)

B, T = 4, 6


def everything(backend: str, dtype: torch.dtype, made: dict[str, Tensor]) -> list[Tensor]:
    """Results and gradients of every operation, on tensors made beforehand."""
    leaves = [made[name].to(dtype).detach().requires_grad_() for name in ("hidden", "perturbed", "weight")]
    hidden, perturbed, weight = leaves
    tokens = [made[name] for name in ("targets", "old", "advantages", "mask", "dependency")]
    targets, old, advantages, mask, dependency = tokens
    head: dict[str, Any] = dict(backend=backend, check=True)
    kernels = "triton" if backend == "triton_fused" else backend
    pair = linear_divergence(hidden, perturbed, weight, targets=targets, kind="jsd", **head)
    single = linear_logprob(hidden, weight, targets, **head)
    given = divergence(hidden.float(), perturbed.float(), **head)
    sampled = sampled_divergence(single.logprobs, old)
    first, _ = linear_vppo_loss(hidden, weight, *tokens, backend=backend)
    second, metrics = vppo_loss(single.logprobs, old, advantages, mask, dependency, backend=kernels)
    plain, _ = vppo_loss(single.logprobs, old, advantages, mask, backend=kernels)
    packing: dict[str, Any] = dict(cu_seqlens=made["offsets"], backend=kernels)
    packed, _ = vppo_loss(single.logprobs.flatten(), old.flatten(), advantages, mask.flatten(), **packing)
    outputs = [*pair, *single, *given[:3], sampled, first, second, plain, packed]
    gradients = torch.autograd.grad(sum(x.sum() for x in outputs), leaves)  # type: ignore[arg-type]
    shaped: dict[str, Any] = dict(backend=kernels)
    return [
        *(x.detach() for x in outputs),
        *gradients,
        *metrics.values(),
        topk_mask(dependency, mask, 0.4, **shaped),
        topk_mask_(dependency.clone(), mask, 0.4, **shaped),
        topk_mask(dependency, mask, 0.4, keep_threshold=0.8, **shaped),
        *trajectory_stats(dependency, mask, **shaped),
        trajectory_scale(dependency, mask, **shaped),
        trajectory_scale(dependency.flatten(), mask.flatten(), **packing),
        vppo_advantages(advantages, dependency, mask, **shaped),
    ]


def inputs() -> dict[str, Tensor]:
    views = make_views(rows=B * T, vocab=300, hidden_size=16)
    g = torch.Generator().manual_seed(0)
    return dict(
        hidden=views.hidden.view(B, T, -1),
        perturbed=views.perturbed.view(B, T, -1),
        weight=views.weight,
        targets=views.targets.view(B, T),
        old=-torch.rand(B, T, generator=g) - 4,
        advantages=torch.randn(B, generator=g),
        mask=torch.rand(B, T, generator=g) < 0.8,
        dependency=torch.rand(B, T, generator=g),
        offsets=torch.arange(B + 1) * T,
    )


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("setting", ["float64", "bfloat16", "float16", "meta"])
def test_default_dtype_and_device_change_nothing(backend: str, setting: str, dtype: torch.dtype) -> None:
    made = inputs()
    expected = everything(backend, dtype, made)
    with torch.device("meta") if setting == "meta" else default_dtype(getattr(torch, setting)):
        got = everything(backend, dtype, made)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


# --- full precision

OWN = [m for m in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul) if hasattr(m, "fp32_precision")]


def state() -> list[Any]:
    try:
        overall: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:  # the backends' own settings contradict it
        overall = None
    return [overall, *(m.fp32_precision for m in OWN)]


@pytest.fixture
def settings_restored() -> Iterator[None]:
    before = state()
    yield
    torch.set_float32_matmul_precision(before[0])
    for matmul, precision in zip(OWN, before[1:], strict=True):
        matmul.fp32_precision = precision


def small_divergence() -> Tensor:
    views = make_views(rows=8, vocab=200, hidden_size=16)
    return linear_divergence(views.hidden, views.perturbed, views.weight).divergence


@pytest.mark.usefixtures("settings_restored")
@pytest.mark.parametrize("overall", ["highest", "high", "medium"])
@pytest.mark.parametrize("own", [None, ("ieee", "bf16"), ("tf32", "ieee")], ids=str)
def test_the_setting_is_left_as_it_was(overall: str, own: tuple[str, str] | None) -> None:
    expected = small_divergence()
    torch.set_float32_matmul_precision(overall)
    if own is not None and len(OWN) < len(own):
        pytest.skip("this torch has one setting for all backends")
    for matmul, precision in zip(OWN, own or (), strict=False):
        matmul.fp32_precision = precision
    before = state()
    assert torch.equal(small_divergence(), expected)
    assert state() == before
    with pytest.raises(ValueError, match="targets"):
        linear_logprob(torch.rand(1, 2), torch.rand(3, 2), torch.tensor([9]))
    assert state() == before


@pytest.mark.usefixtures("settings_restored")
def test_threads_do_not_leave_each_others_settings() -> None:
    """The first operation in sets full precision, the last one out restores what was."""
    from vppo_kernels.logits import full_precision

    torch.set_float32_matmul_precision("medium")
    before, cpu = state(), torch.device("cpu")
    inside, first_out, seen = threading.Barrier(2), threading.Event(), list[list[Any]]()

    def first() -> None:
        with full_precision(cpu):
            inside.wait(10)
        first_out.set()

    def second() -> None:
        with full_precision(cpu):
            inside.wait(10)
            first_out.wait(10)
            seen.append(state())

    workers = [threading.Thread(target=work) for work in (first, second)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert seen == [["highest", *("ieee" for _ in OWN)]] and state() == before


class OnlyWithin:
    """A Triton kernel that runs where the current device is that of its first argument, and notes that it did."""

    def __init__(self, kernel: Any, current: list[Any], ran: list[Any]) -> None:
        self.kernel, self.current, self.ran = kernel, current, ran

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(first: Tensor, *arguments: Any, **options: Any) -> None:
            assert self.current and self.current[-1] is first
            self.ran.append(self.kernel)
            self.kernel[grid](first, *arguments, **options)

        return launch


def test_kernels_of_tokens_start_on_the_device_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a model on several GPUs it is not the current one."""
    modules = [pytest.importorskip(f"vppo_kernels.backends.triton_{name}") for name in ("tokens", "loss")]
    current: list[Any] = []
    ran: list[Any] = []

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        current.append(tensor)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    kernels = [(module, name) for module in modules for name in vars(module) if name.endswith("_kernel")]
    for module, name in kernels:
        monkeypatch.setattr(module, name, OnlyWithin(getattr(module, name), current, ran))
    dependency, mask = torch.rand(B, T), torch.ones(B, T, dtype=torch.bool)
    logprobs = (-torch.rand(B, T)).requires_grad_()
    loss, _ = vppo_loss(logprobs, logprobs.detach(), torch.ones(B), mask, dependency, backend="triton")
    loss.backward()
    assert len({id(kernel) for kernel in ran}) == len(kernels) == 6


def test_fused_sums_are_asked_for_whatever_the_default_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The accuracy was proven with products and sums fused; a version of Triton may leave them apart."""
    pytest.importorskip("triton")
    import vppo_kernels.backends.triton as tiles
    import vppo_kernels.backends.triton_fused as fused
    import vppo_kernels.backends.triton_loss as loss
    import vppo_kernels.backends.triton_tokens as tokens

    seen: dict[str, set[Any]] = {}

    class Noting:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def launch(*arguments: Any, **options: Any) -> None:
                seen.setdefault(self.name, set()).add(options.get("enable_fp_fusion"))
                self.kernel[grid](*arguments, **options)

            return launch

    for module in (tiles, fused, loss, tokens):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Noting(name, getattr(module, name)))
    for backend in ("triton", "triton_fused"):
        everything(backend, torch.float32, inputs())
    views = make_views(rows=4, vocab=600, hidden_size=8)
    linear_logprob(views.hidden, views.weight, views.targets, backend="triton_fused")
    linear_divergence(views.hidden, views.perturbed, views.weight, backend="triton")
    assert len(seen) >= 11 and all(found == {True} for found in seen.values()), seen
