"""What a compiled kernel does in its loop, read from the machine code of an Nvidia chip."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import triton

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);")
LABEL = re.compile(r"\s*(\.L_x_\d+):")
SECTION = re.compile(r"\s*\.section\s+\.text\.(\w+)")


class Loop(NamedTuple):
    """The instructions from a label to the branch back to it, by their names' first part."""

    size: int
    counts: Counter[str]


class _Code(NamedTuple):
    """The instructions' names, where each branch goes and whether it always does, and those that end the program."""

    names: list[str]
    branches: dict[int, tuple[int, bool]]
    ends: set[int]


def loops(cubin: bytes, kernel: str = "") -> list[Loop]:
    """Every loop of a kernel, the largest first. `kernel` is a part of its name, if there are several."""
    code = _read(cubin, kernel)
    spans = [(to, at) for at, (to, _) in code.branches.items() if to < at]  # one to itself is the end's padding
    return _largest_first(Loop(end - start + 1, Counter(code.names[start : end + 1])) for start, end in spans)


def shortest_ways(cubin: bytes, kernel: str = "") -> list[Loop]:
    """The fewest instructions that lead once around each loop, inner loops gone through once: what is skipped where
    nothing rare happens is left out. `kernel` as in `loops`."""
    code, ways = _read(cubin, kernel), []
    for start in {to for at, (to, _) in code.branches.items() if to < at}:
        before: dict[int, tuple[int, int]] = {start: (1, -1)}  # steps to an instruction, and the one it is reached from
        turns = [at for at, (to, _) in code.branches.items() if to == start and at > start]
        for at in range(start, max(turns)):
            if at not in before or at in code.ends:
                continue
            to, always = code.branches.get(at, (0, False))
            for follows in ([to] if to > at else []) + ([] if always else [at + 1]):
                if follows not in before or before[at][0] + 1 < before[follows][0]:
                    before[follows] = before[at][0] + 1, at
        reached = [(before[at][0], at) for at in turns if at in before]
        if not reached:  # the way round leads back before the start
            continue
        size, at = min(reached)
        counts: Counter[str] = Counter()
        while at >= 0:
            counts[code.names[at]] += 1
            at = before[at][1]
        ways.append(Loop(size, counts))
    return _largest_first(ways)


def _largest_first(found: Iterable[Loop]) -> list[Loop]:
    return sorted(found, key=lambda loop: -loop.size)


def _read(cubin: bytes, kernel: str = "") -> _Code:
    names: list[str] = []
    branches: list[tuple[int, str, bool]] = []
    ends: set[int] = set()
    labels: dict[str, int] = {}
    here = True
    for line in _disassembled(cubin).splitlines():
        if section := SECTION.match(line):
            here = kernel in section[1]
        if not here:
            continue
        if label := LABEL.match(line):
            labels[label[1]] = len(names)
        elif found := INSTRUCTION.search(line):
            predicate, name, rest = found.groups()
            if name.startswith("BRA") and (to := re.search(r"\.L_x_\d+", rest)):
                always = predicate is None and not re.search(r"\bU?P\d", rest)
                branches.append((len(names), to[0], always))
            if name.startswith(("EXIT", "RET")) and predicate is None:
                ends.add(len(names))
            names.append(name.split(".")[0])
    return _Code(names, {at: (labels[to], always) for at, to, always in branches if to in labels}, ends)


def _disassembled(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.nvdisasm.path
        return subprocess.run([tool, "-c", str(path)], capture_output=True, text=True, check=True).stdout
