"""A student and a teacher, each with a head of its own, against the definitions in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from support.heads import NAMES, Heads, make_heads
from support.views import (
    PeakMemory,
    counted_products,
    make_views,
    poisoned_buffers,
    relative_error,
    tiles_of,
    worst,
)
from torch import Tensor

from vppo_kernels import linear_divergence, reference, workspace_limit
from vppo_kernels.statistics import DivergenceOutput
from vppo_kernels.tiling import MIB

KINDS: dict[str, dict[str, Any]] = {
    "kl": dict(kind="kl"),
    "reverse_kl": dict(kind="reverse_kl"),
    "jsd": dict(kind="jsd"),
    "jsd 0.1": dict(kind="jsd", beta=0.1),
    "topk": dict(kind="topk", k=5),
}
OF_KIND = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
OPTIONS = dict(temperature=0.8, logit_scale=1.2, softcap=25.0)
OPTIONS_OTHER = dict(temperature_other=1.1, logit_scale_other=0.9, softcap_other=math.inf)


def run(heads: Heads, backend: str, **options: Any) -> DivergenceOutput:
    return linear_divergence(
        heads.student, heads.teacher, heads.weight, heads.bias, weight_other=heads.weight_other,
        bias_other=heads.bias_other, targets=heads.targets, vocab_size=heads.vocab_size, backend=backend, **options,
    )  # fmt: skip


@OF_KIND
@pytest.mark.parametrize(
    ("dtype", "dtype_other"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
def test_every_output_is_within_its_bound(
    backend: str, dtype: torch.dtype, dtype_other: torch.dtype, kind: dict
) -> None:
    heads = make_heads(dtype=dtype, dtype_other=dtype_other)
    got, truth = run(heads, backend, **kind), heads.truth(kind)
    assert worst(got, truth) < 1
    assert all(output.dtype == torch.float32 for output in got) and (got.divergence >= 0).all()
    assert truth.divergence.min() < 1e-3 and truth.divergence.max() > 0.2


@OF_KIND
@pytest.mark.parametrize("widths", [(32, 48), (48, 32), (8, 200)], ids=str)
def test_other_options_and_another_padding_are_within_the_bound(
    backend: str, kind: dict, widths: tuple[int, int]
) -> None:
    """What stands in the padding, here NaN, is never read."""
    heads = make_heads(width=widths[0], width_other=widths[1], padding=(24, 152))
    got = run(heads, backend, **kind, check=True, **OPTIONS, **OPTIONS_OTHER)
    assert worst(got, heads.truth(kind, OPTIONS, OPTIONS_OTHER)) < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_exact_products_leave_less_error_and_the_same_gradients(backend: str, dtype: torch.dtype) -> None:
    """On widths and logits at which the rounding of products in float32 shows."""
    heads = make_heads(rows=24, vocab=700, width=512, width_other=768, dtype=dtype)
    truth, errors, sets = heads.truth(KINDS["kl"]), {}, []
    for precision in ("default", "exact"):
        leaves = heads.grad()
        output = run(leaves, backend, precision=precision, check=True)
        off = (output.divergence.detach().double() - truth.divergence).abs()
        errors[precision] = float((off / reference.divergence_bound(truth.divergence)).max())
        sets.append(torch.autograd.grad(output.divergence.sum(), list(leaves.tensors().values())[:4]))
    assert errors["exact"] < min(0.5, errors["default"]), errors
    for a, b in zip(*sets, strict=True):
        assert relative_error(a, b.double()) < (1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_directions_are_not_confused(backend: str) -> None:
    heads = make_heads(rows=16, divergences=(0.1, 3))
    forward, reverse = run(heads, backend), run(heads, backend, kind="reverse_kl")
    swapped = run(
        Heads(heads.teacher, heads.student, heads.weight_other, heads.bias_other, heads.weight, heads.bias,
              heads.targets, heads.vocab_size),
        backend,
    )  # fmt: skip
    assert torch.equal(reverse.divergence, swapped.divergence)
    assert not torch.allclose(reverse.divergence, forward.divergence, rtol=1e-2)
    for a, b in zip(forward[1:], reverse[1:], strict=True):
        assert torch.equal(a, b)


@OF_KIND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_tensor_for_both_heads_is_the_path_of_one_head_to_the_bit(
    backend: str, dtype: torch.dtype, kind: dict
) -> None:
    views, results = make_views(rows=24, vocab=300, dtype=dtype), []
    for more in ({}, dict(weight_other=True, temperature_other=0.9, softcap_other=20.0), dict(softcap_other=20.0)):
        leaves = views.grad()
        if "weight_other" in more:
            more = {**more, "weight_other": leaves.weight, "bias_other": leaves.bias}
        got = linear_divergence(
            leaves.hidden, leaves.perturbed, leaves.weight, leaves.bias, targets=views.targets, **kind,
            temperature=0.9, softcap=20.0, backend=backend, **more,  # type: ignore[arg-type]
        )  # fmt: skip
        inputs = (leaves.hidden, leaves.perturbed, leaves.weight, leaves.bias)
        results.append([*got, *torch.autograd.grad(sum(x.sum() for x in got), inputs)])  # type: ignore[arg-type]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@OF_KIND
def test_one_weight_under_two_temperatures(backend: str, kind: dict) -> None:
    views = make_views(rows=24, vocab=300)
    leaves, exact = views.grad(), views.to(torch.float64).grad()
    got = linear_divergence(
        leaves.hidden, leaves.perturbed, leaves.weight, leaves.bias, **kind, temperature_other=2.0, backend=backend
    )
    z = (
        reference.logits(exact.hidden, exact.weight, exact.bias),
        reference.logits(exact.perturbed, exact.weight, exact.bias, temperature=2.0),
    )
    truth = reference.divergence(*z, **kind)
    assert worst(got, truth) < 1
    sets = [
        torch.autograd.grad(output.divergence.sum(), (of.hidden, of.perturbed, of.weight, of.bias))
        for output, of in ((got, leaves), (truth, exact))
    ]
    for a, b in zip(*sets, strict=True):
        assert relative_error(a, b) < 1e-5


# --- gradients


@pytest.mark.parametrize("options", [{}, {**OPTIONS, **OPTIONS_OTHER}], ids=["plain", "options"])
@OF_KIND
def test_gradcheck(backend_float64: str, kind: dict, options: dict) -> None:
    heads = make_heads(4, 7, 3, 5, padding=(1, 2), dtype=torch.float64, divergences=(0.1, 3)).grad()

    def library(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = replace(heads, **dict(zip(NAMES, tensors, strict=True)))
        return tuple(run(given, backend_float64, **kind, **options))

    inputs = [x.detach().nan_to_num(1.0).requires_grad_() for x in heads.tensors().values()]
    with tiles_of(3, 2):
        assert torch.autograd.gradcheck(library, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@OF_KIND
def test_gradients_err_no_more_than_torch_in_the_same_dtype(backend: str, kind: dict, dtype: torch.dtype) -> None:
    """Through each output alone and through all, for what either side has; with a teacher of another dtype too."""
    for dtype_other in {dtype, torch.float32}:
        heads = make_heads(rows=32, vocab=400, dtype=dtype, dtype_other=dtype_other, divergences=(1e-3, 5))
        ours, plain, exact = heads.grad(), heads.grad(), heads.double().grad()
        outputs = (
            run(ours, backend, **kind, **OPTIONS, **OPTIONS_OTHER),
            reference.divergence(*(z.float() for z in plain.logits(OPTIONS, OPTIONS_OTHER)), plain.targets, **kind),
            exact.truth(kind, OPTIONS, OPTIONS_OTHER),
        )
        upstream = torch.randn(5, 32, generator=torch.Generator().manual_seed(5))
        for chosen in ([0], [1], [2], [3], [4], [0, 1, 2, 3, 4]):
            sets = []
            for output, of in zip(outputs, (ours, plain, exact), strict=True):
                loss = sum((upstream[i] * output[i]).sum() for i in chosen)  # type: ignore[operator]
                sets.append(torch.autograd.grad(loss, list(of.tensors().values()), retain_graph=True, allow_unused=True,
                                                materialize_grads=True))  # fmt: skip
            for name, a, b, truth in zip(NAMES, *sets, strict=True):
                assert a.dtype == getattr(heads, name).dtype
                if truth.any():
                    assert relative_error(a, truth) <= relative_error(b, truth) + 1e-6, (chosen, name)
                else:
                    assert not a.any(), (chosen, name)


@OF_KIND
def test_a_frozen_teacher_costs_no_product(backend: str, kind: dict) -> None:
    """The student's gradient alone: three products of either view's logits, or of the student's gradient."""
    heads = make_heads(rows=32, vocab=256, width=16, width_other=64)
    both, alone = heads.grad(), heads.grad(("student", "weight"))
    output = run(both, backend, **kind)
    expected = torch.autograd.grad(output.divergence.sum(), (both.student, both.weight))
    output = run(alone, backend, **kind)
    with counted_products() as products:
        got = torch.autograd.grad(output.divergence.sum(), (alone.student, alone.weight))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    student, teacher = 32 * 256 * 16, 32 * 256 * 64
    assert sum(products) == 3 * student + teacher


