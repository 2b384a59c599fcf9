"""What all tests of the kernels share: every test that computes runs once per backend."""

import pytest

from vppo_kernels.backends import BACKENDS


@pytest.fixture(params=sorted(BACKENDS), scope="session")
def backend(request: pytest.FixtureRequest) -> str:
    """Name of a backend of this installation."""
    return request.param
