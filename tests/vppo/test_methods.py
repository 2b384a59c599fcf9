"""The methods' weights and PAPO's penalty against their published formulas, written out in float64 row by row."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vppo.methods import (
    cgpo_weights,
    papo_penalty,
    pgpo_weights,
    sampled_views,
    soft_mask_weights,
    vepo_scores,
    vepo_weights,
)
from vppo_kernels import linear_divergence, reference
from vppo_kernels.statistics import DivergenceOutput

WEIGHTS: dict[str, Callable[..., Tensor]] = {
    "pgpo": pgpo_weights,
    "vepo": vepo_weights,
    "soft mask": soft_mask_weights,
    "cgpo": cgpo_weights,
}
ALL: dict[str, Callable[..., Tensor]] = {**WEIGHTS, "vepo scores": vepo_scores, "papo": papo_penalty}
Array = np.ndarray


def some(
    seed: int, rows: int, tokens: int, dtype: torch.dtype = torch.float64, alike: bool = False
) -> tuple[DivergenceOutput, Tensor]:
    """Results of a sweep with NaN outside a mask that has holes; row 0 has no token, row 1 has one."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, tokens, generator=generator) < 0.7
    mask[0] = False
    if rows > 1:
        mask[1] = False
        mask[1, int(torch.randint(tokens, (1,), generator=generator))] = True
    fields = []
    for _ in range(5):
        values = torch.rand(rows, tokens, generator=generator, dtype=torch.float64).square() * 3
        if alike:
            values = values[:, :1].expand(-1, tokens)
        fields.append(torch.where(mask, values, math.nan).to(dtype))
    divergence, entropy, perturbed, p, q = fields
    return DivergenceOutput(divergence, entropy, perturbed, -p, -q), mask


def row_by_row(views: DivergenceOutput, mask: Tensor, formula: Callable[..., Array]) -> Tensor:
    """`formula` of each row's valid tokens alone."""
    expected = torch.zeros(mask.shape, dtype=torch.float64)
    for row, valid in enumerate(mask):
        if valid.any():
            fields = [field[row][valid].double().numpy() for field in views[:3]]
            expected[row, valid] = torch.from_numpy(np.asarray(formula(*fields)))
    return expected


def unit(x: Array) -> Array:
    return (x - x.min()) / max(x.max() - x.min(), 1e-12)


# -- the formulas, as they are printed ---------------------------------------------------------------------------------


def published_pgpo(s: Array, *_: Array, tau: float = 0.4, beta: float = 2.0, epsilon: float = 1e-12) -> Array:
    """Equations 4 to 7."""
    damped = np.log(1 + s)
    importance = (damped - damped.min()) / (damped.max() - damped.min() + epsilon)
    weight = np.array(
        [i / (tau + epsilon) if i < tau else 1 + beta * (i - tau) / (1 - tau + epsilon) for i in importance]
    )
    return weight * len(s) / weight.sum() if weight.sum() > 0 else np.ones_like(s)  # the equation is 0 / 0 there


def released_vepo_score(jsd: Array, h: Array, noisy: Array, alpha: float = 0.7) -> Array:
    """Score D."""
    return (1 - (1 - unit(jsd)) ** alpha * (1 - unit(np.abs(noisy - h))) ** (1 - alpha)) * unit(h)


def released_vepo_mask(jsd: Array, h: Array, noisy: Array, top: float = 0.2) -> Array:
    score = released_vepo_score(jsd, h, noisy)
    kept = np.zeros_like(score)
    kept[np.argsort(-score, kind="stable")[: math.ceil(round(top * len(score), 9))]] = 1
    return kept


def published_soft_mask(s: Array, *_: Array, target: float = 0.4) -> Array:
    """Appendix I."""
    z = (s - s.mean()) / (s.std() + 1e-12)

    def weight(c: float) -> Array:
        return np.asarray(1 / (1 + np.exp(-(z - c))))

    offsets = np.linspace(z.min() - 50, z.max() + 50, 3)
    for _ in range(200):  # "solved numerically"
        offsets[::2] = offsets[1:] if weight(offsets[1]).mean() > target else offsets[:2]
        offsets[1] = offsets[::2].mean()
    return weight(offsets[1])


