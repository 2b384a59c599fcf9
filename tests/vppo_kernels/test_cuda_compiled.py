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
    assert all(int(size) <= SHARED for size in re.findall(r"(\d+) bytes smem", report))
