"""The model of a GPU: never below the bare products, and moved by what moves a GPU."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import prediction
from benchmarks.cli import app
from benchmarks.contest import Record
from benchmarks.inputs import PRESETS
from benchmarks.report import CaseResult, case_view
from vppo_kernels.tile_shape import Chip

SEVEN = PRESETS["7b"]


@pytest.mark.parametrize("name", ["a100", "h100", "h200", "b200"])
def test_a_sweep_takes_its_products_and_more(name: str) -> None:
    gpu = prediction.GPUS[name]()
    for views in (1, 2):
        times = [prediction.forward(gpu, views, rows, SEVEN) for rows in (1024, 4096, 16_384)]
        assert all(found.floor < found.products < found.total < 2 * found.floor for found in times)
        assert times[0].total < times[1].total < times[2].total
    loss, once = prediction.loss(gpu, 4096, 10_000, SEVEN), prediction.forward(gpu, 1, 4096, SEVEN)
    assert 3.9 * once.products < loss.total < 6 * once.products and loss.floor == pytest.approx(3 * once.floor)
    # of all rows the sums do not fit, and half of the tiles are made once more
    whole = prediction.backward(gpu, 1, 40_960, 40_960, SEVEN)
    assert whole.products > 1.1 * prediction.backward(gpu, 1, 40_960, 102_400, SEVEN).products


def test_a_fused_sweep_pays_for_what_nothing_overlaps() -> None:
    gpu = prediction.GPUS["h100"]()
    for views in (1, 2):
        found = [prediction.fused(gpu, views, rows, SEVEN) for rows in (256, 4096)]
        assert all(each.floor < each.products < each.total < 2 * each.floor for each in found)
        assert found[0].total < prediction.fused(gpu._replace(clock=gpu.clock / 2), views, 256, SEVEN).total


def test_the_native_fused_sweep_hides_its_folds_and_shares_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """So half the cache's rate costs it less than a block that reads the weight for itself would pay."""
    gpu = prediction.GPUS["h100"]()
    for views in (1, 2):
        for rows in (256, 4096, 16_384):
            found = prediction.native_fused(gpu, views, rows, SEVEN)
            assert found.floor < found.products < found.total < prediction.fused(gpu, views, rows, SEVEN).total
    slow = prediction.native_fused(gpu._replace(cache=gpu.cache / 2), 2, 4096, SEVEN)
    assert found.products < slow.products * 4096 / 256 and slow.total < 2.5 * slow.floor
    before = prediction.native_fused(gpu, 2, 4096, SEVEN)
    monkeypatch.setattr(prediction, "STAGES", 0)
    assert prediction.native_fused(gpu, 2, 4096, SEVEN).rest > before.rest


def test_more_instructions_and_less_memory_cost_time(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = prediction.GPUS["h100"]()
    before = prediction.forward(gpu, 2, 4096, SEVEN)
    halved = prediction.forward(gpu._replace(memory=gpu.memory / 8), 2, 4096, SEVEN)
    monkeypatch.setattr(prediction, "FOLD_PAIR", 103.5)
    slow = prediction.forward(gpu, 2, 4096, SEVEN)
    assert slow.products == before.products and slow.rest > 2 * before.rest
    assert halved.products > before.products and halved.floor == before.floor


def test_a_case_on_a_gpu_has_a_prediction_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vppo_kernels.tile_shape.chip_of", lambda device: Chip(50 << 20, 132))
    labels = dict(preset="7b", rows=4096, vocab=SEVEN.vocab, width=SEVEN.width, dtype="bfloat16", backward=False)
    seconds = prediction.of("divergence", labels)
    assert seconds == prediction.forward(prediction.GPUS["h100"](), 2, 4096, SEVEN).total
    assert prediction.of("loss", labels | dict(active_rows=1638)) == pytest.approx(
        prediction.loss(prediction.GPUS["h100"](), 1638, 4096, SEVEN).total
    )
    backward = prediction.backward(prediction.GPUS["h100"](), 2, 4096, 4096, SEVEN).total
    assert prediction.of("divergence", labels | dict(backward=True)) == seconds + backward
    assert prediction.of("selection", labels) is None
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(case_view(CaseResult(labels, [Record("floor", "floor", "", seconds=[0.01])], seconds)))
    assert "predicted for ours" in console.export_text()


def test_the_command() -> None:
    done = CliRunner().invoke(app, ["predict", "--gpu", "h100", "--preset", "7b", "--rows", "4096"], terminal_width=200)
    assert done.exit_code == 0 and "1,366 x 3,072" in done.output and "…" not in done.output, done.output
    assert "1.50x" in done.output and "1.08x" in done.output, done.output
    wrong = CliRunner().invoke(app, ["predict", "--gpu", "v100"])
    assert wrong.exit_code == 2 and "takes one of" in wrong.output
