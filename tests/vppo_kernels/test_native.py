"""The native library as it is called: accuracy of its functions, threads, memory layouts, wrong arguments.

What its operations compute is tested with every other backend's; `make sanitize` runs all of it under sanitizers.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given as drawn
from hypothesis import strategies as st
from torch import Tensor

from vppo_kernels import divergence, topk_mask, vppo_loss
from vppo_kernels.backends import _choose, _say_once, available, native_library
from vppo_kernels.backends import torch as plain
from vppo_kernels.logits import LogitTransform
from vppo_kernels.statistics import finish_pair, nothing, pack, unpack_pair_stats

if "native" not in available():
    pytest.skip(native_library.missing("cpu"), allow_module_level=True)

from vppo_kernels.backends import native

LIBRARY = native_library.library("cpu")
LEVELS = ("baseline", "avx2", "avx512")
INFINITY = float("inf")


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def supported(level: str) -> bool:
    given = torch.backends.cpu.get_cpu_capability().lower()  # what torch itself uses here
    return level in ("baseline", given) or (level == "avx2" and given == "avx512")


# --- elementary functions


def evaluate(function: str, x: Tensor) -> np.ndarray:
    out = torch.full_like(x, float("nan"))
    LIBRARY.evaluate(function, x, out)
    return out.numpy()


def all_floats(least: float, most: float) -> Tensor:
    """Every 4999th float between the bounds, and a dense part."""
    bits = torch.arange(-(2**31), 2**31, 4999).to(torch.int32)
    x = torch.cat([bits.view(torch.float32), torch.linspace(max(least, -110), min(most, 95), 500_000)])
    return x[(x >= least) & (x <= most)]


def phi(x: np.ndarray) -> np.ndarray:
    series = x * x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x / 720))))
    return np.where(np.abs(x) < 1e-3, series, np.expm1(x) - x)


@pytest.mark.parametrize(
    ("function", "definition", "least", "most", "bound"),
    [
        ("exp", np.exp, -INFINITY, INFINITY, 2),
        ("exp_down", np.exp, -INFINITY, 40, 2),
        ("log1p", np.log1p, 0, 1, 2),
        ("phi_near", phi, -0.5, 0.5, 6),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_functions_are_accurate_to_the_last_places(
    function: str, definition: Callable, least: float, most: float, bound: float
) -> None:
    x = all_floats(least, most)
    assert len(x) > 400_000
    got, exact = evaluate(function, x), definition(x.double().numpy())
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = exact.astype(np.float32)
        error = np.abs(got - exact) / np.spacing(np.abs(rounded)).astype(np.float64)
    wrong = (got != rounded) & ~(error <= bound)
    assert not wrong.any(), (x.numpy()[wrong][:5], got[wrong][:5], exact[wrong][:5])


@pytest.mark.parametrize("function", ["exp", "exp_down", "phi_near"])
def test_functions_keep_nan(function: str) -> None:
    quiet, payload = float("nan"), torch.tensor([0x7FC12345, -0x3EDCB]).to(torch.int32).view(torch.float32)
    x = torch.cat([torch.tensor([quiet, 0.0]), payload]).repeat(5)
    assert (np.isnan(evaluate(function, x)) == x.isnan().numpy()).all()


# --- operations


def pair_of(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two views' tile, targets (some elsewhere), their finished statistics, and upstream gradients."""
    g = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(2, rows, columns, generator=g)
    z[1] = z[0] + 0.3 * torch.randn(rows, columns, generator=g)
    targets = torch.randint(-2, columns + 5, (rows,), generator=g)
    stats = plain.fold_pair(z, targets, 0, nothing(2, rows, z), torch.empty(3, rows, columns))
    return z, targets, pack(finish_pair(unpack_pair_stats(stats))), torch.randn(5, rows, generator=g)


PACKED = 4  # of the results of `everything` are statistics, the others tiles


def everything(z: Tensor, targets: Tensor, pair: Tensor, grads: Tensor, backend: Any) -> list[Tensor]:
    """Results of all operations of a backend on one tile."""
    rows, columns = z.shape[1:]
    scratch, transform = torch.empty(3, rows, columns), LogitTransform(0.9, 1.1, 20.0)
    jsd_terms = backend.fold_jsd(z, pair, torch.zeros(2, rows), 0.5)
    mixed = backend.fold_jsd(z, pair, torch.zeros(2, rows), 0.1)
    results = [
        backend.fold(z[0], targets, 3, nothing(1, rows, z), scratch),
        backend.fold_pair(z, targets, 3, nothing(2, rows, z), scratch),
        jsd_terms,
        mixed,
    ]
    for half, beta in ((None, 0.5), (jsd_terms, 0.5), (mixed, 0.1)):
        for chosen in (None, targets):
            tile = torch.empty_like(z).copy_(z)
            upstream = grads if chosen is not None else grads[:3]
            both = transform, LogitTransform(1.2, 0.8)
            backend.gradient_pair_(tile, pair, half, beta, chosen, 3, upstream, both, tile)
            results.append(tile)
    tile = z[0].clone()
    backend.gradient_(tile, pair[:4], targets, 3, grads[:2], transform, tile)
    return [*results, tile]


