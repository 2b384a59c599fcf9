"""Logits of -inf: words that are masked, in both views or in one, alone or a whole tile of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.views import Views, make_views, relative_error, tiles_of
from torch import Tensor

from vppo_kernels import divergence, linear_divergence, linear_logprob, linear_vppo_loss, reference
from vppo_kernels.reference import LOGPROB_BOUND, divergence_bound
from vppo_kernels.statistics import DivergenceOutput

KINDS = ("kl", "reverse_kl", "jsd")
ROWS, VOCAB = 6, 44
KEPT = 21  # a word that nobody masks
INF = math.inf


def some(seed: int, *also: slice) -> Tensor:
    """A mask that differs from row to row, and holds the words of `also` in all rows."""
    mask = torch.rand(ROWS, VOCAB, generator=torch.Generator().manual_seed(seed)) < 0.3
    for words in also:
        mask[:, words] = True
    mask[:, KEPT] = False
    return mask


NOBODY = torch.zeros(ROWS, VOCAB, dtype=torch.bool)
FIRST, LAST = slice(0, 11), slice(33, 44)  # tiles of their own below
MASKS = {  # of the first view and of the second
    "alike": (some(0), some(0)),
    "alike, whole tiles": (some(0, FIRST, LAST), some(0, FIRST, LAST)),
    "the first masks more": (some(0, FIRST, LAST) | some(1), some(0, FIRST)),
    "the first alone": (some(0, FIRST, LAST), NOBODY),
    "the second alone, some rows": (NOBODY, some(0, LAST) & (torch.arange(ROWS) % 2 == 0).unsqueeze(1)),
    "each its own": (some(0, FIRST), some(1, LAST)),
}


def logits(which: str, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    views = make_views(rows=ROWS, vocab=VOCAB, hidden_size=8, divergences=(1e-5, 1.0)).logits()
    return tuple(z.masked_fill(mask, -INF) for z, mask in zip((views[0] + offset, views[1]), MASKS[which], strict=True))  # type: ignore[return-value]


def assert_right(got: DivergenceOutput, truth: DivergenceOutput) -> None:
    """Infinite where the truth is, and within the bounds elsewhere."""
    for name, value, exact in zip(got._fields, got, truth, strict=True):
        infinite = torch.isinf(exact)
        assert torch.equal(value[infinite].double(), exact[infinite]), name
        bound = divergence_bound(exact) if name == "divergence" else torch.full_like(exact, LOGPROB_BOUND)
        assert ((value.double() - exact).abs() <= bound)[~infinite].all(), (name, value, exact)


def gradients(outputs: Any, leaves: list[Tensor]) -> list[Tensor]:
    """Of all outputs together; every one has a weight of its own in every row."""
    rows = torch.linspace(0.5, 1.5, ROWS)
    total = sum((field * rows.to(x.dtype) * x).sum() for field, x in enumerate(outputs, 1))
    return list(torch.autograd.grad(total, leaves))  # type: ignore[arg-type]


@pytest.mark.parametrize("offset", [0.0, 1000.0], ids=["near", "far"])
@pytest.mark.parametrize("which", MASKS)
def test_values_and_gradients(backend_tokens: str, which: str, offset: float) -> None:
    z_p, z_q = logits(which, offset)
    targets = torch.full((ROWS,), KEPT)
    for kind in KINDS:
        exact = [z.double().requires_grad_() for z in (z_p, z_q)]
        truth = reference.divergence(*exact, targets, kind)
        expected = gradients(truth, exact)
        for width in (11, VOCAB) if backend_tokens != "triton" else (11,):  # its interpreter takes its time
            leaves = [z.clone().requires_grad_() for z in (z_p, z_q)]
            with tiles_of(8, width):
                got = divergence(*leaves, targets=targets, kind=kind, backend=backend_tokens, check=True)
                assert_right(got, truth)
                for gradient, right, z in zip(gradients(got, leaves), expected, (z_p, z_q), strict=True):
                    assert relative_error(gradient, right) < 3e-6, (kind, width)
                    assert not gradient[z == -INF].any()


def test_a_word_that_only_the_second_view_masks_makes_the_divergence_infinite(backend_tokens: str) -> None:
    """However little probability it has, and wherever it lies; such a row's divergence has no gradient, others do."""
    z_p = torch.zeros(4, 12)
    z_p[:, 7] = torch.tensor([0.0, -90.0, -1e4, 5.0])
    z_q = z_p + 0.1 * torch.arange(12)
    z_q[:3, 7] = -INF
    for width in (1, 4, 12) if backend_tokens != "triton" else (4,):
        leaves = [z_p.clone().requires_grad_(), z_q.clone().requires_grad_()]
        with tiles_of(4, width):
            value = divergence(*leaves, backend=backend_tokens, check=True).divergence
            assert (value[:3] == INF).all() and torch.isfinite(value[3])
            of_p, of_q = torch.autograd.grad(value.sum(), leaves)
            assert not of_p[:3].any() and not of_q[:3].any() and of_p[3].any() and of_q[3].any()
            other = divergence(z_p, z_q, kind="reverse_kl", backend=backend_tokens, check=True).divergence
            assert torch.isfinite(other).all()


