"""Random values, strides, dtypes, threads and backends for the public kernels, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vppo_kernels import divergence, linear_divergence, linear_logprob, reference, tiling, topk_mask, topk_mask_
from vppo_kernels import vppo_loss as loss_of_tokens
from vppo_kernels.backends import available
from vppo_kernels.logits import LogitTransform
from vppo_kernels.reference import LOGPROB_BOUND, divergence_bound
from vppo_kernels.verify import exact_logits, magnitude, rounding
from vppo_kernels.vocab_parallel import Shard

pytestmark = pytest.mark.fuzz

Repeat = Callable[[Callable[[], None]], None]
INF, EPS = math.inf, torch.finfo(torch.float32).eps
SPECIAL = (0.0, -0.0, 1e-45, -1e-40, 1e-38, 1.0, 50.0, -90.0, 1e4, -1e4)
SIZES = st.sampled_from([0.0, 1e-40, 1e-6, 0.1, 1.0, 5.0, 30.0, 1e4])
FAST = [name for name in available("cpu") if not name.startswith("triton")]
BACKENDS = st.integers(0, 49).flatmap(
    lambda n: st.sampled_from(FAST if n else available("cpu"))
)  # interpreting is slow
KINDS = st.one_of(
    st.sampled_from([dict(kind=kind) for kind in ("kl", "reverse_kl", "jsd")]),
    st.floats(0, 1).map(lambda beta: dict(kind="jsd", beta=beta)),
)
DTYPES = st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16])
LAYOUTS = st.sampled_from(["contiguous", "transposed", "sliced", "expanded", "negated"])
ROUND = settings(
    max_examples=40, deadline=None, derandomize=False, database=None, print_blob=True,
    phases=[Phase.generate], suppress_health_check=list(HealthCheck),
)  # fmt: skip


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers (of "expanded", the first row's) in another place of memory."""
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "sliced":
        return torch.nn.functional.pad(x, (3, 2, 1, 1), value=math.nan)[1:-1, 3:-2]
    if layout == "expanded":
        return x[:1].expand_as(x)
    if layout == "negated":
        return torch._neg_view(-x)
    return x


def numbers(draw: st.DrawFn, rows: int, columns: int, size: float | None = None) -> Tensor:
    """`[rows, columns]` of one size, with special numbers strewn in."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(rows, columns, generator=g) * (draw(SIZES) if size is None else size)
    if draw(st.booleans()):
        special = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), x.shape, generator=g)]
        x = torch.where(torch.rand(x.shape, generator=g) < 0.1, special, x)
    return x


def mask(draw: st.DrawFn, rows: int, columns: int) -> Tensor:
    """Some words, or a run of them that may fill tiles; never all of a row."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    masked = torch.rand(rows, columns, generator=g) < draw(st.sampled_from([0.0, 0.0, 0.1, 0.9]))
    if draw(st.booleans()):
        first = draw(st.integers(0, columns - 1))
        masked[:, first : first + draw(st.integers(0, columns))] = True
    masked[:, draw(st.integers(0, columns - 1))] = False
    return masked


@contextmanager
def machine(draw: st.DrawFn) -> Iterator[None]:
    """A number of threads, and tiles of any shape."""
    rows, columns = draw(st.integers(1, 8)), draw(st.sampled_from([5, 16, 64, 200]))

    def chosen(source: Any, *_: Any, **__: Any) -> tiling.Tiling:
        return tiling.Tiling(min(rows, max(source.rows, 1)), min(columns, max(source.columns, 1)))

    threads = torch.get_num_threads()
    torch.set_num_threads(draw(st.sampled_from([1, 2])))
    try:
        with mock.patch.object(tiling, "choose_tiling", chosen):
            yield
    finally:
        torch.set_num_threads(threads)


def assert_within(got: Any, truth: Any, slack: Tensor) -> None:
    for name, value, exact in zip(truth._fields, got, truth, strict=True):
        moved = slack * exact.clamp_min(0).sqrt() + slack**2 if name == "divergence" else slack
        bound = divergence_bound(exact) if name == "divergence" else LOGPROB_BOUND
        allowed = bound + moved + exact.abs() * EPS
        right = torch.where(torch.isinf(exact), value == exact, (value.double() - exact).abs() <= allowed)
        assert right.all(), (name, value[~right], exact[~right], allowed[~right])
    if hasattr(truth, "divergence"):
        assert (got.divergence >= 0).all()


def gradients(outputs: Any, leaves: list[Tensor]) -> list[Tensor]:
    """Of the outputs that are finite."""
    total = sum(torch.where(torch.isinf(x), 0.0, x).sum() for x in outputs)
    return list(torch.autograd.grad(total, leaves))  # type: ignore[arg-type]


