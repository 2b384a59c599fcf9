"""What verl's engine measures and trains, in every layout, against float64 and against stock verl."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_torchvision  # noqa: F401  (before transformers)
import pytest
import torch
from bench_engine_settings import SEED, STEP, TEMPERATURE
from bench_tiny import picture
from torch import Tensor
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from vppo.perturbations import Perturbation, PixelLayout, perturb, seeded
from vppo_kernels.reference import LOGPROB_BOUND, divergence_bound

UNSCORED, LEFT_OUT = -1.0, -1  # of vppo.verl.engine, which needs the bench's own process
# of each row: its picture's number or None for text alone, its response's tokens, whether it is scored.
# Two ranks have six rows each, in micro-batches of two: one of text beside one of pictures, two of both, and two in
# which no row is scored.
ROWS = [(0, 7, 1), (0, 4, 1), (1, 5, 0), (2, 9, 1), (3, 6, 0), (3, 3, 0)]
ROWS += [(None, 5, 1), (None, 8, 1), (4, 1, 1), (None, 4, 1), (None, 6, 1), (5, 5, 0)]
LAYOUTS = {"padded": 1, "padded of two": 2, "packed": 2, "ulysses": 2}


@pytest.fixture(scope="module")
def rows(tiny: Path) -> list[dict[str, Any]]:
    """Prompts and random answers, each with an advantage a token, half of them filtered."""
    processor = AutoProcessor.from_pretrained(tiny)
    draw = torch.Generator().manual_seed(5)
    made = []
    for number, length, scored in ROWS:
        text = "<|vision_start|><|image_pad|><|vision_end|>" * (number is not None) + f"colour {number}?"
        shown = {} if number is None else {"images": [picture(number, ["red", "green", "blue"][number % 3])]}
        encoded = processor(text=[text], return_tensors="pt", **shown)
        answer = torch.randint(250, (length,), generator=draw)
        advantages = torch.randn(length, generator=draw) * (torch.rand(length, generator=draw) < 0.5)
        made.append(
            {
                "input_ids": torch.cat([encoded["input_ids"][0], answer]),
                "response": length,
                "images": {name: encoded[name] for name in ("pixel_values", "image_grid_thw") if name in encoded},
                "advantages": advantages,
                "old_log_probs": -4 + torch.rand(length, generator=draw),
                "draw": 100 + (number or 0) if scored else LEFT_OUT,
            }
        )
    torch.save(made, tiny / "rows.pt")
    return made


@pytest.fixture(scope="module")
def found(rows: Any, engine: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """What the ranks of a layout returned, their columns joined in the order of the rows."""
    folders = {ranks: tmp_path_factory.mktemp(f"ranks{ranks}") for ranks in (1, 2)}
    engine(folders[1], 1, "stock", "padded")
    engine(folders[2], 2, "padded", "packed", "ulysses")

    def read(layout: str, part: str = "all") -> dict[str, Any]:
        name = layout.split()[0]
        ranks = LAYOUTS.get(layout, 1)
        parts = [torch.load(folders[ranks] / f"{name}.{part}.{rank}.pt", weights_only=False) for rank in range(ranks)]
        if name == "ulysses":
            parts = parts[:1]  # both ranks hold all rows; one returns them
        assert len({one["norm"] for one in parts}) == 1
        return {
            "norm": parts[0]["norm"],
            **{
                when: {name: [row for one in parts for row in one[when][name]] for name in parts[0][when]}
                for when in ("before", "after")
            },
        }

    return read


@pytest.fixture(scope="module")
def exact(tiny: Path, rows: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    """Log-probabilities, entropies and dependency of the response tokens, from float64 logits over the vocabulary."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny, dtype=torch.float64).eval()
    layout = PixelLayout.of(AutoProcessor.from_pretrained(tiny).image_processor)
    blackened = Perturbation("patch", layout.patch_size, 0.5)

    def log_softmax(row: dict[str, Any], images: dict[str, Tensor]) -> Tensor:
        ids = row["input_ids"][None]
        if images:
            images = {**images, "pixel_values": images["pixel_values"].double()}
            images["mm_token_type_ids"] = (ids == model.config.image_token_id).long()
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **images).logits
        return (logits[0, -row["response"] - 1 : -1] / TEMPERATURE).log_softmax(-1)

    made = []
    with torch.no_grad():
        for row in rows:
            p, images = log_softmax(row, row["images"]), row["images"]
            dependency = torch.full((row["response"],), UNSCORED, dtype=torch.float64)
            if images and row["draw"] != LEFT_OUT:
                pixels, grid = images["pixel_values"], images["image_grid_thw"]
                view = perturb(pixels, layout, blackened, seeded(SEED, STEP, row["draw"]), grid=grid)
                q = log_softmax(row, {**images, "pixel_values": view})
                dependency = (p.exp() * (p - q)).sum(-1)
            targets = row["input_ids"][-row["response"] :, None]
            entropy = -(p.exp() * p).sum(-1)
            made.append({"log_probs": p.gather(1, targets)[:, 0], "entropy": entropy, "dependency": dependency})
    return made


def response(column: list[Tensor], rows: list[dict[str, Any]]) -> list[Tensor]:
    return [values[-row["response"] - 1 : -1].double() for values, row in zip(column, rows, strict=True)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_are_those_of_full_logits_in_float64(layout: str, found: Any, rows: Any, exact: Any) -> None:
    before = found(layout)["before"]
    for name in ("log_probs", "entropy"):
        for ours, row in zip(response(before[name], rows), exact, strict=True):
            assert (ours - row[name]).abs().max() <= LOGPROB_BOUND
    for ours, row in zip(response(before["dependency"], rows), exact, strict=True):
        true = row["dependency"]
        bound = divergence_bound(true)
        assert ((ours - true).abs() <= bound).all(), (ours - true, bound)


def test_only_asked_rows_with_an_image_are_scored(found: Any, rows: Any) -> None:
    scored = [(values >= 0).all().item() for values in response(found("padded")["before"]["dependency"], rows)]
    assert scored == [bool(wanted and number is not None) for number, _, wanted in ROWS]


def test_places_that_predict_no_response_hold_zero(found: Any, rows: Any) -> None:
    before = found("packed")["before"]
    for column in before.values():
        for values, row in zip(column, rows, strict=True):
            assert (values[: -row["response"] - 1] == 0).all() and values[-1] == 0


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_the_update_is_the_same_in_every_layout(layout: str, found: Any, rows: Any) -> None:
    ours, other = found("padded"), found(layout)
    assert other["norm"] == pytest.approx(ours["norm"], rel=1e-5)
    for name in ("log_probs", "entropy"):
        for a, b in zip(response(ours["after"][name], rows), response(other["after"][name], rows), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-3)  # Adam's first step is the sign of a gradient near 0


def test_scores_and_update_are_those_of_stock_verl(found: Any, rows: Any) -> None:
    shown = [row for row in rows if row["images"]]
    stock, ours = found("stock", "shown"), found("padded", "shown")
    assert ours["norm"] == pytest.approx(stock["norm"], rel=1e-5)
    for when, bound in (("before", 2e-6), ("after", 2e-3)):
        for name in ("log_probs", "entropy"):
            for a, b in zip(response(stock[when][name], shown), response(ours[when][name], shown), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=bound)
