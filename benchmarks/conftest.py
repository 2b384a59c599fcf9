"""Options and fixtures of `python -m pytest benchmarks`."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--preset", default="tiny", help="head to measure, as in `python -m benchmarks list`")
    parser.addoption("--device", default="cpu", help="cpu or cuda")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test per contestant of every suite, forward alone and with backward."""
    import torch

    from benchmarks.contest import Setting, load_suite, peers, suite_names

    if "setting" not in metafunc.fixturenames:
        return
    preset, device = metafunc.config.getoption("--preset"), torch.device(metafunc.config.getoption("--device"))
    cases = []
    for name in suite_names():
        suite = load_suite(name)
        for rows in suite.rows(preset, device):
            for backward in (False, True):
                setting = Setting(preset, rows, backward, device)
                for contestant in suite.entrants(device, list(peers(name))):
                    mode = "backward" if backward else "forward"
                    cases.append(pytest.param(name, setting, contestant, id=f"{name}-{rows}-{mode}-{contestant}"))
    metafunc.parametrize(("suite", "setting", "contestant"), cases)
