"""Products of the head as the trainer counts them, against what its rows must take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from vppo.config import VPPOConfig
from vppo.demo.batches import forbidden_tokens
from vppo.demo.digits import strips
from vppo.demo.head_products import CountingTrainer, HeadProducts
from vppo.demo.model import build_model, build_processor
from vppo_kernels.linear_head import LinearHead


def rewarded_by_turns(completions: list[Any], **kwargs: Any) -> list[float]:
    """A signal in every group but the last."""
    return [float(row % 2) if row < len(completions) - 4 else 0.0 for row in range(len(completions))]


def trained(tmp_path: Path, **options: Any) -> list[dict[str, float]]:
    processor = build_processor()
    model = build_model(processor, 0, 64)
    args = VPPOConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=12, num_generations=4,
        max_completion_length=6, generation_kwargs={"suppress_tokens": forbidden_tokens(processor)}, bf16=False,
        gradient_checkpointing=False, use_cpu=True, logging_steps=1, save_strategy="no", report_to="none",
        disable_tqdm=True, **options,
    )  # fmt: skip
    data = Dataset.from_list([strip.row for strip in strips("train", 6, seed=0)])
    trainer = CountingTrainer(model, rewarded_by_turns, args, train_dataset=data, processing_class=processor)
    before = LinearHead.logits
    trainer.train()
    assert LinearHead.logits is before
    return [row for row in trainer.state.log_history if "head/tokens" in row]


@pytest.mark.parametrize("algorithm", ["dapo", "tgf"])
def test_every_product_is_counted(tmp_path: Path, algorithm: str) -> None:
    rows = trained(tmp_path, algorithm=algorithm)
    assert len(rows) == 2
    for row in rows:
        tokens, active = row["head/tokens"], row["head/active"]
        assert 0 < active < tokens <= 12 * 6
        # logits once more, the gradient of the row, and its part of the weight's
        assert row["head/backward"] == pytest.approx(3 * active)
        if algorithm == "dapo":
            assert row["head/scoring"] == 0
            # TRL multiplies what is padded, too
            assert tokens <= row["head/forward"] + 1e-6 <= 12 * 6 + 1e-3
        else:
            live = row["head/scoring"] / 2  # both views of the groups with a signal
            assert active <= live < tokens
            assert live - 1e-6 <= row["head/forward"] <= tokens + 1e-6
    found = HeadProducts.of([{"loss": 1.0}, *rows])
    assert found.tokens == sum(row["head/tokens"] for row in rows)
    assert found.training + found.left_out == pytest.approx(4 * found.tokens)


def test_nothing_was_counted() -> None:
    found = HeadProducts.of([{"step": 1, "loss": 0.5}, {"step": 2, "head/tokens": None}])
    assert found == HeadProducts() and found.left_out == 0


def test_a_product_is_a_row_times_the_whole_weight(tmp_path: Path) -> None:
    """Also where the vocabulary is walked in tiles."""
    from vppo_kernels import linear_logprob, workspace_limit

    trainer = CountingTrainer.__new__(CountingTrainer)
    trainer._products, trainer._in_loss = HeadProducts(), True
    hidden, weight = torch.randn(700, 8, requires_grad=True), torch.randn(3001, 8, requires_grad=True)
    with trainer._counting(), workspace_limit(1 << 20):
        found = linear_logprob(hidden, weight, torch.zeros(700, dtype=torch.long))
        found.logprobs[:70].sum().backward()
    assert trainer._products.forward == pytest.approx(700)
    assert trainer._products.backward == pytest.approx(3 * 70)