@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (3, 7), (2, 15), (2, 16), (5, 17), (4, 127), (2, 4096), (3, 4097), (2, 9001)]
)
def test_agrees_with_torch_at_every_width(rows: int, columns: int) -> None:
    given = pair_of(rows, columns)
    before = given[0].clone()
    for got, expected in zip(everything(*given, native), everything(*given, plain), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(given[0], before)


def test_bitwise_the_same_for_any_number_of_threads() -> None:
    given = pair_of(67, 1543)
    g = torch.Generator().manual_seed(1)
    scores, mask = torch.rand(67, 800, generator=g), torch.rand(67, 800, generator=g) < 0.9

    def results() -> list[Tensor]:
        z_p, z_q = (z.clone().requires_grad_() for z in given[0])
        both = divergence(z_p, z_q, targets=given[1].clamp(0, 1542), kind="jsd", backend="native")
        logprobs = scores.log().requires_grad_()
        loss, metrics = vppo_loss(logprobs, scores.sqrt().log(), given[3][0], mask, scores, backend="native")
        gradients = torch.autograd.grad(sum(x.sum() for x in both) + loss, (z_p, z_q, logprobs))  # type: ignore[arg-type]
        return [*everything(*given, native), *both, *gradients, loss, *metrics.values()]  # type: ignore[list-item]

    with threads(1):
        assert LIBRARY.threads() == 1
        alone = results()
    for count in (2, 3):
        with threads(count):
            assert LIBRARY.threads() == count
            assert all(torch.equal(a, b) for a, b in zip(alone, results(), strict=True))


@pytest.mark.parametrize("columns", [5, 64, 1000])
def test_unaligned_and_strided_arguments(columns: int) -> None:
    """Tiles at any address, statistics and gradients with fields far apart: the same bits."""
    z, targets, pair, grads = pair_of(6, columns)
    expected = everything(z, targets, pair, grads, native)
    shifted = torch.empty(z.numel() + 3)[3:].view_as(z).copy_(z)
    wide = torch.full((10, 20), float("nan"))[:, 7:13].copy_(pair)
    apart = torch.full((5, 11), float("nan"))[:, 2:8].copy_(grads)
    later = torch.cat([torch.zeros(5, dtype=torch.long), targets])[5:]
    for got, first in zip(everything(shifted, later, wide, apart, native), expected, strict=True):
        assert torch.equal(got, first)


def test_a_row_does_not_read_its_neighbours() -> None:
    z, targets, pair, grads = pair_of(3, 37)
    expected = everything(z, targets, pair, grads, native)
    z[:, 0], z[:, 2] = float("nan"), INFINITY
    for index, (got, first) in enumerate(zip(everything(z, targets, pair, grads, native), expected, strict=True)):
        place = (..., 1) if index < PACKED else (..., 1, slice(None))
        assert torch.equal(got[place], first[place])


@pytest.mark.parametrize("first", [-(2**63), -5, 2**63 - 1])
def test_targets_at_the_ends_of_their_type(first: int) -> None:
    z = torch.randn(4, 9)
    targets = torch.tensor([-(2**63), 2**63 - 1, 0, first])
    stats = native.fold(z, targets, first, nothing(1, 4, z), z)
    assert stats[3, 3] == z[3, 0]
    for row in range(3):
        column = int(targets[row]) - first
        assert stats[3, row] == (z[row, column] if 0 <= column < 9 else -INFINITY)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_tiles_change_nothing(shape: tuple[int, int]) -> None:
    rows = shape[0]
    z, targets, grads = torch.empty(2, *shape), torch.zeros(rows, dtype=torch.long), torch.ones(5, rows)
    stats = torch.rand(10, rows)
    before = stats.clone()
    assert torch.equal(native.fold_pair(z, targets, 0, stats, z), before)
    assert torch.equal(native.fold(z[0], targets, 0, stats[:4], z), before[:4])
    native.gradient_pair_(z, stats, None, 0.5, targets, 0, grads, (LogitTransform(), LogitTransform()), z)
    native.gradient_(z[0], stats[:4], targets, 0, grads[:2], LogitTransform(), z[0])


# --- instruction sets


@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set(level: str) -> None:
    """All of this file, and the hard cases, once more."""
    if "VPPO_KERNELS_ISA" in os.environ or not supported(level):
        pytest.skip("inside such a run, or not an instruction set of this processor")
    if level == LIBRARY.instructions():
        return  # this run is that one
    files = [__file__, os.path.join(os.path.dirname(__file__), "test_hard_cases.py")]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "native", *files],
        env={**os.environ, "VPPO_KERNELS_ISA": level}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0 and re.search(r"[3-9]\d passed|\d{3} passed", run.stdout), run.stdout[-2000:]