def test_a_masked_target_has_no_probability_and_no_gradient(backend: str) -> None:
    views = make_views(rows=ROWS, vocab=VOCAB, hidden_size=8)
    views.bias[::2], views.targets = -INF, torch.tensor([0, 1, 2, 3, 4, 5])
    leaves = views.grad()
    head = (leaves.hidden, leaves.weight, leaves.targets, leaves.bias)
    single = linear_logprob(*head, backend=backend, check=True)
    pair = linear_divergence(
        leaves.hidden, leaves.perturbed, leaves.weight, leaves.bias, targets=views.targets, backend=backend, check=True
    )
    with torch.no_grad():  # what makes no logits leaves gradients to tiles
        alone = linear_logprob(*head, backend=backend, check=True).logprobs
        views_alone = linear_divergence(
            leaves.hidden, leaves.perturbed, leaves.weight, leaves.bias, targets=views.targets, backend=backend
        )
    for logprobs in (alone, views_alone.logprobs, views_alone.logprobs_perturbed):
        assert logprobs is not None and (logprobs[::2] == -INF).all() and torch.isfinite(logprobs[1::2]).all()
    for logprobs in (single.logprobs, pair.logprobs):
        assert logprobs is not None and (logprobs[::2] == -INF).all() and torch.isfinite(logprobs[1::2]).all()
        hidden, bias = torch.autograd.grad(logprobs.sum(), (leaves.hidden, leaves.bias))
        assert not hidden[::2].any() and hidden[1::2].any(1).all() and torch.isfinite(hidden).all()
        assert not bias[::2].any() and bias[1::2].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_masked_bias(backend: str, kind: str) -> None:
    """What a mask in the bias gives is what leaving those words out of the vocabulary gives."""
    views = make_views(rows=ROWS, vocab=VOCAB, hidden_size=8, divergences=(1e-5, 1.0))
    kept = torch.arange(VOCAB)[~some(3, FIRST)[0]]
    masked = Views(views.hidden, views.perturbed, views.weight, views.bias.clone(), views.targets)
    masked.bias[some(3, FIRST)[0]] = -INF
    masked.targets = kept[torch.arange(ROWS)]
    left = Views(views.hidden, views.perturbed, views.weight[kept], views.bias[kept], torch.arange(ROWS)).to(
        torch.float64
    )
    found = []
    for each, options in ((left.grad(), dict(backend="torch")), (masked.grad(), dict(backend=backend, check=True))):
        leaves = [each.hidden, each.perturbed, each.weight, each.bias]
        with tiles_of(8, 11):
            outputs = linear_divergence(*leaves, targets=each.targets, kind=kind, temperature=0.7, **options)  # type: ignore[arg-type]
            found.append((outputs, gradients(outputs, leaves)))
    (truth, expected), (got, gradient) = found
    assert_right(got, truth)
    assert not gradient[2][masked.bias == -INF].any() and not gradient[3][masked.bias == -INF].any()
    gradient[2:] = [g[kept] for g in gradient[2:]]
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(gradient, expected, strict=True))


def test_the_loss_from_hidden_states_under_a_masked_bias(backend: str) -> None:
    views = make_views(rows=ROWS, vocab=VOCAB, hidden_size=8)
    bias = views.bias.clone()
    bias[30:] = -INF
    tokens = (-torch.ones(2, 3), torch.tensor([1.0, -1.0]), torch.ones(2, 3, dtype=torch.bool))
    found = []
    for weight, b in ((views.weight, bias), (views.weight[:30], bias[:30])):
        leaves = [views.hidden.view(2, 3, -1).clone().requires_grad_(), weight.clone().requires_grad_()]
        loss, _ = linear_vppo_loss(
            leaves[0], leaves[1], (views.targets % 30).view(2, 3), *tokens, bias=b, entropy_coef=0.1, backend=backend
        )
        hidden, of_weight = torch.autograd.grad(loss, leaves)
        found.append((loss, hidden, of_weight[:30]))
        assert not of_weight[30:].any()
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*found, strict=True))


def test_a_row_without_any_word_is_not_a_number(backend_tokens: str) -> None:
    """In either view; the rows beside it are what they were."""
    z_p, z_q = make_views(rows=ROWS, vocab=VOCAB, hidden_size=8).logits()
    expected = divergence(z_p, z_q, backend=backend_tokens)
    for empty_p, empty_q in ((2, None), (None, 2), (2, 2)):
        masked = [z.clone() for z in (z_p, z_q)]
        for z, row in zip(masked, (empty_p, empty_q), strict=True):
            if row is not None:
                z[row] = -INF
        for kind in KINDS:
            got = divergence(*masked, kind=kind, backend=backend_tokens)
            assert torch.isnan(got.divergence[2]), (kind, empty_p, empty_q)
            if kind == "kl":
                assert torch.equal(got.divergence[[0, 1, 3, 4, 5]], expected.divergence[[0, 1, 3, 4, 5]])
            with pytest.raises(RuntimeError, match="of row 2 is nan"):
                divergence(*masked, kind=kind, backend=backend_tokens, check=True)


