"""How kernels of tiles are started: as Triton itself starts them, with less ado, and how often for a tile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from vppo_kernels.backends import triton as tiles

STREAM = 3  # place of the stream in a launch, after the grid


def test_a_prepared_launch_is_the_ordinary_one() -> None:
    """To every address and number that reaches the driver, but for `first`, on the stream that is current then."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("launches.py")
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    assert [kernel["kernel"] for kernel in kernels] == ["fold", "fold_pair", "gradient", "gradient_pair"]
    for kernel in kernels:
        *prepared, ordinary = kernel["noted"]
        for each in prepared:
            pairs = zip(each["launched"], ordinary["launched"], strict=True)
            differ = [place for place, (a, b) in enumerate(pairs) if a != b]
            assert each["remembered"] == 1 and each["launched"][STREAM] == each["at"]
            assert differ[0] == STREAM and len(differ) == (1 if each["first"] == ordinary["first"] else 2), kernel


class Kernel:
    """Compiles, and counts launches of its own and of what it has compiled."""

    def __init__(self) -> None:
        self.ordinary: list[tuple[Any, ...]] = []
        self.prepared: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            self.ordinary.append((grid, *arguments))
            return {(*grid, 1): lambda *again: self.prepared.append((grid, *again))}

        return run


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    kernel = Kernel()
    monkeypatch.setattr(tiles, "_fold_kernel", kernel)
    monkeypatch.setattr(tiles, "_prepared", {})
    yield kernel


def test_only_what_is_the_same_is_taken_as_prepared(kernel: Kernel) -> None:
    """Other addresses, sizes or flags may need other machine code: Triton is asked again."""
    tile, stats, targets = torch.zeros(6, 64), torch.zeros(4, 6), torch.zeros(6, dtype=torch.int64)
    for first in range(0, 640, 64):
        tiles.fold(tile, targets, first, stats, tile)
    assert len(kernel.ordinary) == 1 and len(kernel.prepared) == 9
    assert [launched[4] for launched in kernel.ordinary + kernel.prepared] == list(range(0, 640, 64))
    tiles.fold(tile[:5], targets, 0, stats, tile)  # fewer rows
    tiles.fold(tile.view(-1)[:360].view(6, 60), targets, 0, stats, tile)  # and columns
    tiles.fold(tile.clone(), targets, 0, stats, tile)  # elsewhere in memory
    tiles.fold(tile, None, 0, stats, tile)
    tiles.fold(tile, targets, 0, stats.clone(), tile)
    assert len(kernel.ordinary) == 6 and len(kernel.prepared) == 9


def test_few_launches_are_remembered(kernel: Kernel) -> None:
    tile, stats = torch.zeros(5, 64), torch.zeros(4, 2)
    for columns in range(1, 150):
        tiles.fold(tile.view(-1)[: 2 * columns].view(2, columns), None, 0, stats, tile)
        assert 1 <= len(tiles._prepared) <= tiles.PREPARED
