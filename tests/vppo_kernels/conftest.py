"""What all tests of the kernels share: every test that computes runs once per backend."""

import pytest
import torch

from vppo_kernels.backends import available


@pytest.fixture(params=available("cpu"), scope="session")
def backend(request: pytest.FixtureRequest) -> str:
    """Name of a backend that takes tensors of the CPU; `test_gpu.py` has those of a GPU."""
    return request.param


@pytest.fixture(params=available("cpu", torch.float64), scope="session")
def backend_float64(request: pytest.FixtureRequest) -> str:
    """Name of a backend that takes float64, for gradcheck."""
    return request.param


@pytest.fixture(params=[name for name in available("cpu") if name != "triton_fused"], scope="session")
def backend_tokens(request: pytest.FixtureRequest) -> str:
    """Name of a backend for selection, shaping and the loss, where both of Triton's are the same; their tests' tensors
    are on the CPU."""
    return request.param
