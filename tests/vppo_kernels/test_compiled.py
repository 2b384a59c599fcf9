"""Every kernel in every shipped configuration compiles to machine code for chips that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}  # bytes of a program

BUDGETS = {"fold_pair": 40, "fold targets": 12}  # instructions of the loop for each pair of logits, for each logit
EACH = 1024 // (4 * 32)  # that a thread takes at a time
# the sweep's on Hopper, for each logit that the product leaves in a thread, beside the product's own loop: the fold and
# what starts the next product; without and with a bias and a temperature. And the reads and writes of shared memory for
# all 128 logits: those of barriers, of a vote of all warps, and of the bias.
SWEEP_BUDGETS = {"pair=True bf16 bias=False": (22.0, 8), "pair=True bf16 bias=True": (26.5, 20),
                 "pair=False bf16 bias=False": (13.7, 8), "pair=False bf16 bias=True": (16.6, 16)}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("target", SHARED)
def test_every_kernel_fits_the_chip(target: str) -> None:
    """No spills, shared memory within the limit, and the chip's own matrix instructions where it multiplies."""
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, str(script), target], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    names = [kernel["kernel"] for kernel in kernels]
    assert len(names) == len(set(names)) and sum(name.startswith("sweep") for name in names) >= 6
    for kernel in kernels:
        assert kernel["shared"] <= SHARED[target], kernel
        if target == "gfx942":
            assert kernel["code"] > 0
            continue
        assert kernel["stack"] == kernel["local"] == 0, f"spills: {kernel}"
        budget = next((most for name, most in BUDGETS.items() if kernel["kernel"].startswith(name)), None)
        if budget is not None:
            (size, barriers), *_ = sorted(kernel["loops"])  # the other folds again where one pass is not enough
            assert size <= budget * EACH and barriers == 0, kernel
        if target == "sm_90" and kernel["kernel"].startswith("sweep") and "descriptors=True" in kernel["kernel"]:
            most, accesses = next(most for name, most in SWEEP_BUDGETS.items() if name in kernel["kernel"])
            assert kernel["beside_product"] <= most and kernel["shared_accesses"] <= accesses, kernel
        if kernel["kernel"].startswith("sweep") and "fp32" not in kernel["kernel"]:
            assert kernel["wgmma"] == (target == "sm_90"), kernel
            assert kernel["tcgen05"] == (target == "sm_100"), kernel
