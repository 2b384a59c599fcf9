"""What the documentation and the Makefile point to is there: links between pages, and the files that they name."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
NAMED = re.compile(r"`((?:vppo|vppo_kernels|benchmarks|tests|csrc|docs|examples)/[\w./*-]*(?:\.\w+|/))`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    missing = [link for link in LINK.findall(text) if not (page.parent / link).exists()]
    named = [name for name in NAMED.findall(text) if "NAME" not in name]  # NAME is the reader's own
    missing += [name for name in named if not any(ROOT.glob(name.rstrip("/")))]
    assert not missing


def test_the_makefile_runs_tests_that_exist() -> None:
    goals = ["test", "test-vllm", "test-oldest", "test-newest", "test-verl", "faults", "fuzz", "sanitize"]
    make = ["make", "--dry-run", "--always-make", "--no-print-directory", *goals]
    said = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    named = set(re.findall(r"tests/[\w./-]+", said))
    assert len(named) > 10 and not [name for name in named if not (ROOT / name).exists()]