def test_rows_without_gradient_are_left_out(backend: str) -> None:
    heads = make_heads(rows=32, vocab=256, width=16, width_other=64)
    leaves = heads.grad(("student", "teacher", "weight_other"))
    keep = torch.arange(32) % 4 == 0
    output = run(leaves, backend)
    with counted_products() as products:
        got = torch.autograd.grad(
            (output.divergence * keep).sum(), (leaves.student, leaves.teacher, leaves.weight_other)
        )
    student, teacher = 8 * 256 * 16, 8 * 256 * 64
    assert sum(products) == 2 * student + 3 * teacher
    exact = heads.double().grad()
    truth = torch.autograd.grad(
        (exact.truth(KINDS["kl"]).divergence * keep).sum(), (exact.student, exact.teacher, exact.weight_other)
    )
    for a, b in zip(got, truth, strict=True):
        assert relative_error(a, b) < 1e-5
    assert not got[0][~keep].any() and not got[1][~keep].any()


def test_no_rows_and_no_upstream_gradient(backend: str) -> None:
    for rows, factor in ((0, 1.0), (5, 0.0)):
        heads = make_heads(rows=5, vocab=20, width=4, width_other=6)
        empty = replace(heads, student=heads.student[:rows], teacher=heads.teacher[:rows], targets=heads.targets[:rows])
        leaves = empty.grad()
        output = run(leaves, backend, kind="topk", k=30)
        assert output.divergence.shape == (rows,)
        for grad, x in zip(
            torch.autograd.grad((factor * output.divergence).sum(), list(leaves.tensors().values())),
            leaves.tensors().values(),
            strict=True,
        ):
            assert grad.shape == x.shape and not grad.any()


