"""What a compiled kernel does in its loop, read from the machine code of an Nvidia chip."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import triton

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);")
LABEL = re.compile(r"\s*(\.L_x_\d+):")


class Loop(NamedTuple):
    """The instructions from a label to the branch back to it, by their names' first part."""

    size: int
    counts: Counter[str]


def loops(cubin: bytes) -> list[Loop]:
    """Every loop of a kernel, the largest first."""
    names: list[str] = []
    branches: list[tuple[int, str]] = []
    labels: dict[str, int] = {}
    for line in _disassembled(cubin).splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(names)
        elif found := INSTRUCTION.search(line):
            if found[1].startswith("BRA") and (to := re.search(r"\.L_x_\d+", found[2])):
                branches.append((len(names), to[0]))
            names.append(found[1].split(".")[0])
    spans = [(labels[to], at) for at, to in branches if labels.get(to, at) < at]  # one to itself is the end's padding
    made = [Loop(end - start + 1, Counter(names[start : end + 1])) for start, end in spans]
    return sorted(made, key=lambda loop: -loop.size)


def _disassembled(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.nvdisasm.path
        return subprocess.run([tool, "-c", str(path)], capture_output=True, text=True, check=True).stdout