def test_divergence_of_logits(for_a_while: Repeat) -> None:
    @ROUND
    @given(st.data())
    def examples(data: st.DataObject) -> None:
        draw, kind, backend = data.draw, data.draw(KINDS), data.draw(BACKENDS)
        rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 70))
        z_p = numbers(draw, rows, columns)
        z_q = draw(st.sampled_from([0.0, 1.0])) * z_p + numbers(draw, rows, columns) + draw(SIZES)
        both, dtype = mask(draw, rows, columns), draw(DTYPES)
        masks = (both, both) if draw(st.booleans()) else (both, mask(draw, rows, columns))
        views = [
            laid_out(z.masked_fill(m, -INF).to(dtype), draw(LAYOUTS)) for z, m in zip((z_p, z_q), masks, strict=True)
        ]
        targets = torch.randint(columns, (rows,), generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
        transform = draw(st.sampled_from([{}, {}, dict(temperature=0.7), dict(temperature=2.0, softcap=30.0)]))
        exact = [z.detach().double().requires_grad_() for z in views]
        finished = [reference.transform(z, **transform) for z in exact]
        truth = reference.divergence(*finished, targets, **kind)
        leaves = [z.detach().requires_grad_() for z in views]
        with machine(draw):
            got = divergence(*leaves, targets=targets, backend=backend, **kind, **transform)
            found = gradients(got, leaves)
        slack = rounding(*(z.detach() for z in finished)) if transform else torch.zeros(rows)
        assert_within(got, truth, slack)
        plain = [z.detach().float().requires_grad_() for z in views]
        textbook = gradients(
            reference.divergence(*(reference.transform(z, **transform) for z in plain), targets, **kind), plain
        )
        for ours, right, theirs in zip(found, gradients(truth, exact), textbook, strict=True):
            narrow = 2**-8 if dtype == torch.bfloat16 else 2**-11 if dtype == torch.float16 else 1e-6
            allowed = (theirs.double() - right).norm() + narrow * right.norm() + 1e-5
            assert (ours.double() - right).norm() <= allowed, (ours, right)

    for_a_while(examples)


def test_divergence_and_logprob_of_hidden_states(for_a_while: Repeat) -> None:
    @ROUND
    @given(st.data())
    def examples(data: st.DataObject) -> None:
        draw, kind, backend = data.draw, data.draw(KINDS), data.draw(BACKENDS)
        rows, columns, depth = draw(st.integers(1, 6)), draw(st.integers(1, 70)), draw(st.integers(1, 40))
        dtype, size = draw(DTYPES), st.sampled_from([0.0, 1e-3, 1.0, 6.0])
        hidden = laid_out(numbers(draw, rows, depth, draw(size)).clamp(-100, 100).to(dtype), draw(LAYOUTS))
        change = laid_out(numbers(draw, rows, depth, draw(size)).clamp(-100, 100).to(dtype), draw(LAYOUTS))
        perturbed = change if draw(st.booleans()) else hidden + 0.01 * change
        weight = laid_out(numbers(draw, columns, depth, depth**-0.5).clamp(-100, 100).to(dtype), draw(LAYOUTS))
        bias = numbers(draw, 1, columns, 1.0)[0].masked_fill(mask(draw, 1, columns)[0], -INF)
        targets = torch.randint(columns, (rows,), generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
        options = draw(st.sampled_from([{}, dict(temperature=0.7), dict(logit_scale=0.5, softcap=20.0)]))
        transform, shard = LogitTransform(**options), Shard(0, columns, columns, columns)
        leaves = [x.detach().requires_grad_() for x in (hidden, perturbed, weight, bias)]
        with machine(draw):
            got = linear_divergence(*leaves, targets=targets, backend=backend, **kind, **options)
            single = linear_logprob(leaves[0], leaves[2], targets, leaves[3], backend=backend, **options)
            found = gradients([*got, *single], leaves)
            again = linear_divergence(*leaves, targets=targets, backend=backend, **kind, **options)
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
        z = [exact_logits(h, weight, bias, transform, shard) for h in (hidden, perturbed)]
        terms = torch.stack([magnitude(h, weight, bias, transform, shard) for h in (hidden, perturbed)]).amax(0)
        assert_within(got, reference.divergence(*z, targets, **kind), rounding(*z, terms=terms))
        assert_within(single, reference.logprob_output(z[0], targets), rounding(z[0], terms=terms))
        assert all(torch.isfinite(g).all() for g in found)
        assert not found[3][bias == -INF].any() or "softcap" in options

    for_a_while(examples)


def test_selection_and_loss(for_a_while: Repeat) -> None:
    @ROUND
    @given(st.data())
    def examples(data: st.DataObject) -> None:
        draw, backend = data.draw, data.draw(BACKENDS)
        rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 70))
        scores = laid_out(numbers(draw, rows, columns), draw(LAYOUTS))
        valid = laid_out(mask(draw, rows, columns).float(), draw(LAYOUTS)).bool()
        ratio = draw(st.sampled_from([0.01, 0.1, 0.4, 0.5, 1.0]))
        advantages, old = numbers(draw, rows, columns, 1.0), numbers(draw, rows, columns, 1.0).abs().neg()
        logprobs = (old + numbers(draw, rows, columns, 0.3)).requires_grad_()
        expected = reference.topk_mask(scores, valid, ratio)
        with machine(draw):
            keep = topk_mask(scores, valid, ratio, backend=backend)
            written = topk_mask_(scores.clone(), valid, ratio, backend=backend)
            loss, _ = loss_of_tokens(logprobs, old, advantages, valid, loss_agg="none", backend=backend)
            (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
        assert torch.equal(keep, expected) and torch.equal(written, expected.to(written.dtype))
        exact = logprobs.detach().double().requires_grad_()
        truth = torch.where(valid, reference.clipped_loss(exact, old.double(), advantages.double()), 0.0)
        (right,) = torch.autograd.grad(truth.sum(), exact)
        assert ((loss.double() - truth).abs() <= 1e-5 * truth.abs() + 1e-6).all()
        near = (logprobs.detach() - old).exp()
        settled = ((near - 0.8).abs() > 1e-5) & ((near - 1.28).abs() > 1e-5)  # where rounding does not decide the clip
        settled &= ((logprobs.detach() - old).abs() - 20).abs() > 1e-4
        assert ((gradient.double() - right).abs() <= 1e-5 * right.abs() + 1e-6)[settled].all()

    for_a_while(examples)