def published_cgpo(views: DivergenceOutput, mask: Tensor, spans: Tensor, rho: float = 0.3, lam: float = 0.1) -> Tensor:
    """Steps 3 and 4 of the official description, with the released code's lower median."""
    places = [(i, t) for i, t in np.ndindex(*mask.shape) if mask[i, t]]

    def top(field: Tensor) -> set[tuple[int, int]]:
        count = math.ceil(round(rho * len(places), 9))
        return set(sorted(places, key=lambda place: -float(field[place]))[:count])

    response = {i: float(np.mean([float(views.divergence[j, t]) for j, t in places if j == i])) for i, _ in places}
    middle = sorted(response.values())[(len(response) - 1) // 2]
    mad = sorted(abs(s - middle) for s in response.values())[(len(response) - 1) // 2]
    alpha = {i: 1 + lam * math.tanh((s - middle) / (mad + 1e-8)) for i, s in response.items()}
    perceptive = top(views.divergence) | {place for place in places if spans[place]}
    reasoning = top(views.entropy)
    expected = torch.zeros(mask.shape, dtype=torch.float64)
    for place in places:
        expected[place] = alpha[place[0]] if place in perceptive else float(place in reasoning)
    return expected


# -- against them ------------------------------------------------------------------------------------------------------

shapes = given(seed=st.integers(0, 2**31), rows=st.integers(1, 6), tokens=st.integers(1, 12), alike=st.booleans())


@shapes
def test_pgpo(seed: int, rows: int, tokens: int, alike: bool) -> None:
    views, mask = some(seed, rows, tokens, alike=alike)
    weights = pgpo_weights(views, mask)
    torch.testing.assert_close(weights, row_by_row(views, mask, published_pgpo), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(weights.sum(1), mask.sum(1).double())


@shapes
def test_soft_mask(seed: int, rows: int, tokens: int, alike: bool) -> None:
    views, mask = some(seed, rows, tokens, alike=alike)
    weights = soft_mask_weights(views, mask)
    torch.testing.assert_close(weights, row_by_row(views, mask, published_soft_mask), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(weights.sum(1), 0.4 * mask.sum(1).double())


@shapes
def test_vepo(seed: int, rows: int, tokens: int, alike: bool) -> None:
    """The score, the mask, and that the mean over all tokens is the released mean over the selected ones."""
    views, mask = some(seed, rows, tokens, alike=alike)
    torch.testing.assert_close(vepo_scores(views, mask), row_by_row(views, mask, released_vepo_score))
    kept = row_by_row(views, mask, released_vepo_mask)
    weights = vepo_weights(views, mask)
    assert torch.equal(weights != 0, kept != 0)
    loss = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if mask.any():
        torch.testing.assert_close((loss * weights).sum() / mask.sum(), (loss * kept).sum() / kept.sum())


@shapes
def test_cgpo(seed: int, rows: int, tokens: int, alike: bool) -> None:
    views, mask = some(seed, rows, tokens, alike=alike)
    spans = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)) < 0.2
    if mask.any():
        expected = published_cgpo(views, mask, spans)
        torch.testing.assert_close(cgpo_weights(views, mask, spans), expected, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(
            cgpo_weights(views, mask), published_cgpo(views, mask, spans & False), rtol=1e-6, atol=1e-9
        )
    assert not cgpo_weights(views, mask & False, spans).any()


@pytest.mark.parametrize(
    ("name", "knobs", "formula"),
    [
        ("pgpo", {"threshold": 0.7, "boost": 0.5}, lambda *x: published_pgpo(*x, tau=0.7, beta=0.5)),
        ("soft mask", {"mean_weight": 0.9}, lambda *x: published_soft_mask(*x, target=0.9)),
        ("vepo scores", {"jsd_share": 1.0}, lambda *x: released_vepo_score(*x, alpha=1.0)),
        ("vepo scores", {"jsd_share": 0.0}, lambda *x: released_vepo_score(*x, alpha=0.0)),
    ],
)
def test_knobs(name: str, knobs: dict[str, float], formula: Callable[..., Array]) -> None:
    views, mask = some(3, 5, 9)
    torch.testing.assert_close(ALL[name](views, mask, **knobs), row_by_row(views, mask, formula), rtol=1e-6, atol=1e-9)


def test_knobs_of_choices() -> None:
    views, mask = some(3, 5, 9)
    kept = row_by_row(views, mask, lambda *x: released_vepo_mask(*x, top=0.5))
    assert torch.equal(vepo_weights(views, mask, keep_ratio=0.5) != 0, kept != 0)
    expected = published_cgpo(views, mask, mask & False, rho=0.6, lam=0.4)
    found = cgpo_weights(views, mask, perception_ratio=0.6, entropy_ratio=0.6, scale=0.4)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_an_image_that_moves_more_weighs_more() -> None:
    """PGPO and the soft mask keep the order of the dependency."""
    divergence = torch.tensor([[0.0, 0.3, 0.1, 2.0, 9.0]], dtype=torch.float64)
    views, mask = DivergenceOutput(divergence, divergence, divergence, None, None), torch.ones(1, 5)
    order = divergence[0].argsort()
    for weights in (pgpo_weights(views, mask), soft_mask_weights(views, mask)):
        assert (weights[0][order].diff() > 0).all()
    assert pgpo_weights(views, mask)[0, 0] == 0


def test_a_dependency_below_zero_is_none() -> None:
    """Estimates from one sample, as the probability drop, may be negative."""
    divergence = torch.tensor([[-2.0, 0.0, 1.0]])
    views = DivergenceOutput(divergence, divergence, divergence, None, None)
    weights = pgpo_weights(views, torch.ones(1, 3))
    torch.testing.assert_close(weights, torch.tensor([[0.0, 0.0, 3.0]]))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    """16 bits are read as they are and computed on in float32."""
    views, mask = some(5, 6, 12, dtype)
    found = ALL[name](views, mask)
    assert found.dtype == torch.float32
    double = DivergenceOutput(*(field.double() for field in views if field is not None))
    torch.testing.assert_close(found.double(), ALL[name](double, mask), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_padding_is_never_read(name: str) -> None:
    views, mask = some(7, 6, 12)
    clean = DivergenceOutput(*(torch.where(mask, field, 5.0) for field in views if field is not None))
    found = ALL[name](views, mask)
    assert torch.equal(found, ALL[name](clean, mask))
    assert torch.equal(found, ALL[name](views, mask.long()))
    assert not found[~mask].any()


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_have_no_gradient_and_leave_their_input(name: str) -> None:
    views, mask = some(9, 4, 8)
    before = [field.clone() for field in views if field is not None]
    views = DivergenceOutput(*(field.requires_grad_() for field in views if field is not None))
    assert not WEIGHTS[name](views, mask).requires_grad
    for field, same in zip(views, before, strict=True):
        assert torch.equal(torch.where(mask, field, 0), torch.where(mask, same, 0))


def test_rows_of_one_response_have_no_say_over_another() -> None:
    """PGPO, the soft mask and VEPO's choice are a response's own; a micro-batch changes nothing."""
    views, mask = some(11, 6, 12)
    for name in ("pgpo", "soft mask", "vepo scores"):
        whole = ALL[name](views, mask)
        for row in range(len(mask)):
            alone = DivergenceOutput(*(field[row : row + 1] for field in views if field is not None))
            torch.testing.assert_close(ALL[name](alone, mask[row : row + 1]), whole[row : row + 1])


# -- PAPO --------------------------------------------------------------------------------------------------------------


def test_papo_is_equation_2_with_its_gradient() -> None:
    """From hidden states, against the sums over the vocabulary; both views and the head have gradients."""
    generator = torch.Generator().manual_seed(0)
    clean, perturbed = (torch.randn(3, 5, 8, generator=generator).requires_grad_() for _ in range(2))
    weight = torch.randn(40, 8, generator=generator).requires_grad_()
    mask = torch.rand(3, 5, generator=generator) < 0.7
    upstream = torch.rand(3, 5, generator=generator)
    penalty = papo_penalty(
        linear_divergence(clean, perturbed, weight), mask, kl_coef=0.2, entropy_coef=0.3, entropy_perturbed_coef=0.5
    )
    (penalty * upstream).sum().backward()
    ours = [x.grad.double() for x in (clean, perturbed, weight) if x.grad is not None]

    leaves = [x.detach().double().requires_grad_() for x in (clean, perturbed, weight)]
    log_p, log_q = ((h @ leaves[2].T).log_softmax(-1) for h in leaves[:2])
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    entropies = [-(log.exp() * log).sum(-1) for log in (log_p, log_q)]
    expected = (-0.2 * kl + 0.3 * entropies[0] + 0.5 * entropies[1]) * mask
    (expected * upstream.double()).sum().backward()
    torch.testing.assert_close(penalty.double(), expected, rtol=1e-5, atol=1e-6)
    for found, leaf in zip(ours, leaves, strict=True):
        torch.testing.assert_close(found, leaf.grad, rtol=1e-4, atol=1e-5)


def test_papo_gradcheck() -> None:
    views, mask = some(13, 4, 5)
    leaves = [torch.where(mask, field, 0.7).requires_grad_() for field in views[:3]]

    def penalty(*fields: Tensor) -> Tensor:
        return papo_penalty(DivergenceOutput(*fields, None, None), mask, kl_coef=0.4)

    assert torch.autograd.gradcheck(penalty, leaves)


def test_papo_as_released() -> None:
    """`low_var_kl` and the means of `-log p`, as the actor of the released code has them."""
    generator = torch.Generator().manual_seed(1)
    log_probs, aug = (-3 * torch.rand(4, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    log_probs[0, 0], aug[0, 0] = -0.1, -30.0  # the clamp at -20
    log_probs[0, 1], aug[0, 1] = -9.0, -0.1  # the clamp at 10
    response = (torch.rand(4, 6, generator=generator) < 0.8).double()
    leaves = [x.clone().requires_grad_() for x in (log_probs, aug)]
    kl = (leaves[1] - leaves[0]).clamp(-20.0, 20.0)
    low_var_kl = (kl.exp() - kl - 1).clamp(-10.0, 10.0)

    def average(values: Tensor) -> Tensor:  # "token"; the mean of an entropy is the same
        return (values * response).sum() / response.sum()

    released = -0.01 * average(low_var_kl) + 0.03 * average(-leaves[0]) + 0.03 * average(-leaves[1])
    released.backward()

    ours = [x.clone().requires_grad_() for x in (log_probs, aug)]
    loss = papo_penalty(sampled_views(*ours), response).sum() / response.sum()
    loss.backward()
    torch.testing.assert_close(loss, released)
    for mine, theirs in zip(ours, leaves, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_papo_trains_a_head_to_look() -> None:
    """A few steps on a tiny head: the divergence rises, and with the entropies' weights both entropies fall."""
    generator = torch.Generator().manual_seed(2)
    clean, perturbed = (torch.randn(16, 6, generator=generator).requires_grad_() for _ in range(2))
    weight, mask = torch.randn(12, 6, generator=generator), torch.ones(1, 16)

    def sweep() -> DivergenceOutput:
        return linear_divergence(clean[None], perturbed[None], weight)

    before = sweep()
    optimizer = torch.optim.SGD([clean, perturbed], lr=1.0)
    for _ in range(5):
        optimizer.zero_grad()
        papo_penalty(sweep(), mask, kl_coef=0.05, entropy_coef=0.05, entropy_perturbed_coef=0.05).sum().backward()
        optimizer.step()
    after = sweep()
    assert after.divergence.mean() > before.divergence.mean()
    assert after.entropy.mean() < before.entropy.mean()
    assert after.entropy_perturbed.mean() < before.entropy_perturbed.mean()


# -- bad inputs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "knobs", "message"),
    [
        ("pgpo", {"threshold": 0.0}, "threshold: got 0.0, takes a number above 0 and below 1"),
        ("pgpo", {"threshold": 1.0}, "threshold: got 1.0"),
        ("pgpo", {"boost": -1.0}, "boost: got -1.0"),
        ("soft mask", {"mean_weight": 1.0}, "mean_weight: got 1.0"),
        ("soft mask", {"mean_weight": math.nan}, "mean_weight: got nan"),
        ("vepo", {"keep_ratio": 0.0}, "keep_ratio: got 0.0"),
        ("vepo", {"jsd_share": 1.1}, "jsd_share: got 1.1"),
        ("cgpo", {"perception_ratio": 2.0}, "perception_ratio: got 2.0"),
        ("cgpo", {"entropy_ratio": 0.0}, "entropy_ratio: got 0.0"),
        ("cgpo", {"scale": -0.1}, "scale: got -0.1"),
        ("papo", {"kl_coef": -0.1}, "kl_coef: got -0.1"),
        ("papo", {"entropy_coef": math.inf}, "entropy_coef: got inf"),
        ("papo", {"entropy_perturbed_coef": -1.0}, "entropy_perturbed_coef: got -1.0"),
    ],
)
def test_knobs_out_of_range(name: str, knobs: dict[str, float], message: str) -> None:
    views, mask = some(0, 3, 4)
    with pytest.raises(ValueError, match=message):
        ALL[name](views, mask, **knobs)


@pytest.mark.parametrize("name", ALL)
def test_bad_tensors(name: str) -> None:
    function: Any = ALL[name]
    views, mask = some(0, 3, 4)
    with pytest.raises(ValueError, match=r"mask: got shape \[3, 5\], takes \[3, 4\]"):
        function(views, torch.ones(3, 5))
    with pytest.raises(TypeError, match="divergence: got NoneType"):
        function(views._replace(divergence=None), mask)
    with pytest.raises(TypeError, match=r"divergence: got dtype torch\.int64"):
        function(views._replace(divergence=torch.ones(3, 4, dtype=torch.int64)), mask)
    with pytest.raises(ValueError, match=r"divergence: got shape \[12\], takes \[B, T\]"):
        function(views._replace(divergence=torch.ones(12)), mask)
    with pytest.raises(ValueError, match=r"divergence: got shape \[3, 0\], takes \[B, T\], T at least 1"):
        function(views._replace(divergence=torch.ones(3, 0)), torch.ones(3, 0))
    broken = views.divergence.clone()
    row, column = mask.nonzero()[-1].tolist()
    broken[row, column] = math.nan
    with pytest.raises(ValueError, match=rf"divergence: got NaN at row {row} "):
        function(views._replace(divergence=broken), mask)


@pytest.mark.parametrize("name", ["vepo", "papo", "cgpo"])
def test_other_fields_are_checked_too(name: str) -> None:
    views, mask = some(0, 3, 4)
    with pytest.raises(ValueError, match=r"mask: got shape \[3, 4\], takes \[3, 3\]"):
        ALL[name](views._replace(entropy=torch.ones(3, 3)), mask)


def test_evidence_is_checked() -> None:
    views, mask = some(0, 3, 4)
    with pytest.raises(ValueError, match=r"evidence: got shape \[3, 5\], takes \[3, 4\]"):
        cgpo_weights(views, mask, torch.ones(3, 5))


def test_reference_and_sweep_give_the_same_weights() -> None:
    """The weights of a sweep in float32 are those of the materialised definition in float64."""
    generator = torch.Generator().manual_seed(4)
    clean, perturbed = (torch.randn(3, 20, 8, generator=generator) for _ in range(2))
    weight, mask = torch.randn(50, 8, generator=generator), torch.ones(3, 20)
    for name, kind in (("pgpo", "kl"), ("soft mask", "kl"), ("vepo", "jsd")):
        plain = [h.double() @ weight.double().T for h in (clean, perturbed)]
        expected = WEIGHTS[name](reference.divergence(*plain, kind=kind), mask)
        found = WEIGHTS[name](linear_divergence(clean, perturbed, weight, kind=kind), mask)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