def test_an_unknown_instruction_set_is_refused() -> None:
    if "VPPO_KERNELS_ISA" in os.environ:
        pytest.skip("inside a run of `test_every_instruction_set`")
    code = "from vppo_kernels.native_library import library; library('cpu').instructions()"
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "VPPO_KERNELS_ISA": "mmx"}, capture_output=True, text=True
    )
    assert run.returncode == 1 and "ValueError: VPPO_KERNELS_ISA: got 'mmx'" in run.stderr


# --- arguments from outside


def arguments() -> dict[str, list[Any]]:
    """Good arguments of every exported function that takes tensors."""
    rows, columns = 3, 6
    z, targets, pair, grads = pair_of(rows, columns)
    jsd_terms, tokens, mask = (
        torch.zeros(2, rows),
        torch.rand(rows, columns),
        torch.ones(rows, columns, dtype=torch.bool),
    )
    offsets = torch.tensor([0, 4, 6])

    def like() -> Tensor:
        return tokens.clone()

    return {
        "fold": [z[0], targets, 0, pair[:4].clone()],
        "fold_pair": [z, targets, 0, pair],
        "fold_jsd": [z, pair, jsd_terms, 0.5],
        "gradient": [z[0].clone(), pair[:4], targets, 0, grads[:2], 1.0, 0.0],
        "gradient_pair": [z.clone(), pair, jsd_terms, 0.5, targets, 0, grads, 1.0, 0.0, 1.0, 0.0],
        "topk_mask": [like(), mask, 0.4, None, None, mask.clone()],
        "topk_mask packed": [like()[0], mask[0], 0.4, 0.5, offsets, like()[0]],
        "evaluate": ["exp", like()[0], like()[0]],
    }


def call(name: str, given: list[Any]) -> None:
    getattr(LIBRARY, name.split()[0])(*given)


WRONG: dict[str, Callable[[Tensor], Any]] = {
    "float64": lambda x: x.double(),
    "bfloat16": lambda x: x.bfloat16(),
    "int32": lambda x: x.int(),
    "complex": lambda x: x.to(torch.complex64),
    "meta": lambda x: x.to("meta"),
    "one row less": lambda x: x[:-1],
    "one entry more": lambda x: torch.cat([x, x[..., -1:]], dim=-1),
    "no entries": lambda x: x[..., :0],
    "one dimension more": lambda x: x.unsqueeze(0),
    "a scalar": lambda x: x.flatten()[0],
    "every second": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "backwards": lambda x: np.flip(x.numpy(), -1),
    "the same entry": lambda x: x[..., :1].expand(x.shape),
    "a number": lambda x: 1,
    "a string": lambda x: "x",
    "a list": lambda x: x.tolist(),
    "a sparse tensor": lambda x: x.to_sparse(),
}
TILES = ("fold", "fold_pair", "fold_jsd", "gradient", "gradient_pair")
FINE = {(name, 0, what) for name in TILES for what in ("one entry more", "no entries")}  # a tile is of any width
FINE |= {("topk_mask packed", 4, what) for what in ("one row less", "one entry more")}  # and offsets of any number
REFUSALS = (TypeError, ValueError, RuntimeError, BufferError)
TENSORS = [(n, i) for n, given in arguments().items() for i, x in enumerate(given) if isinstance(x, Tensor)]


def test_good_arguments_are_taken() -> None:
    for name, given in arguments().items():
        call(name, given)


@pytest.mark.parametrize(("name", "index"), TENSORS, ids=str)
def test_a_wrong_tensor_is_refused(name: str, index: int) -> None:
    for what, change in WRONG.items():
        given = arguments()[name]
        given[index] = change(given[index])
        try:
            call(name, given)
        except REFUSALS:
            continue
        assert (name, index, what) in FINE, what


