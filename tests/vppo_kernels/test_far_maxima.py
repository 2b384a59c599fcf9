"""Two views whose largest logits lie far apart: what is subtracted from what decides how much is rounded away."""

from __future__ import annotations

import math

import pytest
import torch
from support.views import make_views, relative_error, tiles_of, worst
from torch import Tensor

from vppo_kernels import divergence, reference, verify
from vppo_kernels.statistics import APART, DivergenceOutput

KINDS = ("kl", "reverse_kl", "jsd")


def far(which: str) -> tuple[Tensor, Tensor]:
    """Numbers of float32, whose own rounding is not what is measured."""
    g = torch.Generator().manual_seed(0)
    near = 3 * torch.randn(5, 24, generator=g)
    if which == "one word":
        return torch.tensor([[1e4, 0.0], [1e5, 0.0], [-3e4, -4e4]]), torch.tensor([[0.1, 0.3], [0.3, 0.1], [-0.7, 0.2]])
    if which == "an offset":  # steps of 1/128 are what float32 has there
        return (128 * near).round() / 128 + 1e5, near + 0.05 * torch.randn(5, 24, generator=g)
    if which == "about the limit":
        return near + torch.tensor([3.9, 4.0, 4.1, -4.0, 40.0]).unsqueeze(1), near + 0.03 * near.cos()
    if which == "one word that q has not":  # a large divergence, and words whose ratio is near 1
        return torch.zeros(2, 3), torch.tensor([[0.0, 0.0, -1e4], [0.0, 0.1, -3e5]])
    raise KeyError(which)


@pytest.mark.parametrize("which", ["one word", "an offset", "about the limit", "one word that q has not"])
def test_values_and_gradients(backend_tokens: str, which: str) -> None:
    z_p, z_q = far(which)
    columns = z_p.shape[1]
    weights = torch.linspace(0.5, 1.5, len(z_p))
    for kind in KINDS:
        for views in ((z_p, z_q), (z_q, z_p)):
            exact = [z.double().requires_grad_() for z in views]
            truth = reference.divergence(*exact, kind=kind)
            expected = torch.autograd.grad((weights * truth.divergence).sum(), exact)
            plain = [z.clone().requires_grad_() for z in views]
            textbook = torch.autograd.grad((weights * reference.divergence(*plain, kind=kind).divergence).sum(), plain)
            for width in (columns // 2, columns) if backend_tokens != "triton" else (columns // 2,):
                leaves = [z.clone().requires_grad_() for z in views]
                with tiles_of(8, width):
                    got = divergence(*leaves, kind=kind, backend=backend_tokens, check=True)
                    assert worst(got, truth) < 1, (kind, width)
                    gradients = torch.autograd.grad((weights * got.divergence).sum(), leaves)
                for gradient, right, same in zip(gradients, expected, textbook, strict=True):
                    assert relative_error(gradient, right) <= relative_error(same, right) + 1e-6, (kind, width)


def test_the_value_of_two_words(backend_tokens: str) -> None:
    """KL((1, 0) || softmax(0.1, 0.3)) = log(1 + exp(0.2)), whatever is added to all logits of a view."""
    for offset in (1e3, 1e4, 1e5, -1e5, 3e6):
        z_p = torch.tensor([[1e4 + offset, offset]])
        got = divergence(z_p, torch.tensor([[0.1, 0.3]]), backend=backend_tokens).divergence
        assert abs(got.item() - math.log1p(math.exp(torch.tensor(0.3).item() - torch.tensor(0.1).item()))) < 1e-6


@pytest.mark.parametrize("offset", [0.0, APART - 1, APART + 1, 1e4])
def test_equal_views_far_apart_have_no_divergence(backend_tokens: str, offset: float) -> None:
    z = (64 * make_views(rows=8, vocab=60).logits()[0]).round() / 64
    for kind in KINDS:
        assert divergence(z, z + offset, kind=kind, backend=backend_tokens).divergence.max() < 1e-10


def test_check_knows_a_wrong_value_of_given_logits() -> None:
    """Those are not rounded by anyone, however large they are, so nothing excuses an error."""
    z_p, z_q = (z.double() for z in (torch.tensor([[1e4, 0.0]]), torch.tensor([[0.1, 0.3]])))
    truth = reference.divergence(z_p, z_q)
    right = DivergenceOutput(*(None if x is None else x.float() for x in truth))
    rows = torch.tensor([0])
    verify.check_pair(right, z_p, z_q, None, rows, "kl", given=True)
    with pytest.raises(RuntimeError, match=r"divergence of row 0 is 0\.79824"):
        verify.check_pair(right._replace(divergence=torch.tensor([0.798246])), z_p, z_q, None, rows, "kl", given=True)
    finite = right._replace(divergence=torch.tensor([5.0]))
    with pytest.raises(RuntimeError, match="the float64 reference gives inf"):
        verify.check_pair(finite, z_p, torch.tensor([[0.1, -math.inf]]).double(), None, rows, "kl")
