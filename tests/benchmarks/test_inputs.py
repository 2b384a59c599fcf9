"""The inputs are what the tables claim: peaked, and spread over four decades of divergence."""

import pytest
import torch

from benchmarks.inputs import PRESETS, Shape, make_views, make_weight
from vppo_kernels import reference

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [PRESETS["tiny"], Shape(32_768, 1_024)], ids=str)
def test_entropies_and_divergences_are_in_the_promised_range(shape: Shape, dtype: torch.dtype) -> None:
    weight = make_weight(shape, CPU, dtype)
    hidden, perturbed = make_views(weight, 200)
    assert hidden.dtype == perturbed.dtype == weight.dtype == dtype
    p, q = (h.double() @ weight.double().T for h in (hidden, perturbed))
    entropy, kl = reference.entropy(p), reference.kl(p, q)
    assert entropy.min() >= 0.2 and entropy.max() <= 2.0
    assert kl.min() >= 1e-4 and kl.max() <= 5.0
    # spread over the range, not bunched: each of four equal parts of it on the log scale has its share of rows
    counts = torch.histc(kl.log10(), bins=4, min=-4, max=0.7)
    assert counts.min() >= 20
    assert p.amax(-1).min() > 8 and p.amax(-1).max() < 40


def test_the_seed_decides() -> None:
    weight = make_weight(PRESETS["tiny"], CPU, torch.float32)
    assert torch.equal(weight, make_weight(PRESETS["tiny"], CPU, torch.float32))
    assert torch.equal(make_views(weight, 5)[1], make_views(weight, 5)[1])
    assert not torch.equal(make_views(weight, 5)[0], make_views(weight, 5, seed=2)[0])
