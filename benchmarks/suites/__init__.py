"""What is measured. A file here is a suite: it has a `SUITE`, see `benchmarks.contest.Suite`."""

from importlib import import_module
from pkgutil import iter_modules

from benchmarks.contest import Suite


def suite_names() -> list[str]:
    return [module.name for module in iter_modules(__path__)]


def load_suite(name: str) -> Suite:
    suite: Suite = import_module(f"benchmarks.suites.{name}").SUITE
    return suite
