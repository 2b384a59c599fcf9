"""Tables of pages in a browser: headers break between words alone, on a phone too, and what is too wide is scrolled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vppo.pages.page import breakable, render

RUNS = ["qwen2_5_vl_7b_instruct_vppo_seed_1", "runs/32b/checkpoint-1200", "Qwen2.5-VL-7B-Instruct"]
ROWS = [
    ("dependency, mean (nats)", ["0.0912 (0.0712 to 0.1350)"] * 3),
    ("per_device_train_batch_size", ["8", "4", "2"]),
]
# words of headers that do not stand in one line
BROKEN = r"""() => [...document.querySelectorAll("th")].flatMap(header => {
  const found = [], texts = document.createTreeWalker(header, NodeFilter.SHOW_TEXT), range = document.createRange();
  while (texts.nextNode())
    for (const word of texts.currentNode.data.matchAll(/[^\s\/_-]+/g)) {
      range.setStart(texts.currentNode, word.index);
      range.setEnd(texts.currentNode, word.index + word[0].length);
      if (new Set([...range.getClientRects()].map(box => box.top)).size > 1) found.push(word[0]);
    }
  return found;
})"""


def comparison() -> str:
    table = {"headline": "", "matching": "", "charts": [], "table": ROWS, "pairs": ROWS, "settings": ROWS}
    return render("comparison.html", labels=RUNS, first=RUNS[0], **table)


def evaluation_comparison() -> str:
    table = {
        "columns": ["questions", "first", "better on"],
        "rows": ROWS,
        "answers": ["tokens: first"] * 3,
        "also": ROWS,
    }
    settings = [(name, ["math-verify", "a long sentence of many words " * 4]) for name, _ in ROWS]
    page = {"labels": RUNS[:2], "headline": "", "charts": [], "blind": None, "settings": settings}
    return render("evaluation_comparison.html", **page, **table)


@pytest.mark.parametrize("width", [1280, 420])
@pytest.mark.parametrize("make", [comparison, evaluation_comparison], ids=lambda make: make.__name__)
def test_headers_break_between_words(
    make: Callable[[], str], width: int, tmp_path: Path, open_page: Callable[..., Any]
) -> None:
    (tmp_path / "page.html").write_text(make(), encoding="utf-8")
    page = open_page(tmp_path / "page.html", viewport={"width": width, "height": 900})
    assert page.evaluate(BROKEN) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    inside = "all => all.every(one => one.scrollWidth <= one.clientWidth)"
    assert page.locator("th").evaluate_all(inside)  # and none reaches into its neighbour


def test_a_name_stays_text() -> None:
    assert breakable("<i>a_b/c</i>") == "&lt;i&gt;a_<wbr>b/<wbr>c&lt;/<wbr>i&gt;"
