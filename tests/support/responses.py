"""Answers of a pretended run: what the tests of the figures and of the report show."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from vppo.demo.scored import ScoredResponse

SUMMARY: dict[str, Any] = {
    "algorithm": "vppo",
    "divergence": "kl",
    "seed": 0,
    "steps": 20,
    "accuracy_before": 0.25,
    "accuracy_after": 0.875,
    "held_out": 512,
    "dependency_digits": 1.5,
    "dependency_other": 0.0125,
    "seconds_warmup": 31.4,
    "seconds_train": 75.0,
    "seconds_per_step": 0.72,
    "peak_rss_mib": 1180.3,
    "versions": {"torch": "2.13.0"},
}


def response(
    tokens: list[str], dependency: list[float] | np.ndarray, *, correct: bool = True, question: str = "The sum?"
) -> ScoredResponse:
    """A response with these tokens; the dearer half of them is kept."""
    values = np.asarray(dependency, dtype=np.float32)
    image = Image.fromarray(np.arange(28 * 84 * 3, dtype=np.uint32).reshape(28, 84, 3).astype(np.uint8))
    return ScoredResponse(
        image=image,
        perturbed_image=image.point(lambda value: value // 2),
        question=question,
        answer="9",
        correct=correct,
        tokens=tokens,
        dependency=values,
        kept=values > np.median(values) if values.size else values.astype(bool),
    )


def responses(count: int) -> list[ScoredResponse]:
    """Answers to sums of three digits: much dependency at the digits, little or none elsewhere."""
    generator = np.random.default_rng(0)
    made = []
    for index in range(count):
        tokens = ["3", "+", "5", "+", "1", "=", "\\boxed{", "9", "}", "<|im_end|>"]
        dependency = 10 ** generator.uniform(-9, -1, len(tokens))
        dependency[[0, 2, 4]] = generator.uniform(0.5, 3.0, 3)
        dependency[5] = 0.0
        made.append(response(tokens, dependency, correct=index % 5 > 0))
    return made


def metrics(count: int, *, dependency: bool = True) -> list[dict[str, Any]]:
    """Lines of a run, with or without what only the algorithms that measure the dependency log."""
    rows: list[dict[str, Any]] = []
    for step in range(1, count + 1):
        share = step / count
        row: dict[str, Any] = {"step": step, "reward": share, "reward_std": 0.3, "rewards/accuracy_reward/mean": share}
        if dependency:
            row |= {"vppo/dependency_mean": 0.3 * share, "vppo/dependency_q50": 0.001, "vppo/dependency_q90": 1.1}
            row |= {"vppo/kept_fraction": 0.43, "vppo/alpha_min": 0.9, "vppo/alpha_mean": 1.0, "vppo/alpha_max": 1.2}
        rows.append(row)
    return rows
