"""The tutorial runs from its first cell to its last, and what it says about the numbers held when it was committed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples/tutorial.ipynb"
FEWER = {
    "STEPS, PROMPTS, ROLLOUTS = 40, 16, 8": "STEPS, PROMPTS, ROLLOUTS = 6, 4, 8",
    "OWN_STEPS = 15": "OWN_STEPS = 3",
    'strips("held-out", 256, seed=0)': 'strips("held-out", 64, seed=0)',
}
SHORT_WARM_UP = "from vppo.demo import warmup\n\nwarmup.MAX_STEPS = 30"


@pytest.mark.slow
def test_every_cell_runs(tmp_path: Path) -> None:
    """With fewer steps, after which the claims of its last cell cannot hold yet: they are of the committed run."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "claims" not in cell.metadata.get("tags", ())]
    for written, fewer in FEWER.items():
        (cell,) = [cell for cell in notebook.cells if written in cell["source"]]
        cell["source"] = cell["source"].replace(written, fewer)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(SHORT_WARM_UP))
    run = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    run.execute()  # raises where a cell does, with its traceback


def stored() -> Any:
    import json

    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def test_the_committed_tutorial_was_run_and_is_small() -> None:
    """A reader on a forge sees its pictures, its claims held, and a clone is not made heavy by it."""
    cells = [cell for cell in stored()["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert sum("claims" in cell["metadata"].get("tags", ()) for cell in cells) == 1
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 4
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert NOTEBOOK.stat().st_size < 400_000


def test_every_cell_of_code_is_short_and_introduced() -> None:
    cells = stored()["cells"]
    assert cells[0]["cell_type"] == "markdown"
    assert max(len(cell["source"]) for cell in cells if cell["cell_type"] == "code") <= 60
    assert not any(path in "".join(cell["source"]) for cell in cells for path in ("/tmp/", "/home/", "/work/"))
