"""Prompts with different numbers of images in one batch: each row is scored and trained on with its own images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support import families
from support.runs import batch_inputs, fix_rollouts, listen, plain_model, plain_views, response, rows, trainer
from torch import Tensor

from vppo import VPPOTrainer
from vppo.batch import IMAGE_INPUTS, TOKEN_INPUTS
from vppo_kernels import reference

NAMES = [family.name for family in [*families.FAMILIES, *families.IN_TILES]]
SIZES = ((56, 28), (28, 84))
COUNTS = [(0, 2), (1, 1), (2, 0, 1, 1), (3, 0, 0)]  # as many images as prompts, and so as rows
LENGTHS = (6, 3, 5, 1)  # of the responses to each prompt


def micro_batches(run: VPPOTrainer, data: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What TRL makes of a generation batch, shuffled and cut."""
    fix_rollouts(run, LENGTHS)
    run.model.train()
    run.current_gradient_accumulation_steps = run.args.gradient_accumulation_steps
    torch.manual_seed(0)
    run._prepare_inputs([row for row in data for _ in range(4)])
    assert run._buffered_inputs is not None
    return list(run._buffered_inputs)


@torch.no_grad()
def alone(model: Any, processor: Any, row: dict[str, Any], ids: Sequence[int]) -> Tensor:
    """`[T, V]` logits of a response by an ordinary forward of its row, which no other row is beside."""
    inputs = batch_inputs(model, processor, [{**row, "response_ids": list(ids)}])
    tokens = {
        "input_ids": torch.cat([inputs.pop("prompt_ids"), inputs.pop("completion_ids")], 1),
        "attention_mask": torch.cat([inputs.pop("prompt_mask"), inputs.pop("completion_mask")], 1),
    }
    images = {name: value for name, value in inputs.items() if name not in ("num_images", "num_tiles")}
    if not row["images"]:
        images = {}
    return model(**tokens, **images, use_cache=False).logits[0, -(len(ids) + 1) : -1]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("family", NAMES)
def test_rows_are_as_they_are_alone(
    family: str, counts: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their dependency, their old log-probabilities, and those of a training step with prompts shared and not."""
    data = rows(len(counts), SIZES, counts)
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": len(counts), "num_iterations": 2}
    run = trainer(tmp_path, data, family=family, **settings)
    seen = listen(monkeypatch)
    batches = micro_batches(run, data)
    for place in range(4 * len(counts)):
        row, ids = data[place // 4], response(place, LENGTHS[place % 4])
        expected = torch.zeros(len(ids), dtype=torch.float64)
        if row["images"]:
            key = (run.args.seed, 0, place // 4)
            views = plain_views(
                plain_model(run, torch.float64), run.processing_class, {**row, "response_ids": ids}, key
            )
            expected = reference.divergence(*views, kind="kl").divergence
            assert expected.max() > 1e-4
        torch.testing.assert_close(seen[0][place, : len(ids)].double(), expected, rtol=1e-4, atol=1e-6)

    plain = plain_model(run, torch.float32)
    for batch in batches:
        found = [batch["old_per_token_logps"]]
        for inputs in (None, batch):  # as in an evaluation, and as in a training step
            run._train_inputs = inputs
            found.append(
                run._get_per_token_logps_and_entropies(
                    run.model,
                    torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
                    torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
                    batch["completion_ids"].shape[1],
                    **{name: batch.get(name) for name in IMAGE_INPUTS + TOKEN_INPUTS + ("num_images", "num_tiles")},
                )[0]
            )
        for i, prompt in enumerate(batch["prompt"].tolist()):
            assert batch["num_images"][i] == counts[prompt // 4]
            ids = batch["completion_ids"][i, : int(batch["completion_mask"][i].sum())]
            logits = alone(plain, run.processing_class, data[prompt // 4], ids.tolist())
            expected = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
            for logprobs in found:
                torch.testing.assert_close(logprobs[i, : len(ids)], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("family", NAMES)
def test_training(family: str, counts: tuple[int, ...], tmp_path: Path) -> None:
    """With TRL's own sampling, and an evaluation at its end."""
    data = rows(len(counts), SIZES, counts)
    run = trainer(
        tmp_path, data, eval_data=data, family=family, gradient_accumulation_steps=len(counts), eval_strategy="steps"
    )
    run.train()
    shown = sum(count > 0 for count in counts) / len(counts)
    logs = run.state.log_history
    assert [log["vppo/scored_fraction"] for log in logs if "vppo/scored_fraction" in log] == [shown] * 2
    assert [log["eval_vppo/scored_fraction"] for log in logs if "eval_loss" in log] == [shown] * 2
    assert all(torch.isfinite(weight).all() for weight in run.model.parameters())
