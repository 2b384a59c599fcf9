"""The tutorial runs from its first cell to its last, and what it says about the numbers holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples/tutorial.ipynb"
CLAIMS = """
import numpy as np

assert 0.2 < accuracy_warm < 0.6, "the warm model half knows its task"
assert accuracy_trained > accuracy_warm + 0.03, "training with VPPOTrainer helps"
assert accuracy_own > accuracy_warm + 0.03, "a loop of one's own does no harm"

for analysis in (before, after):
    at = analysis.tokens.groupby("position")["kl"].mean()
    assert min(at[0], at[2]) > 100 * max(at[1], at[3]), "what is read looks, signs do not"
    assert share_of_top(analysis.tokens["dependency"].to_numpy(dtype=float), 0.2) > 0.9, "a fifth holds nearly all"

assert log["vppo/kept_fraction"].between(0.4, 0.45).all(), "the kept fraction is set"
assert (log["vppo/dependency_q50"] < 1e-3).all() and (log["vppo/dependency_mean"] > 0.1).all(), "few make the mean"
assert np.allclose(log["vppo/scored_fraction"], 1 - log["frac_reward_zero_std"]), "no signal, no score"
assert log["reward"].tail(10).mean() > log["reward"].head(10).mean(), "reward goes up"

assert (own["active_fraction"] < own["kept_fraction"]).all() and own["kept_fraction"].between(0.4, 0.45).all()
assert np.allclose(own["alpha_mean"], 1, atol=1e-4) and np.allclose(own["alpha_min"], 0.9, atol=1e-4)
"""


@pytest.mark.slow
def test_the_tutorial_runs_and_its_claims_hold(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(CLAIMS))
    run = nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}})
    run.execute()  # raises where a cell does, with its traceback


def stored() -> Any:
    import json

    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def test_the_committed_tutorial_was_run_and_is_small() -> None:
    """A reader on a forge sees its pictures; a clone is not made heavy by them."""
    cells = [cell for cell in stored()["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 4
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert NOTEBOOK.stat().st_size < 400_000


def test_every_cell_of_code_is_short_and_introduced() -> None:
    cells = stored()["cells"]
    assert cells[0]["cell_type"] == "markdown"
    assert max(len(cell["source"]) for cell in cells if cell["cell_type"] == "code") <= 60
    assert not any(path in "".join(cell["source"]) for cell in cells for path in ("/tmp/", "/home/", "/work/"))
