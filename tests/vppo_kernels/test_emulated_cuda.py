"""The CUDA kernels, as they are, compiled for a CPU and run thread by thread; see `emulated_cuda/cuda_runtime.h`.

The fused sweep's primitives, which only Hopper chips have, are those of `emulated_cuda/hopper.h`.
"""

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
TVM_FFI = Path(tvm_ffi.__file__).parent
FLAGS = ["-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-x", "c++"]
FLAGS += ["-I", str(HERE / "emulated_cuda"), "-I", str(SOURCES), "-isystem", str(TVM_FFI / "include")]
FLAGS += ["-include", "hopper.h"]
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
    "native_fused",  # takes 16-bit operands alone: it has a file of its own
)
# what may be wrong with a fused sweep: a piece of it, and what stands there instead
MISTAKES = {
    "a stage is waited for in the wrong phase": ("place.parity ^ 1", "place.parity"),
    "a stage is overwritten while it is read": ("wait(shared.empty[place.stage], place.parity ^ 1);", ""),
    "a stage is read before it is there": ("wait(shared.full[place.stage], place.parity);", ""),
    "a stage is given back while products read it": ("wait_for_products<1>", "wait_for_products<2>"),
    "sums are read while products are made": ("finish_products(sums);", ""),
    "a stage is never given back": ("if (slice > 0) {", "if (false) {"),
    "too few bytes are waited for": ("arrive_expecting(full, sizeof(Stage));", "arrive_expecting(full, 1024);"),
    "half of the readers are waited for": ("blocks * kWarpsThatRead", "kWarpsThatRead"),
    "the other block is not told": ("arrive(shared.empty[stage], lane)", "arrive(shared.empty[stage], cluster_rank())"),
    "the other block gets no weight": ("(1u << blocks) - 1", "1u << rank"),
    "a block ends before the other has done with it": ("cluster_sync();  // no", "// no"),
    "the second warpgroup is never called": ("warpgroup == 0 && ", "warpgroup == 2 && "),
    "operands are not swizzled": ("swizzle_of_128 << 62", "swizzle_of_128 << 61"),
    "eights of rows lie elsewhere": ("1024 >> 4", "512 >> 4"),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
]


def compiled(source: Path, folder: Path, *options: str) -> str:
    """The object that the C++ compiler makes of a source."""
    out = str(folder / f"{source.stem}.o")
    command = [str(COMPILER), *FLAGS, *options, "-c", str(source), "-o", out]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return out


def linked(objects: list[str], folder: Path) -> Path:
    out = folder / "libvppo_cpu.so"
    link = [str(COMPILER), "-shared", *objects, f"-L{TVM_FFI / 'lib'}", "-ltvm_ffi", "-o", str(out)]
    subprocess.run(link, check=True)
    return out


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the library, under the name of the CPU's: it takes a CPU's tensors."""
    folder = tmp_path_factory.mktemp("emulated")
    others = [SOURCES.parent / "bindings.cpp", HERE / "emulated_cuda" / "no_product.cpp"]
    others += [HERE.parent / "support" / "tensor_core.cpp"]
    with ThreadPoolExecutor(2) as pool:
        sources = [*SOURCES.glob("*.cu"), *SOURCES.glob("*.cpp"), *others]
        made = list(pool.map(lambda source: compiled(source, folder, "-O3"), sources))
    linked(made, folder)
    return folder


def run_tests(library: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "VPPO_KERNELS_LIB": str(library), "VPPO_TEST_DEVICE": "cpu"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout and "native_fused.py: the native library" not in run.stdout


def test_the_suite_passes(emulated: Path) -> None:
    """Everything that the native backend is tested with, on a CPU and on a GPU, wrong arguments among it."""
    run_tests(emulated, str(HERE), "-k", f"native and not ({' or '.join(CPU_ONLY)})")


def test_the_suite_of_the_fused_sweep_passes(emulated: Path) -> None:
    files = [str(HERE / name) for name in ("test_native_fused.py", "test_tensor_cores.py")]
    run_tests(emulated, *files, "-k", "native_fused")


def fused_sweep(library: Any) -> Tensor:
    """Of two blocks of rows and more slices than there are stages; NaN where it fails."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 400, generator=g).div(5).bfloat16() for n in (144, 300))
    stats = torch.full((10, 72), torch.nan)
    try:
        library.sweep(hidden, weight, None, None, 0, 1.0, 2, torch.full((1, 10, 72), torch.nan), stats)
    except RuntimeError as error:
        assert "emulated_cuda: " in str(error)
        return torch.full_like(stats, torch.nan)
    return stats


@pytest.mark.parametrize("mistake", [None, *MISTAKES])
def test_a_mistake_in_the_fused_sweep_is_found(
    emulated: Path, mistake: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the emulated chip proves something: threads that wait for ever, or other numbers."""
    source = (SOURCES / "sweep.cu").read_text()
    right, wrong = MISTAKES[mistake] if mistake else ("", "")
    assert mistake is None or source.count(right) == 1
    (tmp_path / "sweep.cu").write_text(source.replace(right, wrong))
    expected = fused_sweep(tvm_ffi.load_module(emulated / "libvppo_cpu.so"))
    assert not expected.isnan().any()
    sweep = compiled(tmp_path / "sweep.cu", tmp_path, "-O0", "-Wno-unused")
    others = [str(path) for path in emulated.glob("*.o") if path.stem != "sweep"]
    library = tvm_ffi.load_module(linked([sweep, *others], tmp_path))
    same = [torch.allclose(fused_sweep(library), expected)]
    monkeypatch.setenv("EMULATED_CUDA_ORDER", "reversed")
    same.append(torch.allclose(fused_sweep(library), expected))
    assert all(same) == (mistake is None)


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
        "sweep": (z[0].bfloat16(), z[0].bfloat16(), None, None, 0, 1.0, 1, pair[None, :4], pair[:4]),
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