def test_float64_beside_other_dtypes(backend_float64: str) -> None:
    """One side in float64 makes all of it float64."""
    heads = make_heads(rows=9, vocab=60, width=8, width_other=12, dtype=torch.float64, dtype_other=torch.bfloat16)
    leaves, exact = heads.grad(), heads.double().grad()
    for kind in KINDS.values():
        got, truth = run(leaves, backend_float64, **kind), exact.truth(kind)
        for a, b in zip(got, truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        sets = [
            torch.autograd.grad(output.divergence.sum(), (of.student, of.weight, of.teacher, of.weight_other))
            for output, of in ((got, leaves), (truth, exact))
        ]
        for a, b in zip(*sets, strict=True):
            assert relative_error(a, b) < (1e-9 if a.dtype == torch.float64 else 2**-8)


# --- shapes, memory, masked words


@settings(max_examples=25, deadline=None)
@drawn(
    rows=st.integers(1, 9),
    vocab=st.integers(1, 70),
    width=st.integers(1, 9),
    width_other=st.integers(1, 9),
    padding=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    tile=st.tuples(st.integers(1, 9), st.integers(1, 70)),
    kind=st.sampled_from(list(KINDS.values())),
    seed=st.integers(0, 99),
)
def test_any_shape(
    backend: str, rows: int, vocab: int, width: int, width_other: int, padding: tuple[int, int],
    tile: tuple[int, int], kind: dict, seed: int,
) -> None:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    normal = [torch.randn(*shape, generator=g) for shape in ((rows, width), (rows, width_other), (vocab, width))]
    normal += [torch.randn(vocab, generator=g), torch.randn(vocab, width_other, generator=g)]
    student, teacher, weight, bias, weight_other = normal
    pad = torch.nn.functional.pad
    heads = Heads(
        student, teacher, pad(weight, (0, 0, 0, padding[0])), pad(bias, (0, padding[0])),
        pad(weight_other, (0, 0, 0, padding[1])), pad(bias, (0, padding[1])),
        torch.randint(vocab, (rows,), generator=g), vocab,
    ).grad()  # fmt: skip
    exact = heads.double().grad()
    with tiles_of(*tile), poisoned_buffers():
        got = run(heads, backend, **kind)
        grads = torch.autograd.grad(sum(x.sum() for x in got), list(heads.tensors().values()))  # type: ignore[arg-type]
    truth = exact.truth(kind)
    assert worst(got, truth) < 1
    expected = torch.autograd.grad(sum(x.sum() for x in truth), list(exact.tensors().values()))  # type: ignore[arg-type]
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "precision"),
    [*((kind, "default") for kind in KINDS.values()), (KINDS["kl"], "exact")],
    ids=[*KINDS, "kl, exact"],
)
def test_the_workspace_holds_for_both_heads(backend: str, kind: dict, precision: str) -> None:
    heads = make_heads(rows=200, vocab=1500, width=64, width_other=160, dtype=torch.bfloat16, dtype_other=torch.float32)
    for wanted in (("student", "weight"), NAMES):
        leaves = heads.grad(wanted)
        inputs = [x for x in leaves.tensors().values() if x.requires_grad]
        with workspace_limit(MIB), PeakMemory() as memory:
            output = run(leaves, backend, precision=precision, **kind)
            grads = torch.autograd.grad(output.divergence.sum(), inputs)
        assert memory.peak - sum(g.nbytes for g in grads) <= MIB, (kind, wanted)


