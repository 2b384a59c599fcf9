"""What verl's engine measures and trains, in every layout, against float64 and against stock verl."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import bench_torchvision  # noqa: F401  (before transformers)
import pytest
import torch
from bench_engine_settings import SCALE_MIN, SEED, STEP, TEMPERATURE
from bench_tiny import picture
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from vppo.perturbations import Perturbation, PixelLayout, perturb, seeded
from vppo_kernels.reference import LOGPROB_BOUND, divergence_bound

UNSCORED, LEFT_OUT = -2.0, -1  # of vppo.verl.engine, which needs the bench's own process
# of each row: its picture's number or None for text alone, its response's tokens, whether it is scored.
# Two ranks have six rows each, in micro-batches of two: one of text beside one of pictures, two of both, and two in
# which no row is scored.
ROWS = [(0, 7, 1), (0, 4, 1), (1, 5, 0), (2, 9, 1), (3, 6, 0), (3, 3, 0)]
ROWS += [(None, 5, 1), (None, 8, 1), (4, 1, 1), (None, 4, 1), (None, 6, 1), (5, 5, 0)]
# mean dependency as a trainer tells it; NaN of rows that enter no statistic, in some micro-batches of both
MEANS = [0.2, 0.7, math.nan, 1.1, math.nan, math.nan, math.nan, math.nan, 0.1, math.nan, math.nan, math.nan]
# of each model its layouts, on one rank and on two; see `bench_engine.py`
RUNS = {
    ("", 1): (
        "padded", "apart", "checkpointed", "offloaded", "offload-policy", "lora-on-head", "k3", "prob_drop",
        "released-scale", "scaled-by-hand",
        *(f"{whose}{kind}-shown" for kind in ("padded", "bf16", "lora") for whose in ("", "stock-")), "flash",
    ),
    ("", 2): ("padded", "packed", "ulysses"),
    ("tied", 1): ("padded",),
    ("qwen3", 1): ("padded", "packed"),
}  # fmt: skip
EXACT = [("", 1, "padded"), *(("", 2, layout) for layout in RUNS["", 2]), ("", 1, "apart"), ("", 1, "flash")]
EXACT += [("tied", 1, "padded"), ("qwen3", 1, "padded"), ("qwen3", 1, "packed")]
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def rows_of(tiny_of: Callable[[str], Path]) -> Callable[[str], Rows]:
    """Prompts and random answers for a model, each with an advantage a token, half of them filtered."""

    @cache
    def make(kind: str) -> Rows:
        processor = AutoProcessor.from_pretrained(tiny_of(kind))
        draw = torch.Generator().manual_seed(5)
        made = []
        alphas = released_factors()
        for (number, length, scored), mean, alpha in zip(ROWS, MEANS, alphas, strict=True):
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
                    "mean": mean,
                    "alpha": alpha,
                }
            )
        torch.save(made, tiny_of(kind) / "rows.pt")
        return made

    return make


@pytest.fixture(scope="module")
def rows(rows_of: Callable[[str], Rows]) -> Rows:
    return rows_of("")


@pytest.fixture(scope="module")
def folder_of(rows_of: Any, tiny_of: Any, engine: Any, tmp_path_factory: Any) -> Callable[[str, int], Path]:
    """Where the layouts of `RUNS` have left what they returned."""

    @cache
    def run(kind: str, ranks: int) -> Path:
        rows_of(kind)
        folder = tmp_path_factory.mktemp("engine")
        engine(tiny_of(kind), folder, ranks, *RUNS[kind, ranks])
        return folder

    return run


@pytest.fixture(scope="module")
def found(folder_of: Callable[[str, int], Path]) -> Callable[..., Any]:
    """What the ranks of a layout returned, their columns joined in the order of the rows."""

    @cache
    def read(kind: str, ranks: int, layout: str) -> dict[str, Any]:
        folder = folder_of(kind, ranks)
        parts = [torch.load(folder / f"{layout}.{rank}.pt", weights_only=False) for rank in range(ranks)]
        if layout == "ulysses":
            parts = parts[:1]  # both ranks hold all rows; one returns them
        assert len({one["norm"] for one in parts}) == 1
        return {
            "norm": parts[0]["norm"],
            "patches": sum(one["patches"] for one in parts),
            "reached": sum(one["reached"] for one in parts),
            **{
                when: {name: [row for one in parts for row in one[when][name]] for name in parts[0][when]}
                for when in ("before", "after")
            },
        }

    return read


@pytest.fixture(scope="module")
def exact_of(tiny_of: Any, rows_of: Any) -> Callable[[str], list[dict[str, Tensor]]]:
    """Log-probabilities, entropies and dependency of the response tokens, from float64 logits over the vocabulary."""

    @cache
    @torch.no_grad()
    def make(kind: str) -> list[dict[str, Tensor]]:
        model = AutoModelForImageTextToText.from_pretrained(tiny_of(kind), dtype=torch.float64).eval()
        layout = PixelLayout.of(AutoProcessor.from_pretrained(tiny_of(kind)).image_processor)
        blackened = Perturbation("patch", layout.patch_size, 0.5)

        def log_softmax(row: dict[str, Any], images: dict[str, Tensor]) -> Tensor:
            ids = row["input_ids"][None]
            if images:
                images = {**images, "pixel_values": images["pixel_values"].double()}
                images["mm_token_type_ids"] = (ids == model.config.image_token_id).long()
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **images).logits
            return (logits[0, -row["response"] - 1 : -1] / TEMPERATURE).log_softmax(-1)

        made = []
        for row in rows_of(kind):
            p, images = log_softmax(row, row["images"]), row["images"]
            dependency = torch.full((row["response"],), UNSCORED, dtype=torch.float64)
            targets = row["input_ids"][-row["response"] :, None]
            k3 = prob_drop = dependency
            if images and row["draw"] != LEFT_OUT:
                pixels, grid = images["pixel_values"], images["image_grid_thw"]
                view = perturb(pixels, layout, blackened, seeded(SEED, STEP, row["draw"]), grid=grid)
                q = log_softmax(row, {**images, "pixel_values": view})
                dependency = (p.exp() * (p - q)).sum(-1)
                clean, other = p.gather(1, targets)[:, 0], q.gather(1, targets)[:, 0]
                k3, prob_drop = (other - clean).expm1() - (other - clean), clean.exp() - other.exp()
            made.append(
                {
                    "log_probs": p.gather(1, targets)[:, 0],
                    "entropy": -(p.exp() * p).sum(-1),
                    **{"dependency": dependency, "k3": k3, "prob_drop": prob_drop},
                }
            )
        return made

    return make


def released_factors() -> list[float]:
    """Of one rank's rows: by the mini-batch's minimum and maximum, with a mean of 1 over each micro-batch of two."""
    known = [mean for mean in MEANS if not math.isnan(mean)]
    low, high = min(known), max(known)
    factors = []
    for pair in (MEANS[i : i + 2] for i in range(0, len(MEANS), 2)):
        heights = [(mean - low) / (high - low) for mean in pair if not math.isnan(mean)]
        average = sum(heights) / len(heights) if heights else 1.0
        slope = (1 - SCALE_MIN) / average if average else 0.0  # of the minimum alone, whose factor is the smallest
        factors += [1.0 if math.isnan(mean) else SCALE_MIN + slope * (mean - low) / (high - low) for mean in pair]
    return factors


def response(column: list[Tensor], rows: Rows) -> list[Tensor]:
    return [values[-row["response"] - 1 : -1].double() for values, row in zip(column, rows, strict=True)]


@pytest.mark.parametrize(("kind", "ranks", "layout"), EXACT)
def test_scores_are_those_of_full_logits_in_float64(
    kind: str, ranks: int, layout: str, found: Any, rows_of: Any, exact_of: Any
) -> None:
    before, rows, exact = found(kind, ranks, layout)["before"], rows_of(kind), exact_of(kind)
    for name in ("log_probs", "entropy"):
        for ours, row in zip(response(before[name], rows), exact, strict=True):
            assert (ours - row[name]).abs().max() <= LOGPROB_BOUND
    for ours, row in zip(response(before["dependency"], rows), exact, strict=True):
        true = row["dependency"]
        bound = divergence_bound(true)
        assert ((ours - true).abs() <= bound).all(), (ours - true, bound)


@pytest.mark.parametrize("kind", ["k3", "prob_drop"])
def test_sampled_dependency_is_that_of_float64(kind: str, found: Any, rows: Any, exact_of: Any) -> None:
    ours = torch.cat(response(found("", 1, kind)["before"]["dependency"], rows))
    true, k3 = (torch.cat([row[name] for row in exact_of("")]) for name in (kind, "k3"))
    scored = true != UNSCORED
    assert torch.equal(ours[~scored], true[~scored]) and scored.any()
    slope = 1 + (2 * k3[scored]).sqrt() + k3[scored]  # at least |exp(d) - 1|, how fast k3 grows with d
    assert ((ours - true)[scored].abs() <= 2 * LOGPROB_BOUND * slope).all()
    assert (true[scored] < 0).any() == (kind == "prob_drop")  # some tokens grow more probable


@pytest.mark.parametrize("kind", ["padded", "prob_drop"])
def test_only_asked_rows_with_an_image_are_scored(kind: str, found: Any, rows: Any) -> None:
    scored = [values != UNSCORED for values in response(found("", 1, kind)["before"]["dependency"], rows)]
    expected = [bool(wanted and number is not None) for number, _, wanted in ROWS]
    assert [bool(tokens.all()) for tokens in scored] == [bool(tokens.any()) for tokens in scored] == expected


@pytest.mark.parametrize(("kind", "layout"), [("", "padded"), ("", "flash"), ("qwen3", "packed")])
def test_rows_of_one_prompt_pass_its_perturbed_image_once(kind: str, layout: str, found: Any, rows_of: Any) -> None:
    rows, none = rows_of(kind), 16  # of text alone, verl passes an empty image of 16 patches
    patches = [len(row["images"].get("pixel_values", ())) for row in rows]
    clean = sum(sum(patches[i : i + 2]) or none for i in range(0, len(rows), 2))
    once = sum(patches[row] for row in (0, 3, 8))  # 0 and 1 are of one prompt
    assert found(kind, 1, layout)["patches"] == clean + once
    if kind == "":
        assert found(kind, 1, "apart")["patches"] == clean + once + patches[1]


def test_places_that_predict_no_response_hold_zero(found: Any, rows: Any) -> None:
    before = found("", 2, "packed")["before"]
    for column in before.values():
        for values, row in zip(column, rows, strict=True):
            assert (values[: -row["response"] - 1] == 0).all() and values[-1] == 0


SAME = [(2, layout) for layout in RUNS["", 2]]
SAME += [(1, layout) for layout in ("apart", "checkpointed", "offloaded", "offload-policy", "flash")]


@pytest.mark.parametrize(("ranks", "layout"), SAME)
def test_scores_and_update_are_the_same_in_every_layout(ranks: int, layout: str, found: Any, rows: Any) -> None:
    ours, other = found("", 1, "padded"), found("", ranks, layout)
    assert other["norm"] == pytest.approx(ours["norm"], rel=1e-5)
    close(ours, other, rows, before=1e-5)
    close_dependency(ours, other, rows)


def test_lora_is_measured_as_the_model_that_it_has_not_changed_yet(found: Any, rows: Any) -> None:
    shown = [row for row in rows if row["images"]]
    close_dependency(found("", 1, "padded-shown"), found("", 1, "lora-shown"), shown)


@pytest.mark.parametrize("kind", ["padded", "lora"])
def test_scores_and_update_are_those_of_stock_verl(kind: str, found: Any, rows: Any) -> None:
    shown = [row for row in rows if row["images"]]  # verl breaks at text alone
    stock, ours = found("", 1, f"stock-{kind}-shown"), found("", 1, f"{kind}-shown")
    assert ours["norm"] == pytest.approx(stock["norm"], rel=1e-5)
    close(stock, ours, shown, before=2e-6)


@pytest.mark.parametrize(("ranks", "layout"), [(1, "padded"), (1, "checkpointed"), (2, "packed")])
def test_tokens_that_are_filtered_send_no_gradient_to_the_head(ranks: int, layout: str, found: Any, rows: Any) -> None:
    trained = sum(int((row["advantages"] != 0).sum()) for row in rows)
    assert 0 < found("", ranks, layout)["reached"] <= trained < sum(row["response"] for row in rows)


def test_factors_of_the_released_code_are_found_in_the_worker(found: Any) -> None:
    ours, plain = found("", 1, "released-scale")["norm"], found("", 1, "padded")["norm"]
    assert ours == pytest.approx(found("", 1, "scaled-by-hand")["norm"], rel=1e-6)
    assert ours != pytest.approx(plain, rel=1e-3)


def test_bf16_is_rounded_as_much_as_stock_verl(found: Any, rows: Any, exact_of: Any) -> None:
    """Both are compared with float64; of ours, hidden states alone are rounded, not logits."""
    exact = [row for row, given in zip(exact_of(""), rows, strict=True) if given["images"]]
    shown = [row for row in rows if row["images"]]
    stock, ours = found("", 1, "stock-bf16-shown"), found("", 1, "bf16-shown")
    assert ours["norm"] == pytest.approx(stock["norm"], rel=0.05)

    def error(of: Any, name: str) -> Tensor:
        columns = zip(response(of["before"][name], shown), exact, strict=True)
        return torch.cat([values - row[name] for values, row in columns])

    for name in ("log_probs", "entropy"):
        assert error(ours, name).square().mean() <= 1.5 * error(stock, name).square().mean()
    true = torch.cat([row["dependency"] for row in exact])
    scored = true >= 0
    assert error(ours, "dependency")[scored].norm() <= 0.1 * true[scored].norm()


def test_lora_on_the_head_is_refused(found: Any, folder_of: Any) -> None:
    said = (folder_of("", 1) / "lora-on-head.txt").read_text()
    assert said.startswith("actor_rollout_ref.model.target_modules: got a head of type Linear, takes modules other")


def close_dependency(one: Any, other: Any, rows: Rows) -> None:
    pairs = zip(*(response(of["before"]["dependency"], rows) for of in (one, other)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def close(one: Any, other: Any, rows: Rows, *, before: float) -> None:
    """Log-probabilities and entropy are, before the update and after it."""
    for when, bound in (("before", before), ("after", 2e-3)):  # Adam's first step is the sign of a gradient near 0
        for name in ("log_probs", "entropy"):
            for a, b in zip(response(one[when][name], rows), response(other[when][name], rows), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=bound)
