"""ms-swift's own trainer on a CPU; everything here is skipped where ms-swift is not installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    version("ms-swift")
except PackageNotFoundError:
    collect_ignore_glob = ["test_*.py"]