def test_words_that_one_head_alone_masks(backend: str) -> None:
    heads = make_heads(rows=12, vocab=100)
    heads.bias_other[5] = -torch.inf
    for name, kind in KINDS.items():
        got, truth = run(heads, backend, **kind, check=True), heads.truth(kind)
        assert torch.isinf(got.divergence).all() == (name == "kl")
        leaves, exact = heads.grad(), heads.double().grad()
        outputs = [run(leaves, backend, **kind)[1:4], exact.truth(kind)[1:4]]
        if name != "kl":
            assert worst(got._replace(logprobs_perturbed=None), truth) < 1
            outputs = [run(leaves, backend, **kind)[:4], exact.truth(kind)[:4]]
        sets = [
            torch.autograd.grad(sum(x.sum() for x in output), list(of.tensors().values()))  # type: ignore[arg-type]
            for output, of in zip(outputs, (leaves, exact), strict=True)
        ]
        for field, a, b in zip(NAMES, *sets, strict=True):
            assert relative_error(a, b) < 1e-5, (name, field)


def test_leading_dimensions_are_kept(backend: str) -> None:
    heads = make_heads(rows=24, vocab=300)
    flat = run(heads, backend)
    shaped = replace(
        heads,
        student=heads.student.view(2, 3, 4, -1),
        teacher=heads.teacher.view(2, 3, 4, -1),
        targets=heads.targets.view(2, 3, 4),
    )
    for a, b in zip(run(shaped, backend), flat, strict=True):
        assert a.shape == (2, 3, 4) and torch.equal(a.flatten(), b)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_torch_compile_sees_no_break(backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()

    def loss(student: Tensor, teacher: Tensor, weight: Tensor, weight_other: Tensor, targets: Tensor) -> Tensor:
        got = linear_divergence(
            student, teacher, weight, weight_other=weight_other, targets=targets, temperature_other=0.9, vocab_size=55,
            backend=backend,
        )  # fmt: skip
        return (got.divergence + got.logprobs).sum() + got.entropy_perturbed.mean()  # type: ignore[operator]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (10, 13) if dynamic else (10,):
        results = []
        for function in (loss, compiled):
            heads = make_heads(rows, 60, 8, 12).grad()
            inputs = (heads.student, heads.teacher, heads.weight, heads.weight_other)
            value = function(*inputs, heads.targets % 55)
            results.append((value, *torch.autograd.grad(value, inputs)))
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)


