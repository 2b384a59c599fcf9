"""The FAQ names every number that a run logs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from support.runs import trainer

FAQ = Path(__file__).parents[2] / "docs/faq.md"


def explained() -> set[str]:
    """The metrics of the first table."""
    return set(re.findall(r"^\| `(vppo/\w+)` \|", FAQ.read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("changes", [{}, {"recipe": "official"}], ids=["default", "official"])
def test_every_metric_of_a_run_is_explained(tmp_path: Path, changes: dict[str, Any]) -> None:
    run = trainer(tmp_path, max_steps=2, **changes)
    run.train()
    logged = {key.removeprefix("eval_") for row in run.state.log_history for key in row if "vppo/" in key}
    assert logged == explained()  # nor does the page explain what nobody logs


def test_the_measured_table_is_that_of_the_other_page() -> None:
    """Accuracies of three seeds stand in perception.md and are told again here."""
    table = (FAQ.parent / "perception.md").read_text(encoding="utf-8")
    (means,) = re.findall(r"^\| mean \| [\d.]+ % \|(.*)\|$", table, re.MULTILINE)
    kl, k3, tgf, tas, dapo = re.findall(r"[\d.]+ %", means)
    told = " ".join(FAQ.read_text(encoding="utf-8").split())
    assert (
        f"{kl} for VPPO with the exact KL, {k3} with k3, {tgf} for filtering alone, {tas} for shaping alone and {dapo}"
    ) in told