def test_messages_name_the_argument() -> None:
    given = arguments()["fold"]
    with pytest.raises(ValueError, match=re.escape("stats: got shape [3, 3], takes [4, 3]")):
        call("fold", [*given[:3], given[3][:3]])
    with pytest.raises(TypeError, match="tile: got dtype float64, takes float32"):
        call("fold", [given[0].double(), *given[1:]])
    with pytest.raises(ValueError, match=r"tile: got strides \[1, 3\] of shape \[3, 6\], takes consecutive"):
        call("fold", [given[0].T.contiguous().T, *given[1:]])
    with pytest.raises(ValueError, match="keep_ratio: got 0, takes a number above 0 and at most 1"):
        call("topk_mask", [*arguments()["topk_mask"][:2], 0.0, *arguments()["topk_mask"][3:]])
    with pytest.raises(ValueError, match="keep_threshold: got nan, takes None or a number"):
        call("topk_mask", [*arguments()["topk_mask"][:3], math.nan, *arguments()["topk_mask"][4:]])
    with pytest.raises(ValueError, match="function: got 'sin', takes exp"):
        call("evaluate", ["sin", torch.ones(2), torch.ones(2)])


HUGE = (2**61, 2**62, 2**62 - 1)


def every_function() -> dict[str, list[Any]]:
    """Those of `arguments`, and of the product, whose merely wrong ones are in `test_product`."""
    if not getattr(LIBRARY, "has_product", bool)():  # an emulated library has the operations only
        return arguments()
    half, weight = (torch.zeros(rows, 6, dtype=torch.bfloat16) for rows in (4, 3))
    scratch, out = torch.zeros(LIBRARY.product_scratch(8, 6)), torch.zeros(8, 3)
    product = [half, half.clone(), torch.zeros(4, dtype=torch.bool), weight, scratch, out]
    return arguments() | {"product": product, "product_scratch": [8, 6]}


def hostile(size: int, form: int) -> Any:
    """Tensors without entries, or with one, whose sizes and strides overflow when they are multiplied."""
    return (
        lambda: torch.empty(size, 0),
        lambda: torch.empty(2, size, 0),
        lambda: torch.empty(size, 0, dtype=torch.bool),
        lambda: torch.empty(size, 0, dtype=torch.int64),
        lambda: torch.empty(size, 0, dtype=torch.bfloat16),
        lambda: torch.zeros(2).as_strided((1, 2), (size, 1)),
        lambda: torch.zeros(1).expand(size),
        lambda: torch.zeros(1, dtype=torch.bool).expand(size, 1),
        lambda: np.lib.stride_tricks.as_strided(np.zeros(8, np.float32), (2, 3, 6), (size, 24, 4)),
        lambda: np.lib.stride_tricks.as_strided(np.zeros(8, np.float32), (3, 6), (size, 4)),
    )[form]()


pieces = st.one_of(
    st.none(),
    st.builds(hostile, st.sampled_from(HUGE), st.integers(0, 9)),
    st.sampled_from([*HUGE, *(-x for x in HUGE)]),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(max_size=3),
    st.builds(
        lambda shape, dtype, step: torch.zeros([n * step for n in shape], dtype=dtype)[
            (slice(None, None, step),) * len(shape)
        ],
        st.lists(st.integers(0, 6), max_size=3),
        st.sampled_from([torch.float32, torch.int64, torch.bool, torch.float64, torch.bfloat16]),
        st.integers(1, 2),
    ),
)


@drawn(name=st.sampled_from(sorted(every_function())), where=st.lists(st.integers(0, 7), min_size=1, max_size=3),
       what=st.lists(pieces, min_size=3, max_size=3))  # fmt: skip
def test_whatever_comes_is_taken_or_refused(name: str, where: list[int], what: list[Any]) -> None:
    """Nothing but an exception: a crash would end this process."""
    given = every_function()[name]
    for index, value in zip(where, what, strict=False):
        given[index % len(given)] = value
    try:
        call(name, given)
    except (*REFUSALS, IndexError, OverflowError) as error:
        assert str(error)


@pytest.mark.parametrize("size", HUGE)
def test_hostile_sizes_are_taken_or_refused(size: int) -> None:
    """In every place, and in all places of tensors at once."""
    for form in range(10):
        for name, good in every_function().items():
            if not hasattr(LIBRARY, name.split()[0]):
                continue  # an emulated library has the operations only
            tensors = [index for index, value in enumerate(good) if isinstance(value, Tensor)]
            for places in [tensors, *([index] for index in tensors)]:
                given = every_function()[name]
                for index in places:
                    given[index] = hostile(size, form)
                with suppress(*REFUSALS):
                    call(name, given)


