"""Every CUDA kernel compiles for every chip with warnings as errors, and keeps its variables in registers."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc")
STRICT = ["-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror", "-Xptxas=-v,--warn-on-spills"]
SHARED = 48 * 1024  # bytes of a block that need no asking for

pytestmark = [pytest.mark.slow, pytest.mark.skipif(NVCC is None, reason="no nvcc")]


@pytest.mark.parametrize("source", sorted(p.name for p in (ROOT / "csrc" / "cuda").glob("*.cu")))
def test_kernels_do_not_spill(source: str, tmp_path: Path) -> None:
    assert NVCC is not None
    flags = runpy.run_path(str(ROOT / "setup.py"), run_name="flags")["cuda_flags"](NVCC)
    command = [NVCC, *flags, *STRICT, "-c", str(ROOT / "csrc" / "cuda" / source), "-o", str(tmp_path / "kernels.o")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "warning" not in run.stdout + run.stderr

    report = run.stdout + run.stderr
    kernels = re.findall(r"Compiling entry function '(\w+)' for '(\w+)'", report)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert {chip for _, chip in kernels} == set(re.findall(r"code=(sm_\w+)", " ".join(flags)))
    assert len(kernels) == len(set(kernels)) == len(frames)
    spilling = [kernel for kernel, frame in zip(kernels, frames, strict=True) if frame != ("0", "0", "0")]
    assert not spilling
    assert (
        "(C75" not in report
    )  # products that the assembler makes one after another, or registers that nobody hands over
    assert all(int(size) <= SHARED for size in re.findall(r"(\d+) bytes smem", report))


WORDS = 64  # of a row, or of two rows, that a thread of the fused sweep folds
SLICE = 90  # instructions around its four products


@pytest.mark.parametrize("dtype", ["Lb1E", "Lb0E"], ids=["bfloat16", "float16"])
def test_the_fused_sweep_folds_in_registers(dtype: str, hopper_code: bytes) -> None:
    """Four products in a slice, at most 31 instructions for a pair of logits and 8 for a logit of one view.

    Nothing of a tile goes through shared or local memory.
    """
    machine_code = pytest.importorskip("machine_code", reason="no Triton, whose disassembler it takes")
    for view, exponentials in (("Lb1E", 3), ("Lb0E", 2)):
        name = f"sweep_kernelI{dtype}{view}"
        slices = next(way for way in machine_code.shortest_ways(hopper_code, name) if way.counts["HGMMA"])
        assert slices.counts["HGMMA"] == 4 and slices.size <= SLICE
        folds = [loop for loop in machine_code.loops(hopper_code, name) if loop.counts["MUFU"] >= exponentials * WORDS]
        tile = folds[-1]
        assert tile.counts["LDS"] + tile.counts["STS"] + tile.counts["LDL"] + tile.counts["STL"] == 0
        if view == "Lb1E":  # a loop of its own, which goes around once unless the known mean gap is no help
            assert tile.size <= 31 * WORDS
        else:
            assert machine_code.shortest_ways(hopper_code, name)[0].size <= 8 * 2 * WORDS


@pytest.fixture(scope="module")
def hopper_code(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Machine code of the fused sweep for sm_90a."""
    assert NVCC is not None
    out = tmp_path_factory.mktemp("hopper") / "sweep.cubin"
    target = "-gencode=arch=compute_90a,code=sm_90a"
    command = [NVCC, "-std=c++17", "-O3", target, "-cubin", str(ROOT / "csrc" / "cuda" / "sweep.cu"), "-o", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    return out.read_bytes()