def test_a_softcap_masks_nothing(backend_tokens: str) -> None:
    """It makes -softcap of -inf, an ordinary logit; nothing comes through it to what was -inf."""
    leaves = [z.requires_grad_() for z in logits("each its own")]
    exact = [z.detach().double().requires_grad_() for z in leaves]
    targets = torch.full((ROWS,), 1)  # which the first view would mask
    truth = reference.divergence(*(5.0 * torch.tanh(z / 5.0) for z in exact), targets, "kl")
    got = divergence(*leaves, targets=targets, softcap=5.0, backend=backend_tokens, check=True)
    assert torch.isfinite(torch.stack(got)).all()
    assert_right(got, truth)
    for gradient, right, z in zip(gradients(got, leaves), gradients(truth, exact), leaves, strict=True):
        assert relative_error(gradient, right) < 3e-6
        assert not gradient[z == -INF].any()


def test_a_nan_beside_masked_words_still_shows(backend_tokens: str) -> None:
    z_p, z_q = logits("alike")
    for first in (True, False):
        views = [z_p.clone(), z_q.clone()]
        views[0 if first else 1][1, KEPT] = math.nan
        for kind in KINDS:
            got = divergence(*views, kind=kind, backend=backend_tokens)
            assert torch.isnan(got.divergence[1]) and torch.isfinite(got.divergence[[0, 2, 3, 4, 5]]).all()
        with pytest.raises(ValueError, match=r"logits(_perturbed)?: got NaN at row 1 .*takes finite values, and -inf"):
            divergence(*views, backend=backend_tokens, check=True)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(backend_float64: str, kind: str) -> None:
    """Of the words that are there; masked ones are constants."""
    z = [x.double() for x in logits("alike" if kind == "reverse_kl" else "the first masks more")]

    def outputs(*given: Tensor) -> tuple[Tensor, ...]:
        masked = [x.masked_fill(m == -INF, -INF) for x, m in zip(given, z, strict=True)]
        return tuple(divergence(*masked, targets=torch.full((ROWS,), KEPT), kind=kind, backend=backend_float64))  # type: ignore[arg-type]

    leaves = [torch.where(x == -INF, 0.0, x).requires_grad_() for x in z]
    assert torch.autograd.gradcheck(outputs, leaves)


@pytest.mark.parametrize("k", [2, 30, VOCAB - 1, VOCAB])
@pytest.mark.parametrize("which", MASKS)
def test_the_likeliest_words(backend_tokens: str, which: str, k: int) -> None:
    """Also where fewer words than k are left, and the bin of all others is empty."""
    leaves, exact = ([z.to(dtype).requires_grad_() for z in logits(which)] for dtype in (torch.float32, torch.float64))
    targets = torch.full((ROWS,), KEPT)
    truth = reference.divergence(*exact, targets, "topk", k=k)
    finite = torch.isfinite(truth.divergence)
    with tiles_of(8, 11):
        got = divergence(*leaves, targets=targets, kind="topk", k=k, backend=backend_tokens, check=True)
        assert_right(got, truth)
        found = torch.autograd.grad(got.divergence.sum(), leaves)
    assert all(torch.isfinite(gradient).all() for gradient in found)
    p, q = (z.detach().softmax(-1) for z in exact)
    taken = torch.zeros_like(q, dtype=torch.bool).scatter(1, q.topk(k).indices, True)
    rest_p, rest_q = (x.masked_fill(taken, 0.0).sum(1, keepdim=True) for x in (p, q))
    # of KL(q || p): p - q at a word, or the same of all others, shared out as p shares it
    expected = torch.where(taken, p - q, torch.where(rest_p > 0, p * (1 - rest_q / rest_p), 0.0))
    assert relative_error(found[0], expected * finite.unsqueeze(1)) < 3e-5


def test_the_likeliest_words_of_a_row_without_any(backend_tokens: str) -> None:
    views = make_views(rows=ROWS, vocab=VOCAB, hidden_size=8).logits()
    for empty in ((0,), (1,), (0, 1)):
        masked = [z.clone() for z in views]
        for view in empty:
            masked[view][2] = -INF
        for k in (1, VOCAB):
            got = divergence(*masked, kind="topk", k=k, backend=backend_tokens).divergence
            assert torch.isnan(got[2]) and torch.isfinite(got[[0, 1, 3, 4, 5]]).all(), (empty, k)
