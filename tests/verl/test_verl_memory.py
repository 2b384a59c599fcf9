"""What verl's worker takes, with logits as it makes them and without."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import bench_torchvision  # noqa: F401  (before transformers)
import pytest
from bench_tiny import LARGE

LOGITS = 2 * 512 * LARGE * 4 >> 20  # MiB in float32 of the response tokens of `bench_memory.py`'s micro-batch


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for a process's peak")
def test_a_worker_needs_less_than_one_copy_of_its_logits(
    tiny_of: Callable[[str], Path], bench: Callable[..., None], tmp_path: Path, record_property: Callable[..., None]
) -> None:
    taken = {}
    for layout in ("stock-padded", "padded"):
        bench("bench_memory.py", tiny_of("large"), layout, tmp_path / layout)
        taken[layout] = int((tmp_path / layout).read_text())
        record_property(layout, taken[layout])
    print(f"\nMiB beside the weights: {taken}; of the logits of a micro-batch's responses: {LOGITS}")
    assert taken["stock-padded"] > 2 * LOGITS
    assert taken["padded"] < LOGITS
