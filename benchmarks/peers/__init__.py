"""Who else computes it. A file here is a peer; its name is the peer's.

It takes part in a suite by having a function of the suite's name, which gets the case's inputs and returns the call
that computes the result as a user of the peer would. `NOTES` tells the reader, suite by suite, what is different about
it. What it needs beyond torch is imported inside the function: a package that is missing then makes it skipped, with
that reason.
"""

from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType


def peers(suite: str) -> dict[str, ModuleType]:
    """The peers of a suite by name: the files here that have a function of the suite's name."""
    names = [module.name for module in iter_modules(__path__)]
    modules = {name: import_module(f"benchmarks.peers.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, suite)}
