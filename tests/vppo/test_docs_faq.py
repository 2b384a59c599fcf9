"""The FAQ names every number that a run logs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from support.runs import trainer

from vppo.algorithms import REGISTRY

FAQ = Path(__file__).parents[2] / "docs/faq.md"


def explained() -> set[str]:
    """The metrics of the first table."""
    rows = re.findall(r"^\| (`vppo/.*?) \|", FAQ.read_text(encoding="utf-8"), re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`(vppo/\w+)`", row)}


OF_SOME = {"vppo/dependency_stderr", "vppo/drift_kept", "vppo/drift_filtered"}  # several views, and several updates
RUNS: dict[str, dict[str, Any]] = {
    "default": {},
    "official": {"recipe": "official"},
    "several": {"draws": 2, "num_iterations": 2},
}


@pytest.mark.parametrize("name", RUNS)
def test_every_metric_of_a_run_is_explained(tmp_path: Path, name: str) -> None:
    run = trainer(tmp_path, max_steps=2, **RUNS[name])
    run.train()
    logged = {key.removeprefix("eval_") for row in run.state.log_history for key in row if "vppo/" in key}
    missing = set() if name == "several" else OF_SOME
    assert logged == explained() - missing  # nor does the page explain what nobody logs


def test_the_algorithms_of_the_other_page_are_those_of_the_registry() -> None:
    """What the table says of each."""
    table = (FAQ.parent / "selection.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", table, re.MULTILINE))
    assert told.pop("algorithm")  # the table's head
    assert set(told) == set(REGISTRY)
    for name, row in told.items():
        one = REGISTRY[name]
        scored, keeps, shapes, second = row.split(" | ")
        assert (shapes, second) == tuple("yes" if flag else "no" for flag in (one.shapes, one.perturbs)), name
        assert (keeps == "weighs each") == bool(one.token_weights) and ("nothing" in scored) == (not one.score), name
        assert (keeps == "all") == (not one.filters and not one.token_weights), name


def test_the_measured_table_is_that_of_the_other_page() -> None:
    """Accuracies of three seeds stand in perception.md and are told again here."""
    table = (FAQ.parent / "perception.md").read_text(encoding="utf-8")
    (means,) = re.findall(r"^\| mean \| [\d.]+ % \|(.*)\|$", table, re.MULTILINE)
    kl, k3, tgf, tas, dapo = re.findall(r"[\d.]+ %", means)
    told = " ".join(FAQ.read_text(encoding="utf-8").split())
    assert (
        f"{kl} for VPPO with the exact KL, {k3} with k3, {tgf} for filtering alone, {tas} for shaping alone and {dapo}"
    ) in told
