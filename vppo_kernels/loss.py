"""The VPPO loss: clipped surrogate on shaped advantages (VPPO, Eq. 6), from log-probabilities or from hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vppo_kernels import checks, parallel, tiling
from vppo_kernels.head import LogitTransform
from vppo_kernels.linear_loss import LinearLoss
from vppo_kernels.logprob import linear_logprob
from vppo_kernels.ops import wants_gradient
from vppo_kernels.shaping import Shaped, TrajectoryStats, expand_advantages, shape_advantages

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


def aggregate(values: Tensor, mask: Tensor, loss_agg: str, denominator: Tensor | float | None = None) -> Tensor:
    """Reduce `[B, T]` per-token losses under verl's names; see `vppo_loss` for what each divides by."""
    values = torch.where(mask, values, 0)
    if loss_agg == "none":
        return values
    if loss_agg == "token-sum":
        return values.sum()
    if loss_agg == "token-mean":
        return values.sum() / (mask.sum().clamp_min(1) if denominator is None else denominator)
    if loss_agg == "seq-mean-token-sum-norm":
        return values.sum() / (max(mask.shape[1], 1) if denominator is None else denominator)
    length = mask.sum(1)
    per_sequence = values.sum(1) / length.clamp_min(1) if loss_agg == "seq-mean-token-mean" else values.sum(1)
    return per_sequence.sum() / ((length > 0).sum().clamp_min(1) if denominator is None else denominator)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0).sum() / mask.sum().clamp_min(1)


@dataclass(frozen=True)
class LossOptions:
    """The knobs that both losses share; `vppo_loss` says what they mean."""

    keep_ratio: float
    scale_min: float
    scale_max: float | None
    has_image: Tensor | None
    stats: TrajectoryStats | None
    process_group: Any
    clip_low: float
    clip_high: float
    clip_dual: float | None
    loss_agg: str
    denominator: Tensor | float | None
    nll_coef: float
    entropy_coef: float
    kl_coef: float

    def __post_init__(self) -> None:
        checks.one_of("loss_agg", self.loss_agg, AGGREGATIONS)
        checks.non_negative("clip_low", self.clip_low)
        checks.non_negative("clip_high", self.clip_high)
        if self.clip_low > 1:
            raise ValueError(f"clip_low: got {self.clip_low!r}, takes a number from 0 to 1")
        if self.clip_dual is not None and not self.clip_dual > 1:
            raise ValueError(f"clip_dual: got {self.clip_dual!r}, takes None or a number above 1")
        for name in ("nll_coef", "entropy_coef", "kl_coef"):
            checks.finite(name, getattr(self, name))
        if self.loss_agg in ("none", "token-sum") and self.denominator is not None:
            raise ValueError(f"denominator: got {self.denominator!r}, takes None with loss_agg {self.loss_agg!r}")
        if isinstance(self.denominator, int | float):
            checks.positive("denominator", self.denominator)

    @property
    def every_token(self) -> bool:
        """Whether a term beside the surrogate asks for the log-probability of every response token."""
        return any(coefficient != 0 for coefficient in (self.nll_coef, self.entropy_coef, self.kl_coef))


def _per_token(name: str, value: Tensor | None, like: Tensor, mask: Tensor, check: bool) -> Tensor | None:
    """A `[B, T]` argument with its padding replaced by 0, so that nothing there can reach a sum or a gradient."""
    if value is None:
        return None
    checks.floating(name, value)
    checks.same_device(name, value, like.device, "logprobs")
    checks.shape(name, value, tuple(like.shape), "that of the mask")
    if check:
        checks.all_finite(name, value, mask)
    return torch.where(mask, value, 0)


