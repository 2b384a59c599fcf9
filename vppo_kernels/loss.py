"""The VPPO loss: clipped surrogate on shaped advantages (VPPO, Eq. 6), from log-probabilities or from hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vppo_kernels import arguments, backends, tiling, vocab_parallel
from vppo_kernels.layout import Layout, layout_of
from vppo_kernels.linear_loss import LinearLoss
from vppo_kernels.logits import LogitTransform
from vppo_kernels.logprob import logprobs_of_rows
from vppo_kernels.shaping import Shaped, TrajectoryStats, expand_advantages, shape_advantages
from vppo_kernels.sweep import wants_gradient

AGGREGATIONS = (
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "token-sum",
    "none",
)
LOG_RATIO_LIMIT = 20.0

Metrics = dict[str, Tensor]


def _reduce(
    rows: Tensor, lengths: Tensor, width: int | Tensor, loss_agg: str, denominator: Tensor | float | None
) -> Tensor:
    """The loss from each row's sum and number of tokens, under verl's names; `vppo_loss` says what they divide by."""
    if loss_agg in ("none", "token-sum"):
        return rows if loss_agg == "none" else rows.sum()
    if loss_agg == "token-mean":
        return rows.sum() / (lengths.sum().clamp_min(1) if denominator is None else denominator)
    if loss_agg == "seq-mean-token-sum-norm":
        return rows.sum() / (width if denominator is None else denominator)
    if loss_agg == "seq-mean-token-mean":
        rows = rows / lengths.clamp_min(1)
    return rows.sum() / ((lengths > 0).sum().clamp_min(1) if denominator is None else denominator)


@dataclass(frozen=True)
class LossOptions:
    """The knobs that both losses share; `vppo_loss` says what they mean."""

    keep_ratio: float
    scale_min: float
    scale_max: float | None
    has_image: Tensor | None
    stats: TrajectoryStats | None
    stats_group: Any
    clip_low: float
    clip_high: float
    clip_dual: float | None
    loss_agg: str
    denominator: Tensor | float | None
    nll_coef: float
    entropy_coef: float
    kl_coef: float

    def __post_init__(self) -> None:
        arguments.fraction("keep_ratio", self.keep_ratio)
        arguments.scales(self.scale_min, self.scale_max)
        vocab_parallel.check_group("stats_group", self.stats_group)
        arguments.one_of("loss_agg", self.loss_agg, AGGREGATIONS)
        arguments.non_negative("clip_low", self.clip_low)
        arguments.non_negative("clip_high", self.clip_high)
        if self.clip_low > 1:
            raise ValueError(f"clip_low: got {self.clip_low!r}, takes a number from 0 to 1")
        if self.clip_dual is not None and not (isinstance(self.clip_dual, int | float) and self.clip_dual > 1):
            raise ValueError(f"clip_dual: got {self.clip_dual!r}, takes None or a number above 1")
        for name in ("nll_coef", "entropy_coef", "kl_coef"):
            arguments.finite(name, getattr(self, name))
        if self.loss_agg in ("none", "token-sum") and self.denominator is not None:
            raise ValueError(f"denominator: got {self.denominator!r}, takes None with loss_agg {self.loss_agg!r}")
        arguments.denominator(self.denominator, look=not torch.compiler.is_compiling())

    @property
    def every_token(self) -> bool:
        """Whether a term beside the surrogate asks for the log-probability of every response token."""
        return any(coefficient != 0 for coefficient in (self.nll_coef, self.entropy_coef, self.kl_coef))


def _per_token(
    name: str, value: Tensor | None, like: Tensor, mask: Tensor, check: bool, zero: bool = True
) -> Tensor | None:  # fmt: skip
    """An argument of tokens with its padding replaced by 0, so that nothing there can reach a sum or a gradient."""
    if value is None:
        return None
    arguments.floating(name, value)
    arguments.same_device(name, value, like.device, "logprobs")
    arguments.shape(name, value, tuple(like.shape), "that of the mask")
    if check:
        arguments.all_finite(name, value, mask)
    return torch.where(mask, value, 0) if zero else value


def _shape(
    advantages: Tensor,
    mask: Tensor,
    dependency: Tensor | None,
    options: LossOptions,
    layout: Layout,
    cu_seqlens: Tensor | None,
    check: bool,
    backend: str,
) -> Shaped:
    """Shaped advantages; without a dependency every response token is kept and every factor is 1."""
    if dependency is not None:
        arguments.tensor("dependency", dependency)
        arguments.shape("dependency", dependency, tuple(mask.shape), "that of the mask")
        arguments.same_device("dependency", dependency, mask.device, "the mask")
        return shape_advantages(
            advantages,
            dependency,
            mask,
            cu_seqlens=cu_seqlens,
            keep_ratio=options.keep_ratio,
            scale_min=options.scale_min,
            scale_max=options.scale_max,
            has_image=options.has_image,
            stats=options.stats,
            stats_group=options.stats_group,
            backend=backend,
            check=check,
        )
    per_token = expand_advantages(advantages, mask, layout)
    if check:
        arguments.all_finite("advantages", per_token, mask)
    return Shaped(
        torch.where(mask, per_token, 0).detach(),
        mask,
        torch.ones(layout.count, dtype=torch.float32, device=mask.device),
    )


# Sums over a row's tokens that the losses return, in this order: of its response tokens ...
PER_TOKEN = ("tokens", "kept_fraction", "active_fraction", "entropy_mean")
# ... and of the active ones, whose shaped advantage is not 0.
PER_ACTIVE = ("ratio_mean", "approx_kl", "clip_fraction_low", "clip_fraction_high", "clip_fraction_dual")
SUMS = (*PER_TOKEN, *PER_ACTIVE, "ref_kl", "dependency", "loss")


def _clipped_loss(
    logprobs: Tensor,
    entropy: Tensor | None,
    old_logprobs: Tensor,
    advantages: Tensor,
    keep: Tensor,
    mask: Tensor,
    ref_logprobs: Tensor | None,
    is_weights: Tensor | None,
    dependency: Tensor | None,
    *,
    low: float,
    high: float,
    dual: float | None,
    limit: float,
    nll_coef: float,
    entropy_coef: float,
    kl_coef: float,
    per_token: bool,
    ref_of_all: bool,
) -> tuple[Tensor, Tensor]:
    """The loss before anything is averaged, in plain torch.

    Args:
        logprobs, old_logprobs, advantages, entropy, ref_logprobs, is_weights: `[B, T]`, clean of padding.
        keep, mask: `[B, T]` bool.
        dependency: `[B, T]`.
        low, high, dual: Where the ratio is clipped.
        limit: Bound on the magnitude of a log-ratio.
        per_token: Return the loss of every token instead of each row's sum.
        ref_of_all: Whether the reference is known at every response token, or only at the active ones.

    Returns:
        The loss, `[B]` or `[B, T]`, differentiable in `logprobs` and `entropy`; and `SUMS` of each row, `[12, B]`.
    """
    log_ratio = (logprobs - old_logprobs).clamp(-limit, limit)
    ratio = log_ratio.exp()
    policy = torch.maximum(-ratio * advantages, -ratio.clamp(low, high) * advantages)
    if dual is not None:
        policy = torch.where(advantages < 0, torch.minimum(policy, -dual * advantages), policy)
    total = policy if is_weights is None else policy * is_weights
    if nll_coef:
        total = total - nll_coef * logprobs
    if entropy_coef and entropy is not None:
        total = total - entropy_coef * entropy
    ref_kl = None if ref_logprobs is None else _k3(ref_logprobs - logprobs, limit)
    if kl_coef and ref_kl is not None:
        total = total + kl_coef * ref_kl
    total = torch.where(mask, total, 0).to(torch.promote_types(total.dtype, torch.float32))
    rows = total.sum(1)

    with torch.no_grad():
        active = mask & (advantages != 0)
        falling, rising = active & (advantages < 0), active & (advantages > 0)

        def row_sums(values: Tensor | None, where: Tensor) -> Tensor:
            return torch.where(where, 0 if values is None else values, 0).sum(1, dtype=rows.dtype)

        sums = [
            row_sums(mask, mask),
            row_sums(keep, mask),
            row_sums(active, mask),
            row_sums(entropy, mask),
            row_sums(ratio, active),
            row_sums(_k3(log_ratio, limit), active),
            row_sums(ratio < low, falling),
            row_sums(ratio > high, rising),
            row_sums(None if dual is None else ratio > dual, falling),
            row_sums(ref_kl, mask if ref_of_all else active),
            row_sums(dependency, mask),
            rows,
        ]
        return total if per_token else rows, torch.stack(sums)


def _loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    shaped: Shaped,
    mask: Tensor,
    dependency: Tensor | None,
    entropy: Tensor | None,
    ref_logprobs: Tensor | None,
    is_weights: Tensor | None,
    options: LossOptions,
    layout: Layout,
    kernels: ModuleType | None,
) -> tuple[Tensor, Metrics]:
    """Everything after shaping; all arguments of tokens are clean of padding, or `kernels` leave it out."""
    looked = mask
    if dependency is not None and options.has_image is not None:  # a row without an image may hold anything
        looked = mask & layout.spread(options.has_image != 0)
        dependency = torch.where(looked, dependency, 0)

    def as_rows(values: Tensor | None) -> Tensor | None:
        return None if values is None else layout.as_rows(values)

    values, sums = (_clipped_loss if kernels is None else kernels.clipped_loss)(
        layout.as_rows(logprobs),
        as_rows(entropy),
        layout.as_rows(old_logprobs),
        layout.as_rows(shaped.advantages),
        layout.as_rows(shaped.keep),
        layout.as_rows(mask),
        as_rows(ref_logprobs),
        as_rows(is_weights),
        as_rows(dependency),
        low=1 - options.clip_low,
        high=1 + options.clip_high,
        dual=options.clip_dual,
        limit=LOG_RATIO_LIMIT,
        nll_coef=options.nll_coef,
        entropy_coef=options.entropy_coef,
        kl_coef=options.kl_coef,
        per_token=options.loss_agg == "none" or layout.packed,
        ref_of_all=options.every_token,
    )
    lengths = sums[0]
    if layout.packed:  # all of it was one row
        values, lengths = values.squeeze(0), layout.sum(mask, sums.dtype)
        values = values if options.loss_agg == "none" else layout.sum(values, values.dtype)
    loss = _reduce(values, lengths, layout.width, options.loss_agg, options.denominator)

    totals = sums.sum(1)
    total_of = dict(zip(SUMS, totals, strict=True))
    count, active = totals[0].clamp_min(1), totals[2].clamp_min(1)
    split = len(PER_TOKEN)
    metrics = dict(zip(PER_TOKEN, totals[:split] / count, strict=True))
    metrics |= zip(PER_ACTIVE, totals[split : split + len(PER_ACTIVE)] / active, strict=True)
    del metrics["tokens"]
    if options.clip_dual is None:
        del metrics["clip_fraction_dual"]
    if entropy is None:
        del metrics["entropy_mean"]
    if ref_logprobs is not None:
        metrics["ref_kl"] = total_of["ref_kl"] / (count if options.every_token else active)
    if dependency is not None:
        metrics["dependency_mean"] = total_of["dependency"] / looked.sum().clamp_min(1)
        alpha = shaped.alpha if len(shaped.alpha) else shaped.alpha.new_ones(1)
        metrics |= {"alpha_min": alpha.amin(), "alpha_mean": alpha.mean(), "alpha_max": alpha.amax()}
    return loss, metrics


def _k3(d: Tensor, limit: float) -> Tensor:
    """`exp(d) - d - 1` with `d` held within bounds: the divergence estimate from one log-ratio, never negative."""
    d = d.clamp(-limit, limit)
    return torch.expm1(d) - d


def vppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    dependency: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    keep_ratio: float = 0.4,
    scale_min: float = 0.9,
    scale_max: float | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    clip_dual: float | None = None,
    loss_agg: str = "token-mean",
    denominator: Tensor | float | None = None,
    nll_coef: float = 0.0,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    is_weights: Tensor | None = None,
    has_image: Tensor | None = None,
    stats: TrajectoryStats | None = None,
    stats_group: Any = None,
    backend: str = "auto",
    check: bool | None = None,
) -> tuple[Tensor, Metrics]:
    """The VPPO loss of a batch: drop-in for the policy loss of any trainer that has per-token log-probabilities.

    Per token, with shaped advantage `A'` and `r = exp(logprobs - old_logprobs)` (its logarithm held within +-20):
    `max(-r A', -clip(r, 1 - clip_low, 1 + clip_high) A')`, for negative `A'` at most `-clip_dual A'`, times
    `is_weights`; plus `nll_coef * -logprobs`, minus `entropy_coef * entropy`, plus `kl_coef * (exp(d) - d - 1)` with
    `d = ref_logprobs - logprobs`, held within +-20. All terms are then reduced together.

    Args:
        logprobs: `[B, T]` log-probabilities under the policy being trained, in nats; `[total]` with `cu_seqlens`, as
            are then all arguments of tokens. The only argument, with `entropy`, through which gradient flows.
        old_logprobs: `[B, T]` under the policy that sampled; `logprobs.detach()` where it is the same.
        advantages: `[B]` or `[B, T]`.
        mask: `[B, T]` bool or 0/1, the response tokens. Whatever stands at other positions, NaN included, is not read.
        dependency: `[B, T]` dependency of each token on the image; None leaves the advantages as they are (DAPO).
        cu_seqlens: As in `topk_mask`, for packed trajectories. The loss is that of the same trajectories padded.
        keep_ratio, scale_min, scale_max, has_image, stats, stats_group: As in `vppo_advantages`.
        clip_low, clip_high: The ratio is clipped to `[1 - clip_low, 1 + clip_high]`.
        clip_dual: Bound on the ratio for negative advantages, above 1; None for no bound.
        loss_agg: "token-mean" divides the sum over response tokens by their number; "seq-mean-token-mean" and
            "seq-mean-token-sum" average each trajectory's mean or sum over the trajectories that have tokens;
            "seq-mean-token-sum-norm" divides the sum by T, packed by the length of the longest trajectory, whatever its
            mask; "token-sum" divides by nothing; "none" returns `[B, T]` or `[total]`.
        denominator: What a mean divides by instead: the tokens ("token-mean"), the trajectories ("seq-mean-*") or the
            horizon ("-norm") of the whole batch when this call sees a micro-batch or one rank's share of it.
        nll_coef: Weight of the mean negative log-probability of the response tokens (0.06 in the released code).
        entropy: `[B, T]` entropies, for `entropy_coef` and the metrics.
        entropy_coef: Weight of the entropy bonus.
        ref_logprobs: `[B, T]` under the reference policy.
        kl_coef: Weight of the divergence from the reference policy.
        is_weights: `[B, T]` factors on the surrogate, such as truncated importance weights of the sampler.
        backend: As in `topk_mask`; "auto" takes plain torch where any argument is float64. Sums of packed trajectories
            are plain torch.
        check: As in `topk_mask`, for all arguments.

    Returns:
        The loss, float32 (or float64 where an argument is), a scalar, of tokens for "none"; detached scalar metrics. Of
        response tokens: kept_fraction, active_fraction (shaped advantage not 0). Of the active ones: ratio_mean,
        clip_fraction_low, clip_fraction_high, clip_fraction_dual, approx_kl. With a dependency: dependency_mean (of the
        rows with an image), alpha_min, alpha_mean, alpha_max. Where given: entropy_mean, ref_kl.

    Raises:
        TypeError, ValueError: An argument is of the wrong type, shape, device or range, or not finite when checked.
    """
    options = LossOptions(
        keep_ratio, scale_min, scale_max, has_image, stats, stats_group,
        clip_low, clip_high, clip_dual, loss_agg, denominator, nll_coef, entropy_coef, kl_coef,
    )  # fmt: skip
    layout = layout_of("logprobs", logprobs, cu_seqlens, check)
    if kl_coef and ref_logprobs is None:
        raise ValueError("ref_logprobs: got None, takes [B, T] log-probabilities where kl_coef is not 0")
    if entropy_coef and entropy is None:
        raise ValueError("entropy: got None, takes [B, T] entropies where entropy_coef is not 0")
    valid = layout.within(arguments.token_mask(mask, logprobs))
    arguments.tensor("old_logprobs", old_logprobs)
    check_values = arguments.wanted(check, logprobs)
    kernels = backends.token_kernels(
        backend, logprobs, old_logprobs, advantages, dependency, entropy, ref_logprobs, is_weights
    )
    if kernels is not None:
        arguments.reverse_mode(logprobs, entropy)
    shaped = _shape(
        advantages,
        valid,
        dependency,
        options,
        layout,
        cu_seqlens,
        check_values,
        "torch" if kernels is None else backend,
    )

    def clean(name: str, value: Tensor | None) -> Tensor | None:
        return _per_token(name, value, logprobs, valid, check_values, zero=kernels is None)

    def constant(name: str, value: Tensor | None) -> Tensor | None:
        cleaned = clean(name, value)
        return None if cleaned is None else cleaned.detach()

    new, old = clean("logprobs", logprobs), constant("old_logprobs", old_logprobs)
    assert new is not None and old is not None
    return _loss(
        new,
        old,
        shaped,
        valid,
        dependency,
        clean("entropy", entropy),
        constant("ref_logprobs", ref_logprobs),
        constant("is_weights", is_weights),
        options,
        layout,
        kernels,
    )


def linear_vppo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    dependency: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    keep_ratio: float = 0.4,
    scale_min: float = 0.9,
    scale_max: float | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    clip_dual: float | None = None,
    loss_agg: str = "token-mean",
    denominator: Tensor | float | None = None,
    nll_coef: float = 0.0,
    entropy_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    is_weights: Tensor | None = None,
    has_image: Tensor | None = None,
    stats: TrajectoryStats | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    process_group: Any = None,
    stats_group: Any = None,
    backend: str = "auto",
    check: bool | None = None,
) -> tuple[Tensor, Metrics]:
    """`vppo_loss` from hidden states: only the rows that can carry gradient meet the weight.

    A token whose shaped advantage is 0 (padding, filtered, zero-advantage group) is dropped before the first product,
    unless an entropy, likelihood or reference term asks for every response token. The gradient is made in the forward,
    while the logits are there (with `check=True` and with loss_agg "none" in the backward, from recomputed ones), and
    handed out once: a second backward raises.

    Which tokens are dropped depends on values, and `torch.compile` knows none: in code that it traces all rows meet the
    weight once, in the forward, and only those that carry gradient again, in the backward. Loss, gradients and metrics
    are the same.

    Args:
        hidden: `[B, T, D]` hidden states that predict the response tokens, or `[total, D]` with `cu_seqlens`; not read
            where they are dropped.
        weight: `[V, D]`.
        targets: `[B, T]` or `[total]` response tokens; any value where `mask` is 0.
        old_logprobs, advantages, mask, dependency, cu_seqlens: As in `vppo_loss`.
        bias: `[V]` or None.
        temperature, logit_scale, softcap, vocab_size, process_group, backend: As in `linear_divergence`.
        stats_group: Statistics over all ranks of this group, as in `vppo_advantages`. Ranks that share a vocabulary
            (`process_group`) hold the same trajectories, so they belong to different groups of this kind.
        check: As in `topk_mask`; True also compares a sample of rows with the definition.
        (others): As in `vppo_loss`; the entropies are computed here.

    Returns:
        As `vppo_loss`, with the same values. Differentiable, once, in hidden, weight and bias.

    Raises:
        TypeError, ValueError: An argument is of the wrong type, shape, device or range, or not finite when checked.
    """
    options = LossOptions(
        keep_ratio, scale_min, scale_max, has_image, stats, stats_group,
        clip_low, clip_high, clip_dual, loss_agg, denominator, nll_coef, entropy_coef, kl_coef,
    )  # fmt: skip
    transform = LogitTransform(temperature, logit_scale, softcap)
    weight, bias, process_group = vocab_parallel.localize(weight, bias, process_group)
    hidden = vocab_parallel.local_hidden("hidden", hidden)
    vocab_parallel.check_group("process_group", process_group)
    arguments.head(hidden, weight, bias, empty=process_group is not None)
    layout = layout_of("old_logprobs", old_logprobs, cu_seqlens, check)
    if kl_coef and ref_logprobs is None:
        raise ValueError("ref_logprobs: got None, takes [B, T] log-probabilities where kl_coef is not 0")
    leading, takes = hidden.shape[:-1], "[total, D] with cu_seqlens" if layout.packed else "[B, T, D]"
    if len(leading) != old_logprobs.dim():
        raise ValueError(f"hidden: got shape {list(hidden.shape)}, takes {takes}")
    arguments.shape("old_logprobs", old_logprobs, tuple(leading), "the leading dimensions of hidden")
    arguments.same_device("old_logprobs", old_logprobs, weight.device, "weight")
    arguments.tensor("targets", targets)
    arguments.shape("targets", targets, tuple(leading), "the leading dimensions of hidden")
    arguments.same_device("targets", targets, weight.device, "weight")
    valid = layout.within(arguments.token_mask(mask, old_logprobs))
    check_values = arguments.wanted(check, old_logprobs)
    inputs = (hidden, weight, bias, old_logprobs, advantages, dependency, ref_logprobs, is_weights)
    double = any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in inputs)
    kernels = None if double else backends.token_kernels(backend, old_logprobs)  # `backend` is first of all the head's
    shaped = _shape(
        advantages,
        valid,
        dependency,
        options,
        layout,
        cu_seqlens,
        check_values,
        "torch" if kernels is None else backend,
    )

    def clean(name: str, value: Tensor | None) -> Tensor | None:
        cleaned = _per_token(name, value, old_logprobs, valid, check_values)
        return None if cleaned is None else cleaned.detach()

    old = clean("old_logprobs", old_logprobs)
    assert old is not None
    needed = valid if options.every_token else valid & (shaped.advantages != 0)
    tracing = torch.compiler.is_compiling()
    rows = None if tracing else needed.nonzero(as_tuple=True)
    chosen = hidden.flatten(0, -2) if rows is None else hidden[rows]
    targets = torch.where(valid, targets, 0)
    same = transform.arguments() | dict(targets=targets, backend=backend, workspace_limit=tiling.current_workspace())
    shard = vocab_parallel.shard_of(process_group, [chosen], len(weight), vocab_size, "weight", same)
    arguments.indices("targets", targets, leading, shard.total, weight.device, check_values)
    chosen_targets = targets.flatten() if rows is None else targets[rows]
    if check_values:
        arguments.all_finite("hidden", hidden, needed)
    ref, weights = clean("ref_logprobs", ref_logprobs), clean("is_weights", is_weights)
    metrics: Metrics = {}

    def placed(values: Tensor, rest: Tensor) -> Tensor:
        return torch.where(needed, values.view(leading), rest) if rows is None else rest.index_put(rows, values)

    def loss_of(row_logprobs: Tensor, row_entropy: Tensor) -> Tensor:
        # a dropped token has ratio 1 and advantage 0
        logprobs = placed(row_logprobs, old.to(row_logprobs.dtype))
        entropy = placed(row_entropy, torch.zeros_like(logprobs)) if entropy_coef else None
        loss, found = _loss(logprobs, old, shaped, valid, dependency, entropy, ref, weights, options, layout, kernels)
        metrics.update(found)
        return loss

    if tracing or check or loss_agg == "none" or not wants_gradient(hidden, weight, bias):
        return loss_of(
            *logprobs_of_rows(chosen, weight, bias, chosen_targets, transform, shard, backend, bool(check))
        ), metrics
    loss = LinearLoss.apply(
        chosen,
        weight,
        bias,
        chosen_targets.long(),
        loss_of,
        transform,
        shard,
        backend,
        tiling.current_workspace(),
    )
    return loss, metrics
