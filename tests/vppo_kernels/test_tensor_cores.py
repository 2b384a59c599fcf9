"""16-bit operands on a GPU's tensor cores: what their roundings do at the widths of real models, emulated."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import pytest
import torch
from support.tensor_core import COMPILER, on_tensor_cores, product
from support.views import make_views, relative_error
from torch import Tensor

from benchmarks.inputs import Shape, make_weight
from benchmarks.inputs import make_views as realistic_views
from vppo_kernels import linear_divergence, linear_logprob, linear_vppo_loss, reference, tensor_cores
from vppo_kernels.backends import available
from vppo_kernels.reference import LOGPROB_BOUND, LOGPROB_BOUND_CUT, divergence_bound
from vppo_kernels.statistics import DivergenceOutput

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
VOCAB, ROWS, TOKENS = 1024, 8, 12


class Model(NamedTuple):
    """Both views `[ROWS, D]` and a head `[VOCAB, D]` in bfloat16, and both logits in float64."""

    hidden: Tensor
    perturbed: Tensor
    weight: Tensor
    z_p: Tensor
    z_q: Tensor


@pytest.fixture(scope="module", params=[3584, 5120], ids=["7B", "32B"])
def model(request: pytest.FixtureRequest) -> Model:
    weight = make_weight(Shape(VOCAB, request.param), torch.device("cpu"), torch.bfloat16)
    views = realistic_views(weight, ROWS)
    return Model(*views, weight, *(h.double() @ weight.double().T for h in views))


# --- the emulator


def dot(a: list[float], b: list[float]) -> float:
    return float(product(torch.tensor([a]), torch.tensor([b]).T))


def test_small_integers_are_exact() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = (
        torch.randint(-8, 9, (5, 100), generator=g).bfloat16(),
        torch.randint(-8, 9, (100, 37), generator=g).bfloat16(),
    )
    assert torch.equal(product(a, b).double(), a.double() @ b.double())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_what_lies_beyond_25_places_is_cut_off(sign: float) -> None:
    one, kept, lost = sign, sign * 2.0**-12, sign * 2.0**-13
    assert dot([one] + [kept] * 8, [1.0] + [2.0**-13] * 8) == sign * (1 + 2.0**-22)
    assert dot([one] + [lost] * 8, [1.0] + [2.0**-13] * 8) == sign  # rounded to nearest it were 1 + 2^-23
    # of two terms that cancel, one is cut off all the same
    assert dot([one, -one, lost], [1.0, 1.0, 2.0**-13]) == 0.0


def test_sixteen_products_are_added_at_once() -> None:
    """Small terms survive beside each other and are lost one by one to a sum that is large already."""
    small = [2.0**-12] * 16
    assert dot([*small, 1.0], [2.0**-12] * 16 + [1.0]) == 1 + 2.0**-20
    assert dot([1.0] + [0.0] * 15 + small, [1.0] + [0.0] * 15 + [2.0**-14] * 16) == 1.0
    assert dot(small, [2.0**-14] * 16) == 2.0**-22


def test_a_sum_goes_on_where_another_ends() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 64, generator=g).bfloat16(), torch.randn(64, 20, generator=g).bfloat16()
    assert torch.equal(product(a[:, 32:], b[32:], product(a[:, :32], b[:32])), product(a, b))


def test_the_result_is_cut_to_a_float32() -> None:
    assert dot([3.0, 2.0**-12], [1.0, 2.0**-11]) == 3.0  # 3 + 2^-23: to nearest, a tie


# --- the bounds


def worst_divergence(got: DivergenceOutput, kind: str, model: Model, cut: bool) -> float:
    truth = reference.divergence(model.z_p, model.z_q, kind=kind).divergence
    assert (got.divergence >= 0).all()
    return float(((got.divergence.double() - truth).abs() / divergence_bound(truth, cut)).max())


def multiplies(backend: str, kind: str) -> None:
    """Skip what has no products of its own: tiles of all backends but this one are multiplied by torch."""
    if backend != "torch" and (backend not in available("cpu") or kind == "jsd"):
        pytest.skip("multiplies nothing here")


@pytest.mark.parametrize("name", ["torch", "triton_fused", "native_fused"])
@pytest.mark.parametrize("kind", ["kl", "reverse_kl", "jsd"])
def test_divergences_hold_the_bound_of_their_precision(model: Model, kind: str, name: str) -> None:
    multiplies(name, kind)

    def run(precision: str) -> DivergenceOutput:
        with on_tensor_cores():
            return linear_divergence(*model[:3], kind=kind, precision=precision, backend=name, check=True)

    default, exact = run("default"), run("exact")
    assert worst_divergence(default, kind, model, cut=True) < 1
    assert worst_divergence(exact, kind, model, cut=False) < 1
    if kind == "kl":  # so this proves something
        assert worst_divergence(default, kind, model, cut=False) > 1.5
    entropy = [-(z.softmax(-1) * z.log_softmax(-1)).sum(-1) for z in (model.z_p, model.z_q)]
    for output, bound in ((default, LOGPROB_BOUND_CUT), (exact, LOGPROB_BOUND)):
        for value, truth in zip((output.entropy, output.entropy_perturbed), entropy, strict=True):
            assert float((value - truth).abs().max()) < bound


@pytest.mark.parametrize("name", ["torch", "triton_fused", "native_fused"])
def test_log_probabilities_hold_the_bound_of_their_precision(model: Model, name: str) -> None:
    """Of likely tokens and of all others, whose logits are rounded apart from the normaliser."""
    multiplies(name, "logprob")
    likely = model.z_p.topk(TOKENS // 2).indices
    tokens = torch.cat([likely, torch.linspace(0, VOCAB - 1, TOKENS // 2).long().expand(ROWS, -1)], 1)
    truth = model.z_p.log_softmax(-1).gather(1, tokens)
    hidden = model.hidden.unsqueeze(1).expand(-1, TOKENS, -1)
    errors = {}
    for precision in ("default", "exact"):
        with on_tensor_cores():
            got = linear_logprob(hidden, model.weight, tokens, precision=precision, backend=name, check=True)
        errors[precision] = float((got.logprobs - truth).abs().max())
    assert LOGPROB_BOUND < errors["default"] < LOGPROB_BOUND_CUT and errors["exact"] < LOGPROB_BOUND


def test_a_check_still_finds_what_is_wrong(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wider bound is that of cut sums, and no wider."""
    likely = int(model.z_p[0].argmax())
    with on_tensor_cores():
        mm = tensor_cores._mm
        monkeypatch.setattr(tensor_cores, "_mm", lambda a, b, out: (mm(a, b, out), out[0, likely].add_(0.01)))
        with pytest.raises(RuntimeError, match="check: divergence of row 0"):
            linear_divergence(*model[:3], backend="torch", check=True)


