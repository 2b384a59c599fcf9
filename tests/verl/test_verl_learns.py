"""A reward that learns: the demo's digits through verl's trainer, from a warm model of the demo. It takes minutes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

STEPS, PROMPTS, ROLLOUTS = 80, 16, 8
SEED = 2  # of the demo's three the one that learns soonest
ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
ACCURACY = "val-core/digits/acc/mean@1"  # greedy, of strips of images that training has not seen


@pytest.mark.slow
def test_greedy_accuracy_on_held_out_digits_grows_by_a_fifth(
    bench: Callable[..., None], train: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "digits"
    bench("bench_digits.py", folder, STEPS, PROMPTS, SEED)
    steps = train(
        tmp_path / "run",
        "trainer.v1.trainer_mode=vppo_colocate_async",  # it samples while it trains
        "trainer.v1.colocate_async.num_warmup_batches=1",
        f"data.val_files={folder / 'held_out.parquet'}",
        f"data.train_batch_size={PROMPTS}",
        "data.max_response_length=20",
        f"{ACTOR}.ppo_mini_batch_size={PROMPTS}",
        f"{ACTOR}.ppo_micro_batch_size_per_gpu={PROMPTS * ROLLOUTS}",
        f"{ACTOR}.optim.lr=1.5e-4",
        f"{ACTOR}.optim.weight_decay=0",
        f"{ACTOR}.clip_ratio_high=0.28",
        f"{ROLLOUT}.n={ROLLOUTS}",
        f"{ROLLOUT}.agent.default_agent_loop=shared_prompt",
        f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu={PROMPTS * ROLLOUTS}",
        "trainer.val_before_train=True",
        f"trainer.test_freq={STEPS}",
        f"trainer.total_training_steps={STEPS}",
        folder=folder,
        BENCH_MODULES="bench_agent",
    )
    found = [step[ACCURACY] for step in steps if ACCURACY in step]
    print(f"\nheld-out accuracy: {found}")
    assert found[-1] >= found[0] + 0.2