def _shape(advantages: Tensor, mask: Tensor, dependency: Tensor | None, options: LossOptions, check: bool) -> Shaped:
    """Shaped advantages; without a dependency every response token is kept and every factor is 1."""
    if dependency is not None:
        checks.tensor("dependency", dependency)
        checks.shape("dependency", dependency, tuple(mask.shape), "that of the mask")
        checks.same_device("dependency", dependency, mask.device, "the mask")
        return shape_advantages(
            advantages,
            dependency,
            mask,
            keep_ratio=options.keep_ratio,
            scale_min=options.scale_min,
            scale_max=options.scale_max,
            has_image=options.has_image,
            stats=options.stats,
            process_group=options.process_group,
            check=check,
        )
    per_token = expand_advantages(advantages, mask)
    if check:
        checks.all_finite("advantages", per_token, mask)
    return Shaped(torch.where(mask, per_token, 0).detach(), mask, torch.ones(len(mask), device=mask.device))


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
) -> tuple[Tensor, Metrics]:
    """Everything after shaping; all `[B, T]` arguments are clean of padding."""
    advantages = shaped.advantages
    low, high, dual = options.clip_low, options.clip_high, options.clip_dual
    log_ratio = (logprobs - old_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = log_ratio.exp()
    policy = torch.maximum(-ratio * advantages, -ratio.clamp(1 - low, 1 + high) * advantages)
    if dual is not None:
        policy = torch.where(advantages < 0, torch.minimum(policy, -dual * advantages), policy)
    total = policy if is_weights is None else policy * is_weights
    if options.nll_coef:
        total = total - options.nll_coef * logprobs
    if options.entropy_coef and entropy is not None:
        total = total - options.entropy_coef * entropy
    if options.kl_coef and ref_logprobs is not None:
        total = total + options.kl_coef * _k3(ref_logprobs - logprobs)
    loss = aggregate(total, mask, options.loss_agg, options.denominator)

    with torch.no_grad():
        active = mask & (advantages != 0)
        falling, rising = active & (advantages < 0), active & (advantages > 0)
        metrics = {
            "kept_fraction": _mean(shaped.keep.float(), mask),
            "active_fraction": _mean(active.float(), mask),
            "ratio_mean": _mean(ratio, active),
            "clip_fraction_low": _mean(((ratio < 1 - low) & falling).float(), active),
            "clip_fraction_high": _mean(((ratio > 1 + high) & rising).float(), active),
            "approx_kl": _mean(_k3(log_ratio), active),
        }
        if dual is not None:
            metrics["clip_fraction_dual"] = _mean(((ratio > dual) & falling).float(), active)
        if dependency is not None:
            alpha = shaped.alpha if len(shaped.alpha) else shaped.alpha.new_ones(1)
            seen = mask if options.has_image is None else mask & (options.has_image != 0).unsqueeze(1)
            metrics["dependency_mean"] = _mean(dependency, seen)
            metrics |= {"alpha_min": alpha.amin(), "alpha_mean": alpha.mean(), "alpha_max": alpha.amax()}
        if entropy is not None:
            metrics["entropy_mean"] = _mean(entropy, mask)
        if ref_logprobs is not None:
            metrics["ref_kl"] = _mean(_k3(ref_logprobs - logprobs), mask if options.every_token else active)
    return loss, metrics


def _k3(d: Tensor) -> Tensor:
    """`exp(d) - d - 1` with `d` held within +-20: the divergence estimate from one log-ratio, never negative."""
    d = d.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.expm1(d) - d


def vppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    dependency: Tensor | None = None,
    *,
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
    process_group: Any = None,
    check: bool | None = None,
) -> tuple[Tensor, Metrics]:
    """The VPPO loss of a batch: drop-in for the policy loss of any trainer that has per-token log-probabilities.

    Per token, with shaped advantage `A'` and `r = exp(logprobs - old_logprobs)` (its logarithm held within +-20):
    `max(-r A', -clip(r, 1 - clip_low, 1 + clip_high) A')`, for negative `A'` at most `-clip_dual A'`, times
    `is_weights`; plus `nll_coef * -logprobs`, minus `entropy_coef * entropy`, plus `kl_coef * (exp(d) - d - 1)` with
    `d = ref_logprobs - logprobs`, held within +-20. All terms are then reduced together.

    Args:
        logprobs: `[B, T]` log-probabilities under the policy being trained, in nats. The only argument, with `entropy`,
            through which gradient flows.
        old_logprobs: `[B, T]` under the policy that sampled; `logprobs.detach()` where it is the same.
        advantages: `[B]` or `[B, T]`.
        mask: `[B, T]` bool or 0/1, the response tokens. Whatever stands at other positions, NaN included, is not read.
        dependency: `[B, T]` dependency of each token on the image; None leaves the advantages as they are (DAPO).
        keep_ratio, scale_min, scale_max, has_image, stats, process_group: As in `vppo_advantages`.
        clip_low, clip_high: The ratio is clipped to `[1 - clip_low, 1 + clip_high]`.
        clip_dual: Bound on the ratio for negative advantages, above 1; None for no bound.
        loss_agg: "token-mean" divides the sum over response tokens by their number; "seq-mean-token-mean" and
            "seq-mean-token-sum" average each trajectory's mean or sum over the trajectories that have tokens;
            "seq-mean-token-sum-norm" divides the sum by T; "token-sum" divides by nothing; "none" returns `[B, T]`.
        denominator: What a mean divides by instead: the tokens ("token-mean"), the trajectories ("seq-mean-*") or the
            horizon ("-norm") of the whole batch when this call sees a micro-batch or one rank's share of it.
        nll_coef: Weight of the mean negative log-probability of the response tokens (0.06 in the released code).
        entropy: `[B, T]` entropies, for `entropy_coef` and the metrics.
        entropy_coef: Weight of the entropy bonus.
        ref_logprobs: `[B, T]` under the reference policy.
        kl_coef: Weight of the divergence from the reference policy.
        is_weights: `[B, T]` factors on the surrogate, such as truncated importance weights of the sampler.
        check: As in `topk_mask`, for all arguments.

    Returns:
        The loss (a scalar, `[B, T]` for "none") and detached scalar metrics. Of the response tokens: kept_fraction and
        active_fraction (shaped advantage not 0). Of the active ones: ratio_mean, clip_fraction_low, clip_fraction_high,
        clip_fraction_dual, approx_kl. With a dependency: dependency_mean (of the rows with an image), alpha_min,
        alpha_mean, alpha_max. Where given: entropy_mean, ref_kl.

    Raises:
        TypeError, ValueError: An argument is of the wrong type, shape, device or range, or not finite when checked.
    """
    options = LossOptions(
        keep_ratio, scale_min, scale_max, has_image, stats, process_group,
        clip_low, clip_high, clip_dual, loss_agg, denominator, nll_coef, entropy_coef, kl_coef,
    )  # fmt: skip
    checks.matrix("logprobs", logprobs)
    if kl_coef and ref_logprobs is None:
        raise ValueError("ref_logprobs: got None, takes [B, T] log-probabilities where kl_coef is not 0")
    if entropy_coef and entropy is None:
        raise ValueError("entropy: got None, takes [B, T] entropies where entropy_coef is not 0")
    valid = checks.token_mask(mask, logprobs)
    look = checks.wanted(check, logprobs)
    shaped = _shape(advantages, valid, dependency, options, look)

    def clean(name: str, value: Tensor | None) -> Tensor | None:
        return _per_token(name, value, logprobs, valid, look)

    new, old = clean("logprobs", logprobs), clean("old_logprobs", old_logprobs)
    assert new is not None and old is not None
    return _loss(
        new,
        old.detach(),
        shaped,
        valid,
        dependency,
        clean("entropy", entropy),
        clean("ref_logprobs", ref_logprobs),
        clean("is_weights", is_weights),
        options,
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
    backend: str = "auto",
    check: bool | None = None,
) -> tuple[Tensor, Metrics]:
    """`vppo_loss` from hidden states: only the rows that can carry gradient meet the weight.

    A token whose shaped advantage is 0 (padding, filtered, zero-advantage group) is dropped before the first product,
    unless an entropy, likelihood or reference term asks for every response token. The gradient is made in the forward,
    while the logits are there (with `check=True` and with loss_agg "none" in the backward, from recomputed ones), and
    handed out once: a second backward raises.

    Args:
        hidden: `[B, T, D]` hidden states that predict the response tokens; not read where they are dropped.
        weight: `[V, D]`.
        targets: `[B, T]` response tokens; any value where `mask` is 0.
        old_logprobs, advantages, mask, dependency: As in `vppo_loss`.
        bias: `[V]` or None.
        temperature, logit_scale, softcap, vocab_size, backend: As in `linear_divergence`.
        process_group: Statistics over all ranks, as in `vppo_advantages`.
        check: As in `topk_mask`; True also compares a sample of rows with the definition.
        (others): As in `vppo_loss`; the entropies are computed here.

    Returns:
        As `vppo_loss`, with the same values. Differentiable, once, in hidden, weight and bias.

    Raises:
        TypeError, ValueError: An argument is of the wrong type, shape, device or range, or not finite when checked.
    """
    options = LossOptions(
        keep_ratio, scale_min, scale_max, has_image, stats, process_group,
        clip_low, clip_high, clip_dual, loss_agg, denominator, nll_coef, entropy_coef, kl_coef,
    )  # fmt: skip
    checks.head(hidden, weight, bias)
    checks.vocabulary(vocab_size, len(weight), "the rows of weight")
    checks.matrix("old_logprobs", old_logprobs)
    if kl_coef and ref_logprobs is None:
        raise ValueError("ref_logprobs: got None, takes [B, T] log-probabilities where kl_coef is not 0")
    if hidden.dim() != 3:
        raise ValueError(f"hidden: got shape {list(hidden.shape)}, takes [B, T, D]")
    checks.shape("old_logprobs", old_logprobs, tuple(hidden.shape[:2]), "the leading dimensions of hidden")
    checks.same_device("old_logprobs", old_logprobs, weight.device, "weight")
    checks.tensor("targets", targets)
    checks.shape("targets", targets, tuple(hidden.shape[:2]), "the leading dimensions of hidden")
    checks.same_device("targets", targets, weight.device, "weight")
    valid = checks.token_mask(mask, old_logprobs)
    look = checks.wanted(check, old_logprobs)
    targets = torch.where(valid, targets, 0)
    checks.indices("targets", targets, hidden.shape[:2], vocab_size or len(weight), weight.device, look)
    shaped = _shape(advantages, valid, dependency, options, look)

    def clean(name: str, value: Tensor | None) -> Tensor | None:
        return _per_token(name, value, old_logprobs, valid, look)

    old = clean("old_logprobs", old_logprobs)
    assert old is not None
    needed = valid if options.every_token else valid & (shaped.advantages != 0)
    rows = needed.nonzero(as_tuple=True)
    if look:
        checks.all_finite("hidden", hidden, needed)
    ref, weights = clean("ref_logprobs", ref_logprobs), clean("is_weights", is_weights)
    metrics: Metrics = {}

    def loss_of(row_logprobs: Tensor, row_entropy: Tensor) -> Tensor:
        # a dropped token has ratio 1 and advantage 0
        logprobs = old.detach().to(row_logprobs.dtype).index_put(rows, row_logprobs)
        entropy = torch.zeros_like(logprobs).index_put(rows, row_entropy) if entropy_coef else None
        loss, found = _loss(logprobs, old.detach(), shaped, valid, dependency, entropy, ref, weights, options)
        metrics.update(found)
        return loss

    head: dict[str, Any] = dict(
        temperature=temperature, logit_scale=logit_scale, softcap=softcap, vocab_size=vocab_size, backend=backend
    )
    if check or loss_agg == "none" or not wants_gradient(hidden, weight, bias):
        computed = linear_logprob(hidden[rows], weight, targets[rows], bias, check=bool(check), **head)
        loss = loss_of(computed.logprobs, computed.entropy)
        return loss, metrics
    local_weight, local_bias, group = parallel.localize(weight, bias, None)
    chosen = parallel.local_hidden("hidden", hidden)[rows]
    shard = parallel.shard_of(group, [chosen], len(local_weight), vocab_size, "weight")
    loss = LinearLoss.apply(
        chosen,
        local_weight,
        local_bias,
        targets[rows].long(),
        loss_of,
        LogitTransform(temperature, logit_scale, softcap),
        shard,
        backend,
        tiling.current_workspace(),
    )
    return loss, metrics
