"""Divergences and their gradients against the definitions in float64."""

from __future__ import annotations

import pytest
import torch
from support.views import Views, make_views, relative_error, tiles_of, worst
from torch import Tensor

from vppo_kernels import divergence, linear_divergence, reference, sampled_divergence
from vppo_kernels.reference import LOGPROB_BOUND, divergence_bound
from vppo_kernels.statistics import DivergenceOutput

KINDS = ("kl", "reverse_kl", "jsd")
FLAT, PEAKED = (0.01, 0.5), (3.0, 6.0)
HEADS = {
    "bias": dict(bias=True),
    "temperature": dict(temperature=0.7),
    "scale": dict(logit_scale=0.4),
    "softcap": dict(softcap=20.0),
    "padding": dict(vocab_size=1900),
    "all": dict(bias=True, temperature=1.3, logit_scale=1.1, softcap=30.0, vocab_size=1900),
}


def run(views: Views, backend: str, *, kind: str = "kl", bias: bool = False, **head: object) -> DivergenceOutput:
    return linear_divergence(
        views.hidden,
        views.perturbed,
        views.weight,
        views.bias if bias else None,
        targets=views.targets,
        kind=kind,
        backend=backend,
        **head,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("spread", [FLAT, PEAKED], ids=["flat", "peaked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_output_is_within_its_bound(backend: str, dtype: torch.dtype, spread: tuple[float, float]) -> None:
    views = make_views(spread=spread, dtype=dtype)
    for kind in KINDS:
        truth = views.truth(kind)
        got = run(views, backend, kind=kind)
        assert worst(got, truth) < 1, kind
        assert all(output.dtype == torch.float32 for output in got)
        assert (got.divergence >= 0).all() and (got.entropy >= 0).all() and (got.entropy_perturbed >= 0).all()
    # the inputs are what the test's name says: divergences over six decades, entropies of a language model
    truth = views.truth()
    assert truth.divergence.min() < 2e-5 and truth.divergence.max() > 4
    entropy = truth.entropy
    assert entropy.min() > 6 if spread is FLAT else ((entropy > 0.2) & (entropy < 2)).sum() > len(entropy) / 3


@pytest.mark.parametrize("kind", ["kl", "reverse_kl"])
@pytest.mark.parametrize("spread", [FLAT, PEAKED], ids=["flat", "peaked"])
def test_the_plain_formula_in_float32_misses_the_bound(kind: str, spread: tuple[float, float]) -> None:
    views = make_views(spread=spread)
    plain = reference.divergence(*views.logits(), views.targets, kind)
    assert worst(plain, views.truth(kind)) > 3


def test_rounding_of_the_matrix_product_drops_out(backend: str) -> None:
    """The products' own error, put through exact statistics, is several times what comes out."""
    views = make_views(rows=192, vocab=4000, hidden_size=256, divergences=(1e-4, 1e-1), seed=1)
    truth = views.truth().divergence
    z_p, z_q = (h @ views.weight.T for h in (views.hidden, views.perturbed))
    product = ((reference.kl(z_p.double(), z_q.double()) - truth).abs() / divergence_bound(truth)).max()
    got = ((run(views, backend).divergence - truth).abs() / divergence_bound(truth)).max()
    assert got < 0.5 and got < product / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_head_options_are_within_the_bound(backend: str, dtype: torch.dtype, head: dict) -> None:
    views = make_views(rows=48, dtype=dtype)
    views.targets %= 1900
    for kind in KINDS:
        assert worst(run(views, backend, kind=kind, **head), views.truth(kind, **head)) < 1, kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_given_logits_are_within_the_bound(backend: str, dtype: torch.dtype, kind: str) -> None:
    logits = [z.to(dtype) for z in make_views().logits()]
    targets = torch.arange(96)
    head = dict(temperature=0.8, softcap=40.0, vocab_size=1999)
    for options in ({}, head):
        vocab = options.get("vocab_size")
        exact = [z.double()[:, :vocab] for z in logits]
        exact = [reference.transform(z, **{k: v for k, v in options.items() if k != "vocab_size"}) for z in exact]
        got = divergence(*logits, targets=targets, kind=kind, backend=backend, **options)
        assert worst(got, reference.divergence(*exact, targets, kind)) < 1


def test_mixed_dtypes_of_views_and_head(backend: str) -> None:
    views = make_views(rows=32)
    views.hidden, views.weight = views.hidden.bfloat16(), views.weight.half()
    assert worst(run(views, backend), views.truth()) < 1


@pytest.mark.parametrize("kind", KINDS)
def test_leading_dimensions_are_kept(backend: str, kind: str) -> None:
    views = make_views(rows=24, vocab=300)
    flat = run(views, backend, kind=kind)
    shaped = Views(
        views.hidden.view(2, 3, 4, -1),
        views.perturbed.view(2, 3, 4, -1),
        views.weight,
        views.bias,
        views.targets.view(2, 3, 4).int(),
    )
    for a, b in zip(run(shaped, backend, kind=kind), flat, strict=True):
        assert a.shape == (2, 3, 4) and torch.equal(a.flatten(), b)
    single = Views(views.hidden[5], views.perturbed[5], views.weight, views.bias, views.targets[5])
    for a, b in zip(run(single, backend, kind=kind), flat, strict=True):
        assert a.shape == () and torch.allclose(a, b[5], rtol=1e-5, atol=LOGPROB_BOUND)


def test_no_targets_no_logprobs(backend: str) -> None:
    views = make_views(rows=8, vocab=100)
    got = linear_divergence(views.hidden, views.perturbed, views.weight, backend=backend)
    assert got.logprobs is None and got.logprobs_perturbed is None
    assert torch.equal(got.divergence, run(views, backend).divergence)


def test_directions_are_not_confused(backend: str) -> None:
    """`reverse_kl` is `kl` of the swapped views, while entropies and log-probabilities keep their places."""
    views = make_views(rows=16, vocab=200, divergences=(0.1, 3))
    swapped = Views(views.perturbed, views.hidden, views.weight, views.bias, views.targets)
    forward, reverse, other = run(views, backend), run(views, backend, kind="reverse_kl"), run(swapped, backend)
    assert torch.allclose(reverse.divergence, other.divergence, rtol=1e-5)
    assert not torch.allclose(reverse.divergence, forward.divergence, rtol=1e-2)
    for a, b in zip(forward[1:], reverse[1:], strict=True):
        assert torch.allclose(a, b, atol=LOGPROB_BOUND)


# --- more kinds than two directions and their mean


def gkd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Equation 1 of GKD (arXiv 2306.13649), from logits, as it stands there: P is the teacher's, Q the student's."""
    p, q = teacher.softmax(-1), student.softmax(-1)
    mean = beta * p + (1 - beta) * q
    return (beta * p * (p / mean).log() + (1 - beta) * q * (q / mean).log()).sum(-1)


BETAS = (1e-3, 0.1, 0.5, 0.8, 0.999)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_beta_is_within_the_bound(backend: str, dtype: torch.dtype) -> None:
    views = make_views(rows=48, dtype=dtype)
    for beta in BETAS:
        got, truth = run(views, backend, kind="jsd", beta=beta, check=True), views.truth("jsd", beta=beta)
        assert worst(got, truth) < 1, beta
        exact = gkd(*views.to(torch.float64).logits(), beta)
        assert torch.allclose(truth.divergence, exact, rtol=1e-6, atol=1e-12)


def test_the_ends_of_beta_are_the_two_directions(backend: str) -> None:
    """As in TRL; close to an end the divergence is that much smaller, and by that number it tends to the same."""
    views = make_views(rows=24, vocab=300, divergences=(0.01, 0.3))
    for beta, near, kind in ((0, 1e-3, "reverse_kl"), (1.0, 1 - 1e-3, "kl")):
        leaves, plain = views.grad(), views.grad()
        end, expected = run(leaves, backend, kind="jsd", beta=beta), run(plain, backend, kind=kind)
        grads = torch.autograd.grad(end.divergence.sum(), (leaves.hidden, leaves.perturbed, leaves.weight))
        same = torch.autograd.grad(expected.divergence.sum(), (plain.hidden, plain.perturbed, plain.weight))
        for a, b in zip((*end, *grads), (*expected, *same), strict=True):
            assert torch.equal(a, b)
        close = run(views, backend, kind="jsd", beta=near).divergence / min(near, 1 - near)
        # but for a row of very unlike tails, which would have to come closer still
        assert ((close / end.divergence - 1).abs() < 0.05).sum() >= 23


@pytest.mark.parametrize("kind", [dict(kind="jsd", beta=beta) for beta in BETAS] + [dict(kind="topk", k=7)], ids=str)
def test_their_gradients_err_no_more_than_torch(backend: str, kind: dict) -> None:
    views = make_views(rows=32, vocab=400, hidden_size=32, divergences=(1e-4, 5))
    ours, plain, exact = views.grad(), views.grad(), views.to(torch.float64).grad()
    upstream = torch.linspace(-1, 1, 32)
    sets = [
        torch.autograd.grad((upstream * output.divergence).sum(), (of.hidden, of.perturbed, of.weight))
        for output, of in (
            (run(ours, backend, **kind), ours),
            (reference.divergence(*plain.logits(), views.targets, **kind), plain),
            (exact.truth(**kind), exact),
        )
    ]
    for a, b, truth in zip(*sets, strict=True):
        assert relative_error(a, truth) <= relative_error(b, truth) + 1e-6


@pytest.mark.parametrize("k", [1, 7, 300, 2000, 5000])
def test_the_likeliest_words_and_the_rest(backend: str, k: int) -> None:
    """Whatever the tiles are; with all words it is the divergence of all words."""
    views = make_views(rows=24)
    truth = views.truth("topk", k=k)
    for tile in ((24, 2000), (10, 130)):
        with tiles_of(*tile):
            got = run(views, backend, kind="topk", k=k, check=True)
        assert worst(got, truth) < 1
    if k >= 2000:
        assert worst(run(views, backend, kind="reverse_kl"), truth) < 1
    else:
        assert (truth.divergence < views.truth("reverse_kl").divergence).all()


def test_the_likeliest_words_of_given_logits(backend: str) -> None:
    z_p, z_q = (z.requires_grad_() for z in make_views(rows=24, vocab=500).logits())
    got = divergence(z_p, z_q, kind="topk", k=20, softcap=30.0, vocab_size=480, backend=backend, check=True)
    exact = [z.detach().double().requires_grad_() for z in (z_p, z_q)]
    truth = reference.topk(*(reference.transform(z[:, :480], softcap=30.0) for z in exact), k=20)
    assert ((got.divergence - truth).abs() < divergence_bound(truth)).all()
    ours = torch.autograd.grad(got.divergence.sum(), (z_p, z_q))
    for a, b in zip(ours, torch.autograd.grad(truth.sum(), exact), strict=True):
        assert relative_error(a, b) < 1e-5


# --- gradients


def small_views() -> Views:
    g = torch.Generator().manual_seed(3)
    shapes = ((4, 3), (4, 3), (7, 3), (7,))
    tensors = [torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes]
    return Views(*tensors, torch.tensor([0, 6, 3, 3])).grad()


@pytest.mark.parametrize(
    "head", [{}, dict(temperature=0.7, logit_scale=1.5, softcap=2.0, vocab_size=7)], ids=["", "head"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(backend_float64: str, kind: str, head: dict) -> None:
    views = small_views()

    def library(hidden: Tensor, perturbed: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        given = Views(hidden, perturbed, weight, bias, views.targets)
        return tuple(run(given, backend_float64, kind=kind, bias=True, **head))  # type: ignore[return-value]

    def definition(hidden: Tensor, perturbed: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        given = Views(hidden, perturbed, weight, bias, views.targets)
        return tuple(given.truth(kind, bias=True, **head))  # type: ignore[return-value]

    inputs = (views.hidden, views.perturbed, views.weight, views.bias)
    with tiles_of(3, 2):
        assert torch.autograd.gradcheck(library, inputs)
        assert torch.autograd.gradcheck(definition, inputs)
        for output in range(5):
            ours = torch.autograd.grad(library(*inputs)[output].sum(), inputs, allow_unused=True)
            plain = torch.autograd.grad(definition(*inputs)[output].sum(), inputs, allow_unused=True)
            for a, b in zip(ours, plain, strict=True):
                assert torch.allclose(a, torch.zeros_like(a) if b is None else b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_given_logits(backend_float64: str, kind: str) -> None:
    views = small_views()
    logits = [z.detach().requires_grad_() for z in views.logits()]

    def library(z_p: Tensor, z_q: Tensor) -> tuple[Tensor, ...]:
        head = dict(temperature=0.7, softcap=2.0, vocab_size=7)
        return tuple(divergence(z_p, z_q, targets=views.targets, kind=kind, backend=backend_float64, **head))  # type: ignore

    with tiles_of(3, 2):
        assert torch.autograd.gradcheck(library, logits)


def test_differentiable_once(backend_float64: str) -> None:
    views = small_views()
    (first,) = torch.autograd.grad(
        run(views, backend_float64).divergence.square().sum(), views.hidden, create_graph=True
    )
    with pytest.raises(RuntimeError, match="no autograd formula"):
        first.sum().backward()


@pytest.mark.parametrize("head", [{}, HEADS["all"]], ids=["plain", "head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_err_no_more_than_torch_in_the_same_dtype(
    backend: str, kind: str, dtype: torch.dtype, head: dict
) -> None:
    """Through each output alone and through all of them, for both hidden states, weight and bias."""
    rounded = make_views(rows=32, vocab=400, hidden_size=32, dtype=dtype, divergences=(1e-5, 5))
    rounded.targets %= 390
    head = {**head, "bias": True, "vocab_size": 390}
    ours, plain, exact = rounded.grad(), rounded.grad(), rounded.to(torch.float64).grad()
    # "plain" is what one writes: logits in the dtype of the model, softmaxes in float32
    plain_logits = (z.float() for z in plain.logits(**head))
    outputs = (
        run(ours, backend, kind=kind, **head),
        reference.divergence(*plain_logits, plain.targets, kind),
        exact.truth(kind, **head),
    )
    g = torch.Generator().manual_seed(5)
    weights = [torch.randn(32, generator=g) for _ in range(5)]
    for chosen in ([0], [1], [2], [3], [4], [0, 1, 2, 3, 4]):
        upstream = [weights[i] if i in chosen else None for i in range(5)]
        sets = []
        for outputs_of, views in zip(outputs, (ours, plain, exact), strict=True):
            loss = sum((upstream[i] * outputs_of[i]).sum() for i in chosen)  # type: ignore[operator]
            inputs = (views.hidden, views.perturbed, views.weight, views.bias)
            sets.append(torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True, materialize_grads=True))
        for name, a, b, truth in zip(("hidden", "perturbed", "weight", "bias"), *sets, strict=True):
            assert a.dtype == dtype
            # all of it, and the eight rows with the smallest divergences alone
            for part in (slice(None), slice(8)) if name in ("hidden", "perturbed") else (slice(None),):
                if truth[part].any():
                    assert relative_error(a[part], truth[part]) <= relative_error(b[part], truth[part]) + 1e-6, name
                else:
                    assert not a[part].any(), name


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_small_divergences_keep_their_digits(backend: str, kind: str) -> None:
    """The weight's gradient is of second order where the views are alike: what both views send it cancels."""
    views = make_views(rows=32, vocab=400, hidden_size=32, divergences=(1e-5, 1e-3))
    ours, plain, exact = views.grad(), views.grad(), views.to(torch.float64).grad()
    outputs = run(ours, backend, kind=kind), reference.divergence(*plain.logits(), kind=kind), exact.truth(kind)
    sets = [
        torch.autograd.grad(output.divergence.sum(), (of.hidden, of.perturbed, of.weight))
        for output, of in zip(outputs, (ours, plain, exact), strict=True)
    ]
    for a, b, truth in zip(*sets, strict=True):
        assert relative_error(a, truth) < 5e-5
        assert relative_error(a, truth) < relative_error(b, truth) / 2


# --- one-sample estimates


def test_sampled_divergences_by_their_formulas() -> None:
    p = torch.tensor([-0.1, -2.0, -1.0, -0.001, -30.0])
    q = torch.tensor([-3.0, -1.5, -1.0, -8.0, -0.5])
    d = (q - p).clamp(-20, 20)
    expected = {
        "k1": -d,
        "abs_k1": d.abs(),
        "k2": d * d / 2,
        "k3": d.exp() - d - 1,
        "prob_drop": p.exp() - q.exp(),
    }
    for kind, value in expected.items():
        assert torch.allclose(sampled_divergence(p, q, kind=kind, clamp=None), value, rtol=1e-5, atol=1e-6)
        assert torch.allclose(sampled_divergence(p, q, kind=kind), value.clamp(-10, 10), rtol=1e-5, atol=1e-6)
        assert sampled_divergence(p, q, kind=kind, clamp=0.5).abs().max() <= 0.5


def test_small_k3_keeps_its_digits_and_its_sign() -> None:
    d = torch.cat([torch.logspace(-7, 0, 500), -torch.logspace(-7, 0, 500)])
    got = sampled_divergence(torch.zeros_like(d), d)
    exact = torch.expm1(d.double()) - d.double()
    assert (got >= 0).all()
    assert ((got - exact).abs() <= 1e-6 * exact + 1e-7 * d.abs()).all()


def test_k3_is_an_unbiased_estimate_of_the_kl() -> None:
    z_p, z_q = (z[-1:].double() for z in make_views(rows=4, vocab=50, divergences=(0.1, 0.5)).logits())
    logp, logq = z_p.log_softmax(-1), z_q.log_softmax(-1)
    for kind in ("k1", "k3"):
        mean = (logp.exp() * sampled_divergence(logp, logq, kind=kind, clamp=None)).sum(-1)
        assert torch.allclose(mean, reference.kl(z_p, z_q), rtol=1e-9)


def test_gradient_of_sampled_divergences() -> None:
    p = torch.tensor([-0.5, -2.0, -1.0], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([-1.5, -1.0, -1.25], dtype=torch.float64, requires_grad=True)
    for kind in ("k1", "abs_k1", "k2", "k3", "prob_drop"):
        assert torch.autograd.gradcheck(lambda a, b, kind=kind: sampled_divergence(a, b, kind=kind), (p, q))
