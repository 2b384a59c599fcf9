"""`python -m benchmarks.products`: rates of the products that make bfloat16 operands into logits on a CPU, as a table.

Each is timed in turn with all others, so that what else the machine does hits all alike; a rate is that of the median.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from vppo_kernels.backends import available, resolve

ROWS, COLUMNS, WIDTH, ROUNDS = 1024, 2048, 1536, 25  # a tile of the divergence of 512 rows; it stays in the cache


def products() -> dict[str, Callable[[], object]]:
    """By name; the first is what the others are set against."""
    g = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(n, WIDTH, generator=g).bfloat16() for n in (ROWS, COLUMNS))
    wide_rows, wide_weight = rows.float(), weight.float()
    out, narrow_out = torch.empty(ROWS, COLUMNS), torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16)
    calls: dict[str, Callable[[], object]] = {
        "float32, torch": lambda: torch.mm(wide_rows, wide_weight.T, out=out),
        "float32 of converted weight, torch": lambda: torch.mm(wide_rows, weight.float().T, out=out),
        "bfloat16 rounded to bfloat16, torch": lambda: torch.mm(rows, weight.T, out=narrow_out),
    }
    product = resolve("native", rows.device, out.dtype).product if "native" in available() else None
    if product is not None:
        first, second = rows.chunk(2)
        alike = torch.ones(len(first), dtype=torch.bool)
        calls["bfloat16 in float32, native"] = lambda: product(first, second, alike, weight, out)
    return calls


def main() -> None:
    """Print the table."""
    calls, most = products(), torch.get_num_threads()
    print(f"{ROWS} x {WIDTH} x {COLUMNS}, median of {ROUNDS}\n")
    print("| threads | product | GFLOP/s | to float32 |\n|---|---|---|---|")
    for threads in sorted({1, most}):
        torch.set_num_threads(threads)
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for call in calls.values():
            call()
        for _ in range(ROUNDS):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - start)
        rates = {name: 2e-9 * ROWS * COLUMNS * WIDTH / median(times) for name, times in seconds.items()}
        base = next(iter(rates.values()))
        for name, rate in rates.items():
            print(f"| {threads} | {name} | {rate:.0f} | {rate / base:.2f} |")


if __name__ == "__main__":
    main()
