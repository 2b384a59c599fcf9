"""The CUDA kernels, as they are, compiled for a CPU and run thread by thread; see `emulated_cuda/cuda_runtime.h`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vppo_kernels import native_library
from vppo_kernels.statistics import finish_pair, nothing, pack, unpack_pair_stats

tvm_ffi = pytest.importorskip("tvm_ffi")

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc" / "cuda"
COMPILER = shutil.which("c++")
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-x", "c++"]
TVM_FFI = Path(tvm_ffi.__file__).parent
SHAPES = [(1, 1), (5, 37), (6, 1024), (3, 1028), (2, 5001), (2, 8196)]  # a warp to a row, and 4 or 16 of them
CPU_ONLY = (  # what asks the CPU's library for more than the operations, or for sums in one order wherever a tile lies
    "test_functions",
    "instruction_set",
    "number_of_threads",
    "unaligned_and_strided_arguments",
    "evaluate",
    "sizes_of_a_product",
    "good_arguments",
    "messages_name",
    "whatever_comes",
    "too_few_arguments",
    "auto_takes_it_on_a_cpu",
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the library, under the name of the CPU's: it takes a CPU's tensors."""
    folder = tmp_path_factory.mktemp("emulated")
    include = ["-I", str(HERE / "emulated_cuda"), "-isystem", str(TVM_FFI / "include")]

    def compile_one(source: Path) -> str:
        out = str(folder / f"{source.stem}.o")
        command = [str(COMPILER), *FLAGS, *include, "-c", str(source), "-o", out]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-3000:]
        return out

    with ThreadPoolExecutor(2) as pool:
        bindings = [SOURCES.parent / "bindings.cpp", HERE / "emulated_cuda" / "no_product.cpp"]
        made = list(pool.map(compile_one, [*SOURCES.glob("*.cu"), *SOURCES.glob("*.cpp"), *bindings]))
    link = [str(COMPILER), "-shared", *made, f"-L{TVM_FFI / 'lib'}", "-ltvm_ffi", "-o", str(folder / "libvppo_cpu.so")]
    subprocess.run(link, check=True)
    return folder


def test_the_suite_passes(emulated: Path) -> None:
    """Everything that the native backend is tested with, on a CPU and on a GPU, wrong arguments among it."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE)]
    command += ["-k", f"native and not ({' or '.join(CPU_ONLY)})"]
    environment = {**os.environ, "VPPO_KERNELS_LIB": str(emulated), "VPPO_TEST_DEVICE": "cpu"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout[-3000:]


def arguments() -> dict[str, tuple[Any, ...]]:
    """Right arguments of every function but for where they are."""
    z, pair, targets = torch.randn(2, 3, 5), torch.rand(10, 3), torch.arange(3)
    scores, mask, grads = torch.rand(3, 5), torch.ones(3, 5, dtype=torch.bool), torch.rand(5, 3)
    return {
        "fold": (z[0], targets, 0, pair[:4]),
        "fold_pair": (z, targets, 0, pair),
        "fold_jsd": (z, pair, pair[:2].clone(), 0.5),
        "gradient": (z[0], pair[:4], targets, 0, grads[:2], 1.0, 0.0),
        "gradient_pair": (z, pair, pair[:2].clone(), 0.5, targets, 0, grads, 1.0, 0.0, 1.0, 0.0),
        "topk_mask": (scores, mask, 0.4, None, None, mask.clone()),
    }


@pytest.mark.skipif(bool(native_library.missing("cuda")), reason="no native library for CUDA")
@pytest.mark.parametrize("function", arguments())
def test_the_real_library_refuses_tensors_of_a_cpu(function: str) -> None:
    """It loads, and says so, without a GPU or its driver."""
    with pytest.raises(ValueError, match=r"^\w+: got a tensor on cpu:0, takes one on cuda"):
        native_library.library("cuda")[function](*arguments()[function])


def on_tiles(library: Any, rows: int, columns: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(rows + columns)
    z = 3 * torch.randn(2, rows, columns, generator=g)
    z[1] = z[0] + torch.randn(rows, columns, generator=g)
    targets = torch.randint(columns, (rows,), generator=g)
    single, stats, jsd_terms = nothing(1, rows, z), nothing(2, rows, z), torch.zeros(2, rows)
    library.fold(z[0], targets, 0, single)
    library.fold_pair(z, targets, 0, stats)
    pair = pack(finish_pair(unpack_pair_stats(stats)))
    library.fold_jsd(z, pair, jsd_terms, 0.5)
    grads, alone, kl, jsd = torch.randn(5, rows, generator=g), z[0].clone(), z.clone(), z.clone()
    library.gradient(alone, pair[:4], targets, 0, grads[:2], 1.0, 0.1)
    library.gradient_pair(kl, pair, None, 0.5, targets, 0, grads, 1.0, 0.1, 0.9, 0.2)
    library.gradient_pair(jsd, pair, jsd_terms, 0.5, targets, 0, grads, 1.0, 0.0, 0.8, 0.0)
    return [single, stats, jsd_terms, alone, kl, jsd]


def on_tokens(library: Any, rows: int, columns: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(rows + columns)
    scores = torch.randn(rows, columns, generator=g)
    mask, ties = torch.rand(rows, columns, generator=g) < 0.8, scores.round()
    keeps = [torch.empty_like(mask), torch.empty_like(mask)]
    library.topk_mask(scores, mask, 0.4, 0.5, None, keeps[0])
    library.topk_mask(ties, mask, 0.4, None, None, keeps[1])
    return keeps


@pytest.mark.parametrize("operations", [on_tiles, on_tokens])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 20_000)], ids=str)
def test_the_order_of_threads_does_not_matter(
    emulated: Path, monkeypatch: pytest.MonkeyPatch, operations: Callable[..., list[Tensor]], shape: tuple[int, int]
) -> None:
    """What changes with it is a race."""
    library = tvm_ffi.load_module(emulated / "libvppo_cpu.so")
    forwards = operations(library, *shape)
    monkeypatch.setenv("EMULATED_CUDA_ORDER", "reversed")
    assert all(torch.equal(a, b) for a, b in zip(operations(library, *shape), forwards, strict=True))
