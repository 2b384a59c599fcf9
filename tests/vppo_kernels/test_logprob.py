"""Log-probabilities and entropies of one view against the definitions in float64."""

from __future__ import annotations

import pytest
import torch
from support.views import Views, counted_products, make_views, relative_error, tiles_of
from torch import Tensor

from vppo_kernels import linear_logprob, reference
from vppo_kernels.reference import LOGPROB_BOUND
from vppo_kernels.statistics import LogprobOutput

HEADS = {
    "plain": {},
    "bias": dict(bias=True),
    "all": dict(bias=True, temperature=1.3, logit_scale=1.1, softcap=30.0, vocab_size=1900),
}


def run(views: Views, backend: str, *, bias: bool = False, **head: object) -> LogprobOutput:
    bias_or_none = views.bias if bias else None
    return linear_logprob(views.hidden, views.weight, views.targets, bias_or_none, backend=backend, **head)  # type: ignore[arg-type]


def truth_of(views: Views, **head: object) -> LogprobOutput:
    return reference.logprob_output(views.to(torch.float64).logits(**head)[0], views.targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("spread", [(0.01, 0.5), (3.0, 6.0)], ids=["flat", "peaked"])
def test_both_outputs_are_within_the_bound(
    backend: str, head: dict, dtype: torch.dtype, spread: tuple[float, float]
) -> None:
    views = make_views(dtype=dtype, spread=spread)
    views.targets %= 1900
    got, truth = run(views, backend, **head), truth_of(views, **head)
    for value, exact in zip(got, truth, strict=True):
        assert value.dtype == torch.float32
        assert (value - exact).abs().max() < LOGPROB_BOUND
    assert (got.logprobs <= 0).all() and (got.entropy >= 0).all()


def test_agrees_with_the_pair(backend: str) -> None:
    from vppo_kernels import linear_divergence

    views = make_views(rows=16, vocab=300)
    pair = linear_divergence(views.hidden, views.perturbed, views.weight, targets=views.targets, backend=backend)
    single = run(views, backend)
    assert torch.allclose(single.logprobs, pair.logprobs, atol=LOGPROB_BOUND)
    assert torch.allclose(single.entropy, pair.entropy, atol=LOGPROB_BOUND)


def test_leading_dimensions_and_int32_targets(backend: str) -> None:
    views = make_views(rows=12, vocab=100)
    flat = run(views, backend)
    views.hidden, views.targets = views.hidden.view(3, 2, 2, -1), views.targets.view(3, 2, 2).int()
    for a, b in zip(run(views, backend), flat, strict=True):
        assert a.shape == (3, 2, 2) and torch.equal(a.flatten(), b)


@pytest.mark.parametrize("head", [{}, dict(temperature=0.7, logit_scale=1.5, softcap=2.0)], ids=["", "head"])
def test_gradcheck(backend_float64: str, head: dict) -> None:
    g = torch.Generator().manual_seed(3)
    inputs = [torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_() for s in ((4, 3), (7, 3), (7,))]
    targets = torch.tensor([0, 6, 3, 3])

    def library(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return tuple(linear_logprob(hidden, weight, targets, bias, backend=backend_float64, **head))

    def definition(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return tuple(reference.logprob_output(reference.logits(hidden, weight, bias, **head), targets))

    with tiles_of(3, 2):
        assert torch.autograd.gradcheck(library, inputs)
        assert torch.autograd.gradcheck(definition, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_gradients_err_no_more_than_torch_in_the_same_dtype(backend: str, dtype: torch.dtype, head: dict) -> None:
    rounded = make_views(rows=32, vocab=400, hidden_size=32, dtype=dtype)
    rounded.targets %= 390
    head = {**head, "bias": True, "vocab_size": 390}
    ours, plain, exact = rounded.grad(), rounded.grad(), rounded.to(torch.float64).grad()
    outputs = (
        run(ours, backend, **head),
        reference.logprob_output(plain.logits(**head)[0].float(), plain.targets),
        truth_of(exact, **head),
    )
    g = torch.Generator().manual_seed(5)
    upstream = [torch.randn(32, generator=g) for _ in range(2)]
    for chosen in ([0], [1], [0, 1]):
        sets = [
            torch.autograd.grad(
                sum((upstream[i] * output[i]).sum() for i in chosen),  # type: ignore[arg-type]
                (views.hidden, views.weight, views.bias),
                retain_graph=True,
            )
            for output, views in zip(outputs, (ours, plain, exact), strict=True)
        ]
        for a, b, truth in zip(*sets, strict=True):
            assert a.dtype == dtype
            assert relative_error(a, truth) <= relative_error(b, truth) + 1e-6


def test_rows_without_upstream_gradient_meet_no_product(backend: str) -> None:
    views = make_views(rows=40, vocab=300, hidden_size=16).grad()
    keep = torch.zeros(40)
    keep[torch.tensor([3, 17, 18, 39])] = torch.tensor([1.0, -2.0, 0.5, 3.0])
    output = run(views, backend)
    wanted = (views.hidden, views.weight)
    with counted_products() as all_rows:
        torch.autograd.grad(output.logprobs.sum(), wanted, retain_graph=True)
    with counted_products() as four_rows:
        hidden, weight = torch.autograd.grad((output.logprobs * keep).sum(), wanted, retain_graph=True)
    assert sum(all_rows) == 3 * 40 * 300 * 16 and sum(four_rows) == 3 * 4 * 300 * 16
    with counted_products() as by_entropy:
        torch.autograd.grad((output.entropy * keep).sum(), wanted, retain_graph=True)
    assert sum(by_entropy) == sum(four_rows)
    assert not hidden[keep == 0].any() and hidden[keep != 0].any(1).all() and weight.any()
    keep[5] = torch.nan  # a NaN upstream is no zero: it must show
    hidden, _ = torch.autograd.grad((output.logprobs * keep).sum(), wanted, retain_graph=True)
    assert torch.isnan(hidden[5]).all() and not torch.isnan(hidden[keep.isfinite()]).any()
    with counted_products() as none:
        hidden, weight = torch.autograd.grad((output.logprobs * 0).sum(), wanted)
    assert none == [] and hidden.shape == (40, 16) and weight.shape == (300, 16)
    assert not hidden.any() and not weight.any()