# --- wrong arguments


def test_wrong_arguments_are_named() -> None:
    heads = make_heads(rows=4, vocab=20, width=4, width_other=6)
    given: dict[str, Any] = dict(
        hidden=heads.student, hidden_perturbed=heads.teacher, weight=heads.weight, weight_other=heads.weight_other
    )
    for change, error, words in (
        (dict(weight_other=None), ValueError, r"hidden_perturbed: got shape \[4, 6\], takes \[..., 4\]"),
        (dict(weight_other=heads.weight), ValueError, r"hidden_perturbed: got shape \[4, 6\], takes \[..., 4\]"),
        (dict(weight_other=heads.weight_other[:19]), ValueError, "weight_other: got 19 rows, takes the 20 of weight"),
        (dict(vocab_size=21), ValueError, "vocab_size: got 21, takes None or an integer from 1 to 20"),
        (
            dict(weight_other=heads.weight_other[:19], vocab_size=20),
            ValueError,
            "from 1 to 19 .the vocabulary that weight_other holds",
        ),
        (dict(hidden_perturbed=heads.teacher[:3]), ValueError, r"hidden_perturbed: got shape \[3, 6\], takes \[4, 6\]"),
        (dict(weight_other=heads.weight_other.long()), TypeError, "weight_other: got dtype torch.int64"),
        (dict(weight_other=heads.weight_other[0]), ValueError, r"weight_other: got shape \[6\], takes \[V, D\]"),
        (dict(weight_other=heads.weight_other.to("meta")), ValueError, "hidden_perturbed: got device cpu, takes meta"),
        (dict(bias_other=heads.bias[:19]), ValueError, r"bias_other: got shape \[19\], takes \[20\]"),
        (dict(weight_other=None, bias_other=heads.bias), ValueError, "bias_other: got a tensor without weight_other"),
        (dict(kind="jsd", beta=1.5), ValueError, "beta: got 1.5, takes a number from 0 to 1"),
        (dict(kind="topk"), ValueError, "k: got None, takes an integer of at least 1"),
        (dict(kind="topk", k=0), ValueError, "k: got 0, takes an integer of at least 1"),
        (dict(k=3), ValueError, "k: got 3, takes None with kind 'kl'"),
        (dict(temperature_other=0.0), ValueError, "temperature_other: got 0.0"),
        (dict(logit_scale_other=math.nan), ValueError, "logit_scale_other: got nan"),
        (dict(softcap_other=-1.0), ValueError, "softcap_other: got -1.0"),
        (dict(temperature_other=1e-31), ValueError, "temperature_other: got 1e-31, takes a number for which"),
    ):
        with pytest.raises(error, match=words):
            linear_divergence(**{**given, **change})
    heads.weight_other[3, 1] = math.nan
    with pytest.raises(ValueError, match="weight_other: got NaN at row 3"):
        linear_divergence(**given, check=True)
