"""The native product of bfloat16 operands against float64."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support.views import make_views, worst
from torch import Tensor

from vppo_kernels import linear_divergence, linear_logprob, reference
from vppo_kernels.backends import available, native_library

if "native" not in available():
    pytest.skip(native_library.missing("cpu"), allow_module_level=True)

from vppo_kernels.backends import native

if not native.has_product():
    pytest.skip("this processor does not multiply bfloat16", allow_module_level=True)

product = native.product
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def one_thread_again() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def multiply(rows: Tensor, weight: Tensor, shares_rounding: Tensor | None = None) -> Tensor:
    """`rows @ weight.T` by halves, into memory full of NaN."""
    first, second = rows.tensor_split(2)
    shares_rounding = torch.zeros(len(first), dtype=torch.bool) if shares_rounding is None else shares_rounding
    out = torch.full((len(rows), len(weight)), math.nan)
    product(first, second, shares_rounding, weight, out)
    return out


def error(got: Tensor, rows: Tensor, weight: Tensor, shares_rounding: Tensor | None = None) -> float:
    """Largest error by the sum of the terms' absolute values; of alike rows, both rows'."""
    size = rows.double().abs() @ weight.double().abs().T
    if shares_rounding is not None:
        first, second = size.tensor_split(2)
        second += first[: len(second)] * shares_rounding[: len(second), None]
    return float(((got - rows.double() @ weight.double().T).abs() / size).nan_to_num(0).max())


@pytest.mark.parametrize("hidden_size", [1, 2, 3, 31, 32, 33, 64, 1535, 1537, 3075])
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 31, 32, 33, 100])
def test_any_sizes(columns: int, hidden_size: int) -> None:
    for rows in (1, 2, 3, 13, 14, 15, 28, 29):
        a, b = draw(rows, hidden_size), draw(columns, hidden_size, seed=1)
        shares_rounding = torch.arange((rows + 1) // 2) % 2 == 0
        got = multiply(a, b, shares_rounding)
        assert error(got, a, b, shares_rounding) < 2 * EPS
        torch.set_num_threads(2)
        assert torch.equal(multiply(a, b, shares_rounding), got)
        torch.set_num_threads(1)


def test_nothing_to_multiply() -> None:
    assert multiply(draw(0, 8), draw(5, 8)).shape == (0, 5)
    assert multiply(draw(5, 8), draw(0, 8)).shape == (5, 0)
    assert not multiply(draw(5, 0), draw(7, 0)).any()


def test_small_integers_are_exact() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 9, (n, 500), generator=g).bfloat16() for n in (37, 90))
    for shares_rounding in (torch.zeros(19, dtype=torch.bool), torch.ones(19, dtype=torch.bool)):
        assert torch.equal(multiply(a, b, shares_rounding).double(), a.double() @ b.double().T)


def test_rows_anywhere_in_memory() -> None:
    """Part of a wider weight, every other row, and a weight that lies column by column; hidden states likewise."""
    a, b = draw(40, 70), draw(100, 70, seed=1)
    for rows in (a[:17, 3:62], a[::2, 3:62], a.T.contiguous().T[:17, 3:62]):
        expected = multiply(rows.clone(), b[:, 3:62].clone())
        for weight in (b[:, 3:62], b.repeat_interleave(2, 0)[::2, 3:62], b.T.contiguous().T[:, 3:62]):
            assert torch.equal(multiply(rows, weight), expected)


def test_a_row_is_the_same_in_any_company() -> None:
    """The backward recomputes some of the rows, in tiles of its own, and must meet the forward's roundings."""
    a, b = draw(60, 900), draw(200, 900, seed=1)
    shares_rounding = torch.arange(30) % 3 > 0
    whole = multiply(a, b, shares_rounding).view(2, 30, 200)
    for some in (torch.tensor([7]), torch.tensor([29, 3, 4]), torch.arange(5, 22)):
        rows = a.view(2, 30, 900)[:, some].flatten(0, 1)
        part = multiply(rows, b[37:150], shares_rounding[some])
        assert torch.equal(part.view(2, -1, 113), whole[:, some, 37:150])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_row_and_column(bad: float) -> None:
    a, b = draw(33, 100), draw(70, 100, seed=1)
    clean = multiply(a, b)
    a[5, 7] = b[40, 99] = bad
    got = multiply(a, b)
    hit = torch.zeros(33, 70, dtype=torch.bool)
    hit[5], hit[:, 40] = True, True
    assert torch.equal(got[~hit], clean[~hit]) and not torch.isfinite(got[hit]).any()


def test_alike_rows_share_their_rounding() -> None:
    """The gap of alike rows has a fraction of the error that two separate products leave in it."""
    a, b = draw(32, 3000), draw(300, 3000, seed=1)
    both = torch.cat([a, (a + 0.01 * draw(32, 3000, seed=2)).bfloat16()])
    one, other = (both.double() @ b.double().T).chunk(2)

    def gap_error(shares_rounding: Tensor) -> float:
        got = multiply(both, b, shares_rounding).double()
        return float((got[32:] - got[:32] - (other - one)).norm() / one.norm())

    shared, separate = gap_error(torch.ones(32, dtype=torch.bool)), gap_error(torch.zeros(32, dtype=torch.bool))
    assert shared < separate / 2 and shared < EPS / 2


