"""`python -m benchmarks.precision`: how far divergences lie from float64, from KL = 1 down to 1e-6, as a table.

Every column is a set of rows with that divergence; both views are rounded to the inputs' dtype first, and float64 is
computed from the rounded ones, so that what is measured is arithmetic alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vppo_kernels import linear_divergence, reference
from vppo_kernels.backends import available

ROWS, WIDTH, VOCAB = 64, 1536, 32_000
DIVERGENCES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
SPREAD = 4.0  # standard deviation of the logits: maxima around 17, entropies of 2 to 5 nats


def make_weight() -> Tensor:
    """`[V, D]` float64."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(VOCAB, WIDTH, generator=generator, dtype=torch.float64) / WIDTH**0.5


def make_views(weight: Tensor, divergence: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both views' hidden states, `[N, D]` in `dtype`, with about this divergence in every row.

    16 bits cannot hold a small change of every coordinate: there fewer coordinates change, by more.
    """
    generator = torch.Generator().manual_seed(1)
    hidden = SPREAD * torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)
    hidden = hidden.to(dtype).double()
    changed = 1.0 if dtype == torch.float32 else min(1.0, max(4 / WIDTH, divergence**0.5))
    direction = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)
    direction *= torch.rand(ROWS, WIDTH, generator=generator) < changed
    z, slope = hidden @ weight.T, direction @ weight.T
    size = torch.full((ROWS, 1), 1e-3, dtype=torch.float64)
    for _ in range(12):
        size *= (divergence / reference.kl(z, z + size * slope)).sqrt().clamp(0.2, 5).unsqueeze(1)
    return hidden.to(dtype), (hidden + size * direction).to(dtype)


def methods(dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Ours on every backend that is here, and the formula that everybody writes."""

    def ours(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda h, q, w: linear_divergence(h, q, w, backend=name).divergence

    def textbook(h: Tensor, q: Tensor, w: Tensor) -> Tensor:
        logp, logq = ((x @ w.T).float().log_softmax(-1) for x in (h, q))
        return (logp.exp() * (logp - logq)).sum(-1)

    rows = {f"`linear_divergence`, {name}": ours(name) for name in available(device)}
    return rows | {f"textbook formula, {str(dtype).removeprefix('torch.')} logits": textbook}


def main() -> None:
    """Print one table for each dtype: the worst relative error, and the worst error as a multiple of the bound."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    exact = make_weight()
    for dtype in (torch.float32, torch.bfloat16):
        weight = exact.to(dtype)
        cells: dict[str, list[str]] = {}
        header = []
        for wanted in DIVERGENCES:
            hidden, perturbed = make_views(weight.double(), wanted, dtype)
            truth = reference.kl(hidden.double() @ weight.double().T, perturbed.double() @ weight.double().T)
            header.append(f"{float(truth.median()):.0e}")
            bound = reference.divergence_bound(truth)
            for name, method in methods(dtype, device).items():
                value = method(*(x.to(device) for x in (hidden, perturbed, weight))).cpu().double()
                error = (value - truth).abs()
                cells.setdefault(name, []).append(
                    f"{float((error / truth)[truth > 0].max()):.1e} ({float((error / bound).max()):.2g})"
                )
        print(f"\n{str(dtype).removeprefix('torch.')} inputs, N = {ROWS}, D = {WIDTH}, V = {VOCAB}, {device}\n")
        print("| KL (median) | " + " | ".join(header) + " |")
        print("|---" * (len(header) + 1) + "|")
        for name, row in cells.items():
            print(f"| {name} | " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
