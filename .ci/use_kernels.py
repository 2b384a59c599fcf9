"""A few numbers from an installed `vppo_kernels`, on its native library, beside nothing but its own requirements."""

import importlib.metadata
import importlib.util
import sys

import torch

import vppo_kernels
from vppo_kernels import linear_divergence, linear_vppo_loss, native_library

assert not native_library.missing("cpu"), native_library.missing("cpu")
installed = [name for name in ("trl", "datasets", "accelerate", "matplotlib") if importlib.util.find_spec(name)]
assert not installed, f"not beside the kernels alone: {installed} are installed too"

torch.manual_seed(0)
hidden = torch.randn(4, 6, 32, requires_grad=True)
weight = torch.randn(500, 32, requires_grad=True)
mask = torch.ones(4, 6, dtype=torch.bool)
for backend in ("native", "torch"):
    with torch.no_grad():
        perturbed = hidden + 0.1 * torch.randn_like(hidden)
        dependency = linear_divergence(hidden, perturbed, weight, backend=backend, check=True).divergence
    loss, _ = linear_vppo_loss(
        hidden, weight, torch.randint(500, (4, 6)), torch.full((4, 6), -6.0), torch.randn(4), mask, dependency,
        backend=backend, check=True,
    )  # fmt: skip
    loss.backward()
    assert torch.isfinite(loss) and hidden.grad is not None and hidden.grad.isfinite().all()

versions = {name: importlib.metadata.version(name) for name in ("torch", "apache-tvm-ffi", "vppo-kernels")}
if importlib.util.find_spec("transformers"):
    versions["transformers"] = importlib.metadata.version("transformers")
print("1 passed, 0 failed:", vppo_kernels.__file__, sys.version.split()[0], versions)