def test_error_is_that_of_a_float32_product() -> None:
    a, b = draw(64, 4096), draw(500, 4096, seed=1)
    truth = a.double() @ b.double().T
    plain = float((a.float() @ b.float().T - truth).norm())
    assert float((multiply(a, b) - truth).norm()) < 2 * plain


# --- as part of a head


@pytest.mark.parametrize("hidden_size", [64, 255, 1024])
def test_divergences_are_well_within_the_bound(hidden_size: int) -> None:
    views = make_views(hidden_size=hidden_size, dtype=torch.bfloat16)
    got = linear_divergence(views.hidden, views.perturbed, views.weight, targets=views.targets, backend="native")
    assert worst(got, views.truth()) < 0.5


def test_the_head_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """For one view and for two, forward and backward; other dtypes are left to torch."""
    calls = []
    monkeypatch.setattr(native, "product", lambda *tensors: calls.append(tensors) or product(*tensors))
    views = make_views(rows=9, vocab=300, hidden_size=20, dtype=torch.bfloat16).grad()
    linear_logprob(views.hidden, views.weight, views.targets, backend="native").logprobs.sum().backward()
    assert len(calls) == 2
    linear_divergence(views.hidden, views.perturbed, views.weight, backend="native").divergence.sum().backward()
    assert len(calls) == 4
    mixed = make_views(rows=9, vocab=300, hidden_size=20)
    for hidden in (torch.float32, torch.float16, torch.bfloat16):
        for weight in (torch.float32, torch.float16):
            linear_logprob(mixed.hidden.to(hidden), mixed.weight.to(weight), mixed.targets, backend="native")
    assert len(calls) == 4


def test_one_view_of_an_odd_number_of_rows() -> None:
    views = make_views(rows=15, vocab=300, hidden_size=20, dtype=torch.bfloat16)
    got = linear_logprob(views.hidden, views.weight, views.targets, backend="native")
    exact = reference.logprob(views.to(torch.float64).logits()[0], views.targets)
    assert float((got.logprobs - exact).abs().max()) < 2e-5


def test_other_instruction_sets_leave_it_to_torch() -> None:
    code = "import torch; from vppo_kernels.backends import resolve; "
    code += "print(resolve('native', torch.device('cpu'), torch.float32).product)"
    environment = os.environ | {"VPPO_KERNELS_ISA": "avx2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"


# --- arguments


def arguments() -> dict[str, Any]:
    return dict(
        first=draw(5, 12),
        second=draw(4, 12),
        shares_rounding=torch.zeros(5, dtype=torch.bool),
        weight=draw(7, 12),
        scratch=torch.zeros(14 * 6),
        out=torch.zeros(9, 7),
    )


WRONG = {
    "dtype": ("first", draw(5, 12).half()),
    "dtype of out": ("out", torch.zeros(9, 7, dtype=torch.float64)),
    "dtype of shares_rounding": ("shares_rounding", torch.zeros(5)),
    "rank": ("weight", draw(7)),
    "rank of first": ("first", draw(1, 5, 12)),
    "hidden_size": ("second", draw(4, 11)),
    "rows": ("second", draw(6, 12)),
    "too few rows": ("second", draw(3, 12)),
    "elements apart": ("weight", draw(12, 7).T),
    "short shares_rounding": ("shares_rounding", torch.zeros(4, dtype=torch.bool)),
    "short scratch": ("scratch", torch.zeros(83)),
    "shape of out": ("out", torch.zeros(9, 8)),
    "out apart": ("out", torch.zeros(9, 14)[:, ::2]),
    "out transposed": ("out", torch.zeros(7, 9).T),
    "null": ("weight", None),
    "device": ("weight", torch.empty(7, 12, dtype=torch.bfloat16, device="meta")),
    "text": ("out", "out"),
    "rows whose sum overflows": ("first", torch.empty(2**62, 0, dtype=torch.bfloat16)),
    "more rows than there is memory": ("weight", torch.empty(2**61, 0, dtype=torch.bfloat16)),
}


@pytest.mark.parametrize(("name", "value"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_exceptions(name: str, value: Any) -> None:
    function = native_library.library("cpu").product
    function(*arguments().values())
    with pytest.raises((TypeError, ValueError, RuntimeError, BufferError)):
        function(*(arguments() | {name: value}).values())


@pytest.mark.parametrize("rows", [2**61, 2**62])
def test_any_number_of_rows_without_depth_is_refused(rows: int) -> None:
    """Nothing of such tensors is in memory, and twice their rows is no number any more."""
    empty = torch.empty(rows, 0, dtype=torch.bfloat16)
    given = arguments() | dict(first=empty, second=empty, weight=torch.empty(0, 0, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="rows: got"):
        native_library.library("cpu").product(*given.values())


def test_a_stride_beyond_memory_is_refused() -> None:
    """numpy lets a tensor claim it; torch does not."""
    far = np.lib.stride_tricks.as_strided(np.zeros(12, np.float32), (9, 7), (2**62, 4))
    with pytest.raises(ValueError, match=r"out: got strides .* takes a tensor that fits into memory"):
        native_library.library("cpu").product(*(arguments() | dict(out=far)).values())
