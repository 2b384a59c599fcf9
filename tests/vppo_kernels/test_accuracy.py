"""Values and gradients of every output against float64 on the same inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inputs import BACKENDS, KINDS, bound, head, views
from torch import Tensor

import vppo_kernels as vk
from vppo_kernels import reference, tiling

LOGITS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"softcap": 15.0, "logit_scale": 1.3, "temperature": 0.9},
    {"vocab_size": 501},
]


@pytest.fixture(params=[None, 128], ids=["one tile", "many tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default tiling, and one whose edges fall everywhere."""
    if request.param:
        monkeypatch.setattr(tiling, "choose_tiling", lambda source, *a, **k: tiling.Tiling(5, 67))


def exact_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, options: dict[str, Any]) -> Tensor:
    return reference.logits(hidden.double(), weight.double(), None if bias is None else bias.double(), **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gap", [1.0, 0.1, 0.01, 0.001, 0.0001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_divergence_keeps_its_digits(backend: str, kind: str, gap: float, dtype: torch.dtype, tiles: None) -> None:
    (weight, _), (clean, perturbed) = head(dtype=dtype), views(23, gap=gap, dtype=dtype)
    got = vk.linear_divergence(clean, perturbed, weight, kind=kind, backend=backend).divergence
    truth = reference.divergence(
        exact_logits(clean, weight, None, {}), exact_logits(perturbed, weight, None, {}), None, kind
    ).divergence
    assert got.dtype == torch.float32
    assert (got >= 0).all()
    assert ((got - truth).abs() <= bound(truth)).all()


def test_the_textbook_formula_misses_the_bound() -> None:
    (weight, _), (clean, perturbed) = head(vocab=20_000), views(23, gap=0.003)
    truth = reference.kl(exact_logits(clean, weight, None, {}), exact_logits(perturbed, weight, None, {}))
    plain = reference.kl(clean @ weight.T, perturbed @ weight.T)
    assert ((plain - truth).abs() > bound(truth)).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", LOGITS, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_every_output(backend: str, kind: str, options: dict[str, Any], with_bias: bool, tiles: None) -> None:
    (weight, bias), (clean, perturbed) = head(), views(23, gap=0.3)
    bias = bias if with_bias else None
    targets = torch.arange(23) * 21
    got = vk.linear_divergence(
        clean, perturbed, weight, bias, targets=targets, kind=kind, backend=backend, check=True, **options
    )
    truth = reference.divergence(
        exact_logits(clean, weight, bias, options), exact_logits(perturbed, weight, bias, options), targets, kind
    )
    assert ((got.divergence - truth.divergence).abs() <= bound(truth.divergence)).all()
    for name in got._fields[1:]:
        assert (getattr(got, name) - getattr(truth, name)).abs().max() <= 2e-5, name
    single = vk.linear_logprob(clean, weight, targets, bias, backend=backend, check=True, **options)
    assert (single.logprobs - truth.logprobs).abs().max() <= 2e-5
    assert (single.entropy - truth.entropy).abs().max() <= 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_given_logits(kind: str, tiles: None) -> None:
    generator = torch.Generator().manual_seed(0)
    z_p = 6 * torch.randn(2, 7, 300, generator=generator)
    z_q = z_p + 0.1 * torch.randn(2, 7, 300, generator=generator)
    targets = torch.randint(300, (2, 7), generator=generator)
    got = vk.divergence(z_p, z_q, targets=targets, kind=kind, temperature=1.5, softcap=40.0, check=True)
    p, q = (reference.transform(z.double(), temperature=1.5, softcap=40.0) for z in (z_p, z_q))
    truth = reference.divergence(p, q, targets, kind)
    assert got.divergence.shape == (2, 7)
    assert ((got.divergence - truth.divergence).abs() <= bound(truth.divergence)).all()
    assert (got.logprobs_perturbed - truth.logprobs_perturbed).abs().max() <= 2e-5


def leaves(*tensors: Tensor, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [t.to(dtype).detach().requires_grad_() for t in tensors]


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_the_divergence(kind: str, tiles: None) -> None:
    (weight, bias), (clean, perturbed) = head(vocab=150, width=4), views(6, width=4, gap=1.0)
    targets = torch.tensor([0, 66, 67, 80, 133, 149])
    options: dict[str, Any] = {"kind": kind, "temperature": 0.8, "softcap": 9.0, "logit_scale": 0.6}

    def outputs(h: Tensor, q: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return tuple(vk.linear_divergence(h, q, w, b, targets=targets, **options))

    assert torch.autograd.gradcheck(outputs, leaves(clean, perturbed, weight, bias))
    logits = leaves(clean @ weight.T, perturbed @ weight.T)
    assert torch.autograd.gradcheck(lambda a, b: tuple(vk.divergence(a, b, targets=targets, **options)), logits)


def test_gradcheck_of_the_logprobs(tiles: None) -> None:
    (weight, bias), (clean, _) = head(vocab=150, width=4), views(6, width=4)
    targets = torch.tensor([0, 66, 67, 80, 133, 149])
    assert torch.autograd.gradcheck(
        lambda h, w, b: tuple(vk.linear_logprob(h, w, targets, b, softcap=9.0, temperature=0.8)),
        leaves(clean, weight, bias),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", range(5))
def test_gradients_are_as_good_as_plain_torch(kind: str, dtype: torch.dtype, which: int, tiles: None) -> None:
    """Each output alone: no further from float64 than the plain formula in the same dtype, plus 1e-6."""
    (weight, bias), (clean, perturbed) = head(dtype=dtype), views(23, gap=0.3, dtype=dtype)
    targets = torch.arange(23) * 21
    upstream = torch.linspace(-1, 1, 23)

    def gradients(dtype: torch.dtype, fused: bool) -> list[Tensor]:
        inputs = leaves(clean, perturbed, weight, bias, dtype=dtype)
        if fused:
            output = vk.linear_divergence(*inputs, targets=targets, kind=kind)[which]
        else:
            h, q, w, b = inputs
            output = reference.divergence(reference.logits(h, w, b), reference.logits(q, w, b), targets, kind)[which]
        output.backward(upstream.to(output.dtype))
        return [torch.zeros_like(x) if x.grad is None else x.grad for x in inputs]

    for truth, plain, got in zip(
        gradients(torch.float64, False), gradients(dtype, False), gradients(dtype, True), strict=True
    ):
        assert got.dtype == dtype
        scale = truth.abs().max().clamp_min(1e-12)
        rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2  # of the result itself
        error, allowed = (got - truth).abs().max() / scale, (plain - truth).abs().max() / scale
        assert error <= allowed + 1e-6 + rounding


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_divergence_on_a_gpu(kind: str, dtype: torch.dtype) -> None:
    weight = head(vocab=5000, width=64, dtype=dtype)[0].cuda()
    clean, perturbed = (x.cuda() for x in views(300, width=64, gap=0.03, dtype=dtype))
    got = vk.linear_divergence(clean, perturbed, weight, kind=kind).divergence
    z_p, z_q = (exact_logits(x, weight, None, {}) for x in (clean, perturbed))
    truth = reference.divergence(z_p, z_q, None, kind).divergence
    assert ((got - truth).abs() <= bound(truth)).all()
