"""The config: what recipes and algorithms fill in, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser

from vppo import VPPOConfig


def config(path: Path, **changes: Any) -> VPPOConfig:
    return VPPOConfig(output_dir=str(path), bf16=False, use_cpu=True, **changes)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("default", ("kl", "dapo", "batch", 0.0, None, "prompt")),
        ("paper", ("kl", "grpo", "batch", 0.0, None, "prompt")),
        ("official", ("k3", "dapo", "micro-batch", 0.06, 3.0, "rollout")),
    ],
)
def test_recipes(recipe: str, expected: tuple[Any, ...], tmp_path: Path) -> None:
    args = config(tmp_path, recipe=recipe)
    found = (args.divergence, args.loss_type, args.tas_statistics, args.nll_coef, args.delta, args.perturbation_scope)
    assert found == expected


def test_what_is_given_wins_over_the_recipe(tmp_path: Path) -> None:
    given = {"divergence": "jsd", "loss_type": "bnpo", "nll_coef": 0.12, "delta": 4.0, "perturbation_scope": "prompt"}
    args = config(tmp_path, recipe="official", tas_statistics="batch", **given)
    assert {name: getattr(args, name) for name in given} == given
    assert args.tas_statistics == "batch"


def test_defaults_are_the_papers(tmp_path: Path) -> None:
    args = config(tmp_path)
    assert (args.algorithm, args.recipe, args.keep_ratio, args.scale_min, args.scale_max) == (
        "vppo",
        "default",
        0.4,
        0.9,
        None,
    )
    assert (args.epsilon, args.epsilon_high, args.top_p, args.weight_decay) == (0.2, 0.28, 0.99, 0.01)
    assert (args.learning_rate, args.lr_scheduler_type, args.max_grad_norm) == (1e-6, "constant", 1.0)
    perturbation = args.make_perturbation(16)
    assert (perturbation.kind, perturbation.patch_size, perturbation.patch_probability) == ("patch", 16, 0.5)
    assert (perturbation.noise_std, perturbation.blur_radius) == (189.0, 6.0)
    assert config(tmp_path, patch_size=14).make_perturbation(16).patch_size == 14


@pytest.mark.parametrize(
    ("algorithm", "scores", "shaping"),
    [
        ("vppo", True, (0.4, None, 0.9, None)),
        ("tas", True, (1.0, None, 0.9, None)),
        ("tgf", True, (0.4, None, 1.0, 1.0)),
        ("random", True, (0.4, None, 1.0, 1.0)),
        ("entropy", True, (0.4, None, 1.0, 1.0)),
        ("oracle", True, (1.0, 0.0, 1.0, 1.0)),
        ("dapo", False, None),
        ("grpo", False, None),
    ],
)
def test_algorithms(algorithm: str, scores: bool, shaping: tuple[Any, ...] | None, tmp_path: Path) -> None:
    args = config(tmp_path, algorithm=algorithm)
    assert args.scores_tokens == scores
    if shaping is not None:
        assert tuple(args.shaping.values()) == shaping
    assert args.epsilon_high == (0.2 if algorithm == "grpo" else 0.28)
    assert config(tmp_path, algorithm=algorithm, epsilon_high=0.3).epsilon_high == 0.3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("algorithm", "ppo"),
        ("recipe", "mine"),
        ("divergence", "tv"),
        ("tas_statistics", "epoch"),
        ("perturbation", "black"),
        ("perturbation_scope", "step"),
        ("prefix_sharing", True),
        ("scoring_memory", 0.0),
        ("keep_ratio", 0.0),
        ("keep_ratio", 1.5),
        ("keep_ratio", float("nan")),
        ("keep_threshold", -0.1),
        ("keep_threshold", float("nan")),
        ("keep_threshold", float("inf")),
        ("keep_threshold", "0.1"),
        ("keep_threshold", True),
        ("keep_threshold", 1e39),
        ("keep_ratio", "0.4"),
        ("scale_min", "0.9"),
        ("scale_max", "1.1"),
        ("papo_kl_coef", "0.1"),
        ("papo_entropy_coef", -0.1),
        ("draws", 0),
        ("draws", 1.5),
        ("draws", True),
        ("scale_min", 0.0),
        ("scale_min", 1.5),
        ("scale_max", 0.5),
        ("patch_size", 0),
        ("patch_size", 14.5),
        ("patch_probability", -0.1),
        ("patch_probability", 1.1),
        ("noise_std", 0.0),
        ("blur_radius", -1.0),
        ("nll_coef", float("nan")),
        ("temperature", 0.0),
        ("temperature", float("nan")),
        ("per_device_train_batch_size", 0),
        ("gradient_accumulation_steps", 0),
    ],
)
def test_refused(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{name}: got {value!r}, takes ")):
        config(tmp_path, **{name: value})


@pytest.mark.parametrize(("algorithm", "expected"), [("vppo", (0.3, 0.05)), ("tgf", (0.3, 0.05)), ("tas", (1.0, None))])
def test_the_gate_as_the_algorithm_uses_it(algorithm: str, expected: tuple[Any, ...], tmp_path: Path) -> None:
    """What does not filter takes no notice of it, so that one config serves for all."""
    shaping = config(tmp_path, algorithm=algorithm, keep_ratio=0.3, keep_threshold=0.05).shaping
    assert (shaping["keep_ratio"], shaping["keep_threshold"]) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "random", "keep_threshold": 0.1}, "keep_threshold: got 0.1, takes None with algorithm 'random'"),
        ({"algorithm": "oracle", "keep_threshold": 0.1}, "keep_threshold: got 0.1, takes None with algorithm 'oracle'"),
        ({"perturbation": "blur", "draws": 2}, "draws: got 2, takes 1 with 'blur', which is always the same"),
        ({"perturbation": "grey", "draws": 4}, "draws: got 4, takes 1 with 'grey'"),
    ],
    ids=str,
)
def test_what_does_not_go_together(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        config(tmp_path, **changes)


def test_scale_min_above_one_needs_a_scale_max(tmp_path: Path) -> None:
    """The dynamic maximum would lie below the minimum, and could turn advantages around."""
    assert config(tmp_path, scale_min=1.5, scale_max=2.0).shaping["scale_min"] == 1.5


def test_command_line_types(tmp_path: Path) -> None:
    line = f"--output_dir {tmp_path} --bf16 false --use_cpu true --divergence k3 --scale_max 1.2 --patch_size 28 "
    line += "--keep_threshold 0.05 --draws 4"
    (args,) = HfArgumentParser(VPPOConfig).parse_args_into_dataclasses(line.split())
    assert (args.divergence, args.scale_max, args.patch_size, args.nll_coef) == ("k3", 1.2, 28, 0.0)
    assert (args.keep_threshold, args.draws) == (0.05, 4)
