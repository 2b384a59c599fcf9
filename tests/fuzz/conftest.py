"""Fuzzers run only when their files are named; `VPPO_FUZZ_SECONDS` is what all of them take together."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest

SECONDS = float(os.environ.get("VPPO_FUZZ_SECONDS", "180"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fuzz: random inputs for a fixed time")


@pytest.fixture
def for_a_while(request: pytest.FixtureRequest) -> Callable[[Callable[[], None]], None]:
    """Calls a hypothesis test, each time with other examples, for an equal share of the time."""

    def repeat(round_of_examples: Callable[[], None]) -> None:
        end = time.monotonic() + SECONDS / len(request.session.items)
        round_of_examples()
        while time.monotonic() < end:
            round_of_examples()

    return repeat
