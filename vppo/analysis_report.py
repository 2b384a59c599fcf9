"""Stand-in until the page is merged."""

from __future__ import annotations

from pathlib import Path

from vppo.files import write_atomic


def write_analysis_pages(out: Path) -> Path:
    return write_atomic(out / "report.html", "<!doctype html><title>analysis</title>")
