"""The registry of algorithms: its entries, what each asks for, and that all who offer a choice offer these."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vppo.algorithms import ALGORITHMS, COMMANDS, REGISTRY, Algorithm, summaries
from vppo.card import PAPERS
from vppo.cli import main
from vppo.options import VPPOOptions


@pytest.mark.parametrize("name", ALGORITHMS)
def test_entries(name: str) -> None:
    one = REGISTRY[name]
    assert one.name == name and one.summary and one.title and f"{name}: {one.summary}" in summaries()
    assert one.paper is None or {"title", "id", "citation"} == set(PAPERS[one.paper])
    options = VPPOOptions(algorithm=name)
    assert options.method is one
    assert (options.scores_tokens, options.perturbs) == (one.score is not None, one.score == "dependency")
    if one.token_weights:
        assert callable(one.load_token_weights())


@pytest.mark.parametrize(
    "change",
    [
        {"score": "luck"},
        {"score": None},
        {"filters": False},
        {"token_weights": "a:b"},
        {"token_weights": "a:b", "filters": False, "score": "entropy"},
    ],
)
def test_entries_that_contradict_themselves(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{'token_weights' if 'token_weights' in change else 'score'}: got "):
        replace(REGISTRY["tgf"], **change)


def test_a_function_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights_of_a_test.py").write_text("def ones(outputs, mask):\n    return mask.float()\n")
    monkeypatch.syspath_prepend(tmp_path)
    one = Algorithm("mine", "mine", "Mine", score="dependency", token_weights="weights_of_a_test:ones")
    assert "weights_of_a_test" not in sys.modules
    assert one.load_token_weights().__name__ == "ones"


def test_a_divergence_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes before the recipe's, and after what is given."""
    monkeypatch.setitem(REGISTRY, "tgf", replace(REGISTRY["tgf"], divergence="jsd"))
    assert VPPOOptions(algorithm="tgf", recipe="official").divergence == "jsd"
    assert VPPOOptions(algorithm="tgf", divergence="k3").divergence == "k3"
    assert VPPOOptions(algorithm="vppo").divergence == "kl"


def test_the_demo_offers_all_that_need_no_code() -> None:
    shown = " ".join(CliRunner().invoke(main, ["demo", "--help"], terminal_width=200).output.split())
    assert "|".join(COMMANDS) in shown and set(ALGORITHMS) - set(COMMANDS) == {"oracle"}


def test_the_registry_imports_nothing_heavy() -> None:
    code = "import sys, vppo.algorithms; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
