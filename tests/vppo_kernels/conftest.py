"""What all tests of the kernels share: every test that computes runs once per backend."""

import pytest
import torch

from vppo_kernels.backends import available


@pytest.fixture(params=[name for name in available("cpu") if name != "native_fused"], scope="session")
def backend(request: pytest.FixtureRequest) -> str:
    """Name of a backend that takes tensors of the CPU; `test_gpu.py` has those of a GPU.

    The emulated CUDA library has a fused sweep, which takes no float32: `test_native_fused.py` is for it.
    """
    return request.param


@pytest.fixture(params=available("cpu", torch.float64), scope="session")
def backend_float64(request: pytest.FixtureRequest) -> str:
    """Name of a backend that takes float64, for gradcheck."""
    return request.param


@pytest.fixture(params=[name for name in available("cpu") if not name.endswith("_fused")], scope="session")
def backend_tokens(request: pytest.FixtureRequest) -> str:
    """Name of a backend for selection, shaping and the loss, where a fused one is as the other.

    Their tests' tensors are on the CPU.
    """
    return request.param
