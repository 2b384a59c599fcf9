"""What the documentation points to is there: links between its pages, and the files that it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
LINK = re.compile(r"\]\((?!https?:|#)([)#\s]+)")
NAMED = re.compile(r"`((?:vppo|vppo_kernels|benchmarks|tests|csrc|docs|examples)/[\w./*-]*(?:\.\w+|/))`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    missing = [link for link in LINK.findall(text) if not (page.parent / link).exists()]
    named = [name for name in NAMED.findall(text) if "NAME" not in name]  # NAME is the reader's own
    missing += [name for name in named if not any(ROOT.glob(name.rstrip("/")))]
    assert not missing