def test_a_tensor_larger_than_memory_is_refused() -> None:
    far = np.lib.stride_tricks.as_strided(np.zeros(8, np.float32), (4, 3), (2**62, 4))
    with pytest.raises(ValueError, match=r"stats: got strides .* takes a tensor that fits into memory"):
        call("fold", [*arguments()["fold"][:3], far])


@pytest.mark.parametrize("rows", [0, -1, 2**31, 2**61, 2**62, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("hidden_size", [0, 5, -1, 2**31, 2**61, 2**63 - 1])
def test_hostile_sizes_of_a_product_are_refused(rows: int, hidden_size: int) -> None:
    scratch = LIBRARY.product_scratch
    if rows == 0 and hidden_size in (0, 5):
        assert scratch(rows, hidden_size) == 0
    else:
        with pytest.raises(ValueError, match=r"(rows|hidden_size): got -?\d+, takes a number from 0 to"):
            scratch(rows, hidden_size)


@drawn(offsets=st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 12), min_size=1, max_size=6))
def test_offsets_out_of_order_stay_within_the_scores(offsets: list[int]) -> None:
    scores, out = torch.rand(9), torch.zeros(9, dtype=torch.bool)
    LIBRARY.topk_mask(scores, torch.ones(9, dtype=torch.bool), 0.5, None, torch.tensor(offsets), out)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_arguments_are_refused(count: int) -> None:
    for name, given in arguments().items():
        with pytest.raises(REFUSALS):
            call(name, given[:count])


# --- which backend


def test_auto_takes_it_on_a_cpu_and_says_once_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert _choose("auto", cpu, torch.float32) == _choose("auto", cpu, torch.bfloat16) == "native"
    assert _choose("auto", cpu, torch.float64) == "torch"
    with pytest.raises(ValueError, match=r"backend: got 'native', takes one of .* it takes float32"):
        _choose("native", cpu, torch.float64)
    monkeypatch.setattr(native_library, "missing", lambda device: "the native library was not built: no compiler")
    _say_once.cache_clear()
    with pytest.warns(UserWarning, match="plain torch on this CPU, which is slower: .* no compiler") as said:
        assert _choose("auto", cpu, torch.float32) == _choose("auto", cpu, torch.float32) == "torch"
    assert len(said) == 1
    with pytest.raises(ValueError, match=r"backend: got 'native', takes one of .* not built: no compiler"):
        _choose("native", cpu, torch.float32)


def test_native_fused_is_for_hopper_alone_and_never_automatic() -> None:
    cpu = torch.device("cpu")
    for dtype, reason in ((torch.float32, "it takes a Hopper GPU"), (torch.float64, "it takes bfloat16 and float16")):
        assert "native_fused" not in available(cpu, dtype)
        with pytest.raises(ValueError, match=f"backend: got 'native_fused', takes one of .* here: {reason}"):
            _choose("native_fused", cpu, dtype)


def test_selection_on_16_bits_and_strided_scores() -> None:
    g = torch.Generator().manual_seed(0)
    wide, mask = torch.randn(9, 400, generator=g), torch.rand(9, 200, generator=g) < 0.8
    for scores in (wide[:, ::2], wide[:, ::2].bfloat16(), wide[:, 200:].half()):
        expected = topk_mask(scores, mask, 0.3, backend="torch")
        assert torch.equal(topk_mask(scores, mask, 0.3, backend="native"), expected)


def test_a_library_older_than_its_sources_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its functions may not be those that Python calls."""
    package = tmp_path / "vppo_kernels"
    (package / "lib").mkdir(parents=True)
    (tmp_path / "csrc").mkdir()
    source, built = tmp_path / "csrc" / "bindings.cpp", package / "lib" / "build.json"
    (package / "lib" / "libvppo_cpu.so").touch()
    monkeypatch.delenv("VPPO_KERNELS_LIB", raising=False)
    monkeypatch.setattr(native_library, "__file__", str(package / "native_library.py"))
    for path, age in ((source, 200), (built, 100)):
        path.write_text("{}")
        os.utime(path, (age, age))
    with pytest.warns(UserWarning, match="csrc/ has changed .*pip install -e"):
        loaded, reason = native_library._load.__wrapped__("cpu")
    assert loaded is None and "csrc/ has changed" in reason
    os.utime(built, (300, 300))
    assert "cannot be loaded" in native_library._load.__wrapped__("cpu")[1]