# --- gradients, and what they are made with


def gradients(views: Any, precision: str, upstream: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in (views.hidden, views.perturbed, views.weight)]
    value = linear_divergence(*leaves, precision=precision, backend="torch").divergence
    return torch.autograd.grad(value, leaves, upstream.to(value))


@pytest.mark.parametrize("precision", tensor_cores.PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_err_no_more_than_torch_in_the_same_dtype(dtype: torch.dtype, precision: str) -> None:
    views, upstream = make_views(rows=24, vocab=300, hidden_size=2000, dtype=dtype), torch.linspace(-1, 1, 24)
    with on_tensor_cores():
        got = gradients(views, precision, upstream)
    plain, exact = views.grad(), views.to(torch.float64).grad()
    expected = [
        torch.autograd.grad(reference.kl(*v.logits()), (v.hidden, v.perturbed, v.weight), upstream.to(v.hidden))
        for v in (plain, exact)
    ]
    for a, b, c in zip(got, *expected, strict=True):
        assert relative_error(a, c) <= relative_error(b, c) + 1e-6


def test_the_loss_takes_a_precision_too(model: Model) -> None:
    """And makes the same of it as from log-probabilities."""
    g = torch.Generator().manual_seed(0)
    targets, advantages = torch.randint(VOCAB, (2, 4), generator=g), torch.tensor([1.0, -1.0])
    mask = torch.ones(2, 4, dtype=torch.bool)
    hidden = model.hidden.view(2, 4, -1)
    for precision in tensor_cores.PRECISIONS:
        with on_tensor_cores():
            old = linear_logprob(hidden, model.weight, targets, precision=precision, backend="torch").logprobs
            _, metrics = linear_vppo_loss(
                hidden.detach().requires_grad_(), model.weight, targets, old, advantages, mask, precision=precision,
                backend="torch",
            )  # fmt: skip
        assert float(metrics["approx_kl"]) == 0.0  # to the bit: the loss has multiplied as the log-probabilities have
        assert float(metrics["ratio_mean"]) == 1.0


def test_products_are_added_in_place_or_beside(model: Model) -> None:
    results = []
    for add in (True, False):
        with on_tensor_cores(add):
            results.append(linear_divergence(*model[:3], precision="exact", backend="torch").divergence)
    assert torch.equal(*results)


def test_a_precision_that_is_none() -> None:
    views = make_views(rows=2, vocab=10, hidden_size=4)
    with pytest.raises(ValueError, match=r"precision: got 'high', takes one of \['default', 'exact'\]"):
        linear_divergence(views.hidden, views.perturbed, views.weight, precision="high")


# --- GPUs that do not multiply 16-bit operands into float32


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A GPU of which nothing is known yet."""
    monkeypatch.setattr(tensor_cores, "_on_gpu", lambda x: True)
    for name in ("_try", "_say_once"):
        getattr(tensor_cores, name).cache_clear()
    return monkeypatch


def refuse(message: str) -> Any:
    def raises(*_: Tensor) -> None:
        raise RuntimeError(message)

    return raises


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_is_refused_is_multiplied_in_float32_and_said_once(fresh: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    fresh.setattr(tensor_cores, "_mm", refuse("gemm input type and output type float is not supported for ROCm\nat x"))
    views = make_views(rows=12, vocab=300, hidden_size=900, dtype=dtype)
    truth = reference.kl(*views.to(torch.float64).logits())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            got = linear_divergence(views.hidden, views.perturbed, views.weight, backend="torch", check=True).divergence
    assert ((got - truth).abs() <= divergence_bound(truth)).all()
    assert [str(w.message) for w in said] == [
        f"{str(dtype)[6:]} operands are multiplied in float32, without tensor cores, which is many times slower: torch "
        "makes no float32 product of them here (gemm input type and output type float is not supported for ROCm)"
    ]


def test_half_precision_sums_are_named_as_the_reason(fresh: pytest.MonkeyPatch) -> None:
    """And asked for anew when the setting changes."""
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "allow_fp16_accumulation"):
        pytest.skip("this torch has no such setting")
    fresh.setattr(tensor_cores, "_mm", refuse("not supported with allowFP16AccumulationCuBLAS"))
    before, x = matmul.allow_fp16_accumulation, torch.ones(2, 2, dtype=torch.float16)
    try:
        matmul.allow_fp16_accumulation = True
        with pytest.warns(UserWarning, match=r"it does without torch\.backends\.cuda\.matmul\.allow_fp16_accumulation"):
            assert not tensor_cores.multiply(x, x)
    finally:
        matmul.allow_fp16_accumulation = before
    fresh.setattr(tensor_cores, "_mm", lambda a, b, out: None)
    fresh.setattr(tensor_cores, "_addmm_", lambda total, a, b: None)
    assert tensor_cores.multiply(x, x)


def test_memory_that_runs_out_is_no_refusal(fresh: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: Tensor) -> None:
        raise torch.OutOfMemoryError("no memory")

    fresh.setattr(tensor_cores, "_mm", out_of_memory)
    x = torch.ones(2, 2, dtype=torch.bfloat16)
    with pytest.raises(torch.OutOfMemoryError):
        tensor_cores.multiply(x, x)


@pytest.mark.parametrize("operation", ["divergence", "logprob", "loss"])
def test_a_float32_weight_beside_16_bit_hidden_states_is_said_once(fresh: pytest.MonkeyPatch, operation: str) -> None:
    views = make_views(rows=4, vocab=50, hidden_size=8)
    hidden, perturbed = views.hidden.bfloat16(), views.perturbed.bfloat16()

    def run(weight: Tensor) -> None:
        if operation == "divergence":
            linear_divergence(hidden, perturbed, weight, backend="torch")
        elif operation == "logprob":
            linear_logprob(hidden, weight, views.targets, backend="torch")
        else:
            rows = torch.zeros(2, 2)
            leaf = hidden.view(2, 2, -1).detach().requires_grad_()
            linear_vppo_loss(leaf, weight, views.targets.view(2, 2), rows, torch.ones(2), rows + 1, backend="torch")

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run(views.weight)
        run(views.weight)
    assert [str(w.message) for w in said] == [
        "weight: float32 beside bfloat16 hidden states is multiplied in float32, without tensor cores, which is many "
        "times slower; load the model in bfloat16, or pass weight.to(torch.bfloat16)"
    ]
