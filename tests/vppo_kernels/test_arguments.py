"""Bad input: the error names the argument, what it got and what it takes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vppo_kernels import (
    divergence,
    linear_divergence,
    linear_logprob,
    linear_vppo_loss,
    sampled_divergence,
    topk_mask,
    topk_mask_,
    trajectory_scale,
    trajectory_stats,
    vppo_advantages,
    vppo_loss,
)
from vppo_kernels.shaping import TrajectoryStats

B, T, D, V = 3, 5, 4, 11
tokens, scores, mask = torch.zeros(B, T).long(), torch.rand(B, T), torch.ones(B, T)
hidden, weight, bias = torch.randn(B, T, D), torch.randn(V, D), torch.randn(V)
meta = torch.device("meta")

GOOD: dict[Callable[..., Any], dict[str, Any]] = {
    linear_divergence: dict(hidden=hidden, hidden_perturbed=hidden, weight=weight, bias=bias, targets=tokens),
    linear_logprob: dict(hidden=hidden, weight=weight, targets=tokens, bias=bias),
    divergence: dict(logits=torch.randn(B, V), logits_perturbed=torch.randn(B, V), targets=torch.zeros(B).long()),
    sampled_divergence: dict(logprobs=scores, logprobs_perturbed=scores),
    topk_mask: dict(scores=scores, mask=mask, keep_ratio=0.4),
    topk_mask_: dict(scores=scores.clone(), mask=mask, keep_ratio=0.4),
    trajectory_stats: dict(scores=scores, mask=mask),
    trajectory_scale: dict(scores=scores, mask=mask),
    vppo_advantages: dict(advantages=torch.ones(B), dependency=scores, mask=mask),
    vppo_loss: dict(logprobs=-scores, old_logprobs=-scores, advantages=torch.ones(B), mask=mask, dependency=scores),
    linear_vppo_loss: dict(
        hidden=hidden, weight=weight, targets=tokens, old_logprobs=-scores, advantages=torch.ones(B), mask=mask
    ),
}
HEADS = (linear_divergence, linear_logprob, linear_vppo_loss)
WITH_HIDDEN = (linear_divergence, linear_logprob)
LOSSES = (vppo_loss, linear_vppo_loss)
KEEPERS = (topk_mask, topk_mask_, vppo_advantages)
SCALERS = (trajectory_scale, vppo_advantages)
GROUPED = (trajectory_stats, *SCALERS, *LOSSES)
SELECTORS = (topk_mask, topk_mask_)
TOKENS = (topk_mask, topk_mask_, trajectory_stats, trajectory_scale, vppo_advantages, vppo_loss)
PACKED = dict(scores=scores.flatten(), mask=mask.flatten())
SCORED = (topk_mask, topk_mask_, trajectory_scale, trajectory_stats)

# functions, what is changed, the error, and what its message holds: argument, got, takes
BAD: list[tuple[tuple[Callable[..., Any], ...], dict[str, Any], type[Exception], tuple[str, ...]]] = [
    # types and dtypes
    (HEADS, dict(hidden=[1.0]), TypeError, ("hidden: got list", "takes a torch.Tensor")),
    (HEADS, dict(hidden=hidden.long()), TypeError, ("hidden: got dtype torch.int64", "takes float32, bfloat16")),
    (HEADS, dict(weight=weight.int()), TypeError, ("weight: got dtype torch.int32",)),
    (HEADS, dict(bias=bias.bool()), TypeError, ("bias: got dtype torch.bool",)),
    (HEADS, dict(targets=tokens.float()), TypeError, ("targets: got dtype torch.float32", "takes int64 or int32")),
    (HEADS, dict(targets=3), TypeError, ("targets: got int",)),
    (SCORED, dict(scores=scores.long()), TypeError, ("scores: got dtype torch.int64",)),
    (SCORED, dict(mask=None), TypeError, ("mask: got NoneType",)),
    (LOSSES, dict(mask=None), TypeError, ("mask: got NoneType",)),
    (LOSSES, dict(advantages=torch.ones(B).long()), TypeError, ("advantages: got dtype torch.int64",)),
    (LOSSES, dict(old_logprobs=scores.long()), TypeError, ("old_logprobs: got dtype torch.int64",)),
    (LOSSES, dict(dependency=[0.0]), TypeError, ("dependency: got list",)),
    ((vppo_loss,), dict(logprobs="x"), TypeError, ("logprobs: got str",)),
    ((divergence,), dict(logits=torch.zeros(B, V).long()), TypeError, ("logits: got dtype",)),
    ((divergence,), dict(logits_perturbed=None), TypeError, ("logits_perturbed: got NoneType",)),
    ((sampled_divergence,), dict(logprobs=0.5), TypeError, ("logprobs: got float",)),
    ((vppo_advantages,), dict(has_image=[True]), TypeError, ("has_image: got list",)),
    # shapes
    (WITH_HIDDEN, dict(hidden=torch.randn(B, T, D + 1)), ValueError, ("hidden: got shape [3, 5, 5]", "[..., 4]")),
    ((linear_vppo_loss,), dict(hidden=torch.randn(B * T, D)), ValueError, ("hidden: got shape [15, 4]", "[B, T, D]")),
    ((linear_divergence,), dict(hidden_perturbed=hidden[:2]), ValueError, ("hidden_perturbed: got shape [2, 5, 4]",)),
    (HEADS, dict(weight=torch.randn(V)), ValueError, ("weight: got shape [11]", "takes [V, D]")),
    (HEADS, dict(weight=torch.randn(0, D), bias=None), ValueError, ("weight: got shape [0, 4]",)),
    (WITH_HIDDEN, dict(hidden=torch.randn(2, 0), weight=torch.randn(V, 0)), ValueError, ("weight: got shape [11, 0]",)),
    (HEADS, dict(bias=torch.randn(V + 1)), ValueError, ("bias: got shape [12]", "takes [11]")),
    (HEADS, dict(targets=tokens[:, :4]), ValueError, ("targets: got shape [3, 4]", "takes [3, 5]")),
    ((divergence,), dict(logits_perturbed=torch.randn(B, V - 1)), ValueError, ("logits_perturbed: got shape [3, 10]",)),
    ((divergence,), dict(logits=torch.randn(())), ValueError, ("logits: got shape []", "[..., V]")),
    ((divergence,), dict(targets=tokens), ValueError, ("targets: got shape [3, 5]", "takes [3]")),
    ((sampled_divergence,), dict(logprobs_perturbed=scores[0]), ValueError, ("logprobs_perturbed: got shape [5]",)),
    (SCORED, dict(scores=scores[0]), ValueError, ("scores: got shape [5]", "takes [B, T]")),
    (SCORED, dict(mask=mask[:, :4]), ValueError, ("mask: got shape [3, 4]", "takes [3, 5]")),
    (
        (vppo_advantages,),
        dict(advantages=torch.ones(B + 1)),
        ValueError,
        ("advantages: got shape [4]", "[3] or [3, 5]"),
    ),
    ((vppo_advantages,), dict(has_image=mask), ValueError, ("has_image: got shape [3, 5]", "takes [3]")),
    (LOSSES, dict(mask=mask[:2]), ValueError, ("mask: got shape [2, 5]",)),
    (LOSSES, dict(dependency=scores[:2]), ValueError, ("dependency: got shape [2, 5]",)),
    (LOSSES, dict(advantages=torch.ones(T)), ValueError, ("advantages: got shape [5]",)),
    (LOSSES, dict(is_weights=torch.ones(B)), ValueError, ("is_weights: got shape [3]", "takes [3, 5]")),
    ((vppo_loss,), dict(logprobs=scores[0]), ValueError, ("logprobs: got shape [5]", "takes [B, T]")),
    ((vppo_loss,), dict(entropy=scores[0]), ValueError, ("entropy: got shape [5]",)),
    # packed rows
    (SELECTORS, dict(cu_seqlens=torch.tensor([0, 15])), ValueError, ("scores: got shape [3, 5]", "takes [total]")),
    (SELECTORS, dict(PACKED, cu_seqlens=[0, 15]), TypeError, ("cu_seqlens: got list",)),
    (SELECTORS, dict(PACKED, cu_seqlens=torch.tensor([0.0, 15])), TypeError, ("cu_seqlens: got dtype torch.float32",)),
    (SELECTORS, dict(PACKED, cu_seqlens=torch.tensor(15)), ValueError, ("cu_seqlens: got shape []", "takes [B + 1]")),
    (SELECTORS, dict(PACKED, cu_seqlens=torch.tensor([0, 15], device=meta)), ValueError, ("cu_seqlens: got device",)),
    (SELECTORS, dict(PACKED, cu_seqlens=torch.tensor([0, 14])), ValueError, ("cu_seqlens: got [0, 14]", "0 to 15")),
    (SELECTORS, dict(PACKED, cu_seqlens=torch.tensor([0, 9, 8, 15])), ValueError, ("cu_seqlens: got [0, 9, 8, 15]",)),
    # devices
    (WITH_HIDDEN, dict(hidden=hidden.to(meta)), ValueError, ("hidden: got device meta", "takes cpu")),
    ((linear_divergence,), dict(hidden_perturbed=hidden.to(meta)), ValueError, ("hidden_perturbed: got device meta",)),
    (HEADS, dict(bias=bias.to(meta)), ValueError, ("bias: got device meta",)),
    (HEADS, dict(targets=tokens.to(meta)), ValueError, ("targets: got device meta",)),
    (
        (divergence,),
        dict(logits_perturbed=torch.randn(B, V, device=meta)),
        ValueError,
        ("logits_perturbed: got device",),
    ),
    ((sampled_divergence,), dict(logprobs_perturbed=scores.to(meta)), ValueError, ("logprobs_perturbed: got device",)),
    (SCORED, dict(mask=mask.to(meta)), ValueError, ("mask: got device meta",)),
    ((vppo_advantages,), dict(advantages=torch.ones(B, device=meta)), ValueError, ("advantages: got device meta",)),
    ((vppo_advantages,), dict(has_image=torch.ones(B, device=meta)), ValueError, ("has_image: got device meta",)),
    (LOSSES, dict(old_logprobs=scores.to(meta)), ValueError, ("old_logprobs: got device meta",)),
    (LOSSES, dict(dependency=scores.to(meta)), ValueError, ("dependency: got device meta",)),
    (LOSSES, dict(ref_logprobs=scores.to(meta), kl_coef=1.0), ValueError, ("ref_logprobs: got device meta",)),
    # ranges
    (HEADS, dict(targets=tokens + V), ValueError, ("targets: got 11 at row 0", "takes 0..10")),
    (HEADS, dict(targets=tokens - 100), ValueError, ("targets: got -100 at row 0",)),
    (HEADS, dict(targets=tokens + 7, vocab_size=7), ValueError, ("targets: got 7 at row 0", "takes 0..6")),
    ((divergence,), dict(targets=torch.tensor([0, 0, V])), ValueError, ("targets: got 11 at row 2",)),
    *(
        ((*HEADS, divergence), {"temperature": value}, ValueError, (f"temperature: got {value!r}", "above 0"))
        for value in (0, 0.0, -1.0, float("nan"), float("inf"), "1", None)
    ),
    ((*HEADS, divergence), dict(softcap=0.0), ValueError, ("softcap: got 0.0", "above 0")),
    ((*HEADS, divergence), dict(softcap=-30.0), ValueError, ("softcap: got -30.0",)),
    ((*HEADS, divergence), dict(logit_scale=float("inf")), ValueError, ("logit_scale: got inf", "finite")),
    *(
        ((*HEADS, divergence), {"vocab_size": value}, ValueError, (f"vocab_size: got {value!r}", "from 1 to 11"))
        for value in (0, -1, V + 1, 3.0, True, "7")
    ),
    ((*HEADS, divergence, *TOKENS), dict(backend="cuda"), ValueError, ("backend: got 'cuda'", "'auto', 'torch'")),
    ((linear_divergence, divergence), dict(kind="KL"), ValueError, ("kind: got 'KL'", "'kl', 'reverse_kl', 'jsd'")),
    ((sampled_divergence,), dict(kind="k4"), ValueError, ("kind: got 'k4'", "'k3'")),
    ((sampled_divergence,), dict(clamp=0.0), ValueError, ("clamp: got 0.0",)),
    *(
        ((*KEEPERS, *LOSSES), {"keep_ratio": value}, ValueError, (f"keep_ratio: got {value!r}", "at most 1"))
        for value in (0.0, -0.1, 1.1, float("nan"), "0.4")
    ),
    *(
        ((*KEEPERS, *LOSSES), {"keep_threshold": value}, ValueError, (f"keep_threshold: got {value!r}", "at least 0"))
        for value in (-0.1, float("nan"), float("inf"), 1e39, "0.4")
    ),
    ((*SCALERS, *LOSSES), dict(scale_min=0.0), ValueError, ("scale_min: got 0.0", "above 0")),
    ((*SCALERS, *LOSSES), dict(scale_max=-1.0), ValueError, ("scale_max: got -1.0", "above 0")),
    ((*SCALERS,), dict(stats=TrajectoryStats(0, 1, 0.5), stats_group=1), TypeError, ("stats_group: got int",)),
    (LOSSES, dict(clip_low=-0.1), ValueError, ("clip_low: got -0.1", "at least 0")),
    (LOSSES, dict(clip_low=1.5), ValueError, ("clip_low: got 1.5", "0 to 1")),
    (LOSSES, dict(clip_high=float("nan")), ValueError, ("clip_high: got nan",)),
    (LOSSES, dict(clip_dual=1.0), ValueError, ("clip_dual: got 1.0", "above 1")),
    (LOSSES, dict(loss_agg="mean"), ValueError, ("loss_agg: got 'mean'", "'token-mean'", "'none'")),
    (LOSSES, dict(loss_agg="none", denominator=3.0), ValueError, ("denominator: got 3.0", "takes None")),
    (LOSSES, dict(loss_agg="token-sum", denominator=3.0), ValueError, ("denominator: got 3.0", "takes None")),
    (LOSSES, dict(denominator=0), ValueError, ("denominator: got 0", "above 0")),
    (LOSSES, dict(denominator=float("nan")), ValueError, ("denominator: got nan",)),
    (LOSSES, dict(nll_coef=float("nan")), ValueError, ("nll_coef: got nan", "finite")),
    (LOSSES, dict(entropy_coef="a"), ValueError, ("entropy_coef: got 'a'",)),
    (LOSSES, dict(kl_coef=0.1), ValueError, ("ref_logprobs: got None", "kl_coef")),
    ((vppo_loss,), dict(entropy_coef=0.1), ValueError, ("entropy: got None", "entropy_coef")),
    # groups of ranks
    ((*HEADS, divergence), dict(process_group=1), TypeError, ("process_group: got int", "ProcessGroup or None")),
    ((*HEADS, divergence), dict(process_group="x"), TypeError, ("process_group: got str", "ProcessGroup or None")),
    (GROUPED, dict(stats_group=1), TypeError, ("stats_group: got int", "ProcessGroup or None")),
    (GROUPED, dict(stats_group="x"), TypeError, ("stats_group: got str", "ProcessGroup or None")),
    # factors whose order is inverted, as VPPOConfig refuses them
    ((*SCALERS, *LOSSES), dict(scale_min=1.5), ValueError, ("scale_min: got 1.5", "at most 1 unless scale_max")),
    ((*SCALERS, *LOSSES), dict(scale_min=0.9, scale_max=0.5), ValueError, ("scale_max: got 0.5", "at least scale_min")),
    ((*SCALERS, *LOSSES), dict(scale_max=float("nan")), ValueError, ("scale_max: got nan",)),
    # packed trajectories
    (LOSSES, dict(cu_seqlens=torch.tensor([0, 15])), ValueError, ("logprobs: got shape [3, 5]", "takes [total]")),
    ((trajectory_stats, trajectory_scale), dict(PACKED, cu_seqlens=[0, 15]), TypeError, ("cu_seqlens: got list",)),
    ((vppo_advantages,), dict(cu_seqlens=torch.tensor([0, 15])), ValueError, ("dependency: got shape [3, 5]",)),
]
CASES = [
    pytest.param(function, change, error, parts, id=f"{function.__name__}-{parts[0]}")
    for functions, change, error, parts in BAD
    for function in functions
]


@pytest.mark.parametrize("function", GOOD, ids=lambda f: f.__name__)
def test_the_arguments_that_are_then_broken_are_good(function: Callable[..., Any]) -> None:
    function(**GOOD[function])


@pytest.mark.parametrize(("function", "change", "error", "parts"), CASES)
def test_bad_argument(
    function: Callable[..., Any], change: dict[str, Any], error: type[Exception], parts: tuple[str, ...]
) -> None:
    if function is vppo_advantages and "scores" in change:
        change = {"dependency": change["scores"]}
    arguments = {**GOOD[function], **({"dependency": scores} if function is linear_vppo_loss else {})}
    with pytest.raises(error, match=".*".join(re.escape(part) for part in parts)):
        function(**{**arguments, **change})


def test_the_first_bad_target_is_named_by_its_row() -> None:
    bad = tokens.clone()
    bad[1, 3] = 99
    for function in (linear_divergence, linear_logprob, linear_vppo_loss):
        with pytest.raises(ValueError, match=r"targets: got 99 at row 8"):
            function(**{**GOOD[function], "targets": bad})


def test_masks_of_any_dtype_mean_the_same() -> None:
    chosen = scores > 0.4
    masks = [chosen, chosen.long(), chosen.float(), chosen.to(torch.uint8), chosen.bfloat16() * 2]
    results = [topk_mask(scores, m, 0.5) for m in masks]
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"denominator": torch.ones(3)}, ValueError, r"denominator: got a tensor of shape \[3\]"),
        ({"denominator": torch.tensor(0.0)}, ValueError, "denominator: got 0.0, takes a finite number above 0"),
        ({"denominator": "3"}, ValueError, "denominator: got '3', takes a finite number above 0"),
        ({"denominator": True}, ValueError, "denominator: got True"),
        ({"clip_dual": "3"}, ValueError, "clip_dual: got '3', takes None or a number above 1"),
        ({"old_logprobs": None}, TypeError, "old_logprobs: got NoneType, takes a torch.Tensor"),
        ({"stats": (0.0, 1.0, 1.0)}, TypeError, r"stats: got \(0.0, 1.0, 1.0\), takes a TrajectoryStats"),
    ],
)
def test_what_a_loss_cannot_use_is_named(changes: dict, error: type[Exception], message: str) -> None:
    tokens = torch.full((2, 4), -1.0)
    given = {"old_logprobs": tokens, **changes}
    old = given.pop("old_logprobs")
    with pytest.raises(error, match=message):
        vppo_loss(tokens, old, torch.ones(2), torch.ones(2, 4, dtype=torch.bool), tokens.abs(), **given)


def test_a_denominator_may_be_a_tensor_of_one_number() -> None:
    tokens, mask = torch.full((2, 4), -1.0), torch.ones(2, 4, dtype=torch.bool)
    losses = [vppo_loss(tokens, tokens, torch.ones(2), mask, denominator=d)[0] for d in (4, torch.tensor([4.0]))]
    assert losses[0].item() == losses[1].item() == -2.0
