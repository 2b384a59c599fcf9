"""The VPPO loss of a batch from its log-probabilities: clipped surrogate on shaped advantages (VPPO, Eq. 6).

The clip rule itself is `backends/torch_loss.py`, and the same as kernels `backends/triton_loss.py`. Here is what comes
before and after it: checks and shaping, the mean over tokens or trajectories, and the metrics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vppo_kernels import arguments, backends
from vppo_kernels.backends.protocols import PER_ACTIVE, PER_TOKEN, SUMS, LossInputs, LossOptions, TokenOps
from vppo_kernels.layout import Layout, layout_of
from vppo_kernels.shaping import Gate, ScaleOptions, Shaped, TrajectoryStats, apply_shaping, expand_advantages

AGGREGATIONS = (
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "token-sum",
    "none",
)

Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class Reduction:
    """From the sums of trajectories to the loss, under verl's names; `vppo_loss` says what they divide by.

    Raises:
        ValueError: There is no such aggregation, or it has no denominator.
    """

    loss_agg: str
    denominator: Tensor | float | None

    def __post_init__(self) -> None:
        arguments.one_of("loss_agg", self.loss_agg, AGGREGATIONS)
        if self.loss_agg in ("none", "token-sum") and self.denominator is not None:
            raise ValueError(f"denominator: got {self.denominator!r}, takes None with loss_agg {self.loss_agg!r}")
        arguments.denominator(self.denominator, check_values=not torch.compiler.is_compiling())

    @property
    def per_token(self) -> bool:
        """Whether nothing is added up."""
        return self.loss_agg == "none"

    def __call__(self, rows: Tensor, lengths: Tensor, width: int | Tensor) -> Tensor:
        """The loss from each trajectory's sum and number of tokens, `[B]` each; `width` is T."""
        if self.loss_agg == "token-sum":
            return rows.sum()
        whole: Tensor | int
        if self.loss_agg == "token-mean":
            whole = lengths.sum().clamp_min(1)
        elif self.loss_agg == "seq-mean-token-sum-norm":
            whole = width
        else:
            whole = (lengths > 0).sum().clamp_min(1)
        if self.loss_agg == "seq-mean-token-mean":
            rows = rows / lengths.clamp_min(1)
        return rows.sum() / (whole if self.denominator is None else self.denominator)


def check_tokens(name: str, value: Tensor | None, mask: Tensor, check_values: bool) -> None:
    """Check an argument of tokens, where it is given."""
    if value is None:
        return
    arguments.floating(name, value)
    arguments.same_device(name, value, mask.device, "logprobs")
    arguments.shape(name, value, tuple(mask.shape), "that of the mask")
    if check_values:
        arguments.all_finite(name, value, mask)


def shaped_by(
    dependency: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    has_image: Tensor | None,
    gate: Gate,
    options: ScaleOptions,
    layout: Layout,
    ops: TokenOps,
    check_values: bool,
) -> Shaped:
    """Shaped advantages; without a dependency every response token is kept and every factor is 1."""
    if dependency is not None:
        arguments.floating("dependency", dependency)
        arguments.shape("dependency", dependency, tuple(mask.shape), "that of the mask")
        arguments.same_device("dependency", dependency, mask.device, "the mask")
        return apply_shaping(advantages, dependency, mask, has_image, gate, options, layout, ops, check_values)
    per_token = expand_advantages(advantages, mask, layout)
    if check_values:
        arguments.all_finite("advantages", per_token, mask)
    every = torch.ones(layout.count, dtype=torch.float32, device=mask.device)
    return Shaped(torch.where(mask, per_token, 0).detach(), mask, every)


def loss_and_metrics(
    inputs: LossInputs,
    alpha: Tensor,
    has_image: Tensor | None,
    options: LossOptions,
    reduction: Reduction,
    layout: Layout,
    ops: TokenOps,
) -> tuple[Tensor, Metrics]:
    """Everything after shaping, from tokens that are checked; `alpha` is the trajectory factor, `[B]`."""
    mask, dependency, scored = inputs.mask, inputs.dependency, inputs.mask
    if dependency is not None and has_image is not None:  # a row without an image may hold anything
        scored = mask & layout.spread(has_image != 0)
        dependency = torch.where(scored, dependency, 0)

    def as_rows(values: Tensor | None) -> Tensor | None:
        return None if values is None else layout.as_rows(values)

    rows = LossInputs(
        layout.as_rows(inputs.logprobs),
        layout.as_rows(inputs.old_logprobs),
        layout.as_rows(inputs.advantages),
        layout.as_rows(inputs.keep),
        layout.as_rows(mask),
        as_rows(inputs.entropy),
        as_rows(inputs.ref_logprobs),
        as_rows(inputs.is_weights),
        as_rows(dependency),
    )
    values, sums = ops.clipped_loss(rows, options, per_token=reduction.per_token or layout.packed)
    lengths = sums[0]
    if layout.packed:  # all of it was one row
        values, lengths = values.squeeze(0), layout.sum(mask, sums.dtype)
    if reduction.per_token:
        loss = values
    else:
        loss = reduction(layout.sum(values, values.dtype) if layout.packed else values, lengths, layout.width)
    metrics = _metrics(sums.sum(1), inputs, options)
    if dependency is not None:
        kept = layout.sum(inputs.keep, sums.dtype) if layout.packed else sums[SUMS.index("kept_fraction")]
        metrics["responses_without_kept"] = ((kept == 0) & (lengths > 0)).sum(dtype=sums.dtype)
        metrics["dependency_mean"] = sums[SUMS.index("dependency")].sum() / scored.sum().clamp_min(1)
        alpha = alpha if len(alpha) else alpha.new_ones(1)
        metrics |= {"alpha_min": alpha.amin(), "alpha_mean": alpha.mean(), "alpha_max": alpha.amax()}
        metrics["alpha_std"] = alpha.std(correction=0)
    return loss, metrics


def _metrics(totals: Tensor, inputs: LossInputs, options: LossOptions) -> Metrics:
    """Means over the response tokens and over the active ones, from `SUMS` of the batch, `[12]`."""
    total_of = dict(zip(SUMS, totals, strict=True))
    tokens, active = total_of["tokens"].clamp_min(1), total_of["active_fraction"].clamp_min(1)
    metrics = {name: total_of[name] / tokens for name in PER_TOKEN if name != "tokens"}
    metrics |= {name: total_of[name] / active for name in PER_ACTIVE}
    if options.clip_dual is None:
        del metrics["clip_fraction_dual"]
    if inputs.entropy is None:
        del metrics["entropy_mean"]
    if inputs.ref_logprobs is not None:
        metrics["ref_kl"] = total_of["ref_kl"] / (tokens if options.every_token else active)
    return metrics


def vppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    dependency: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    keep_ratio: float = 0.4,
    keep_threshold: float | None = None,
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
        keep_ratio, keep_threshold, scale_min, scale_max, has_image, stats, stats_group: As in `vppo_advantages`.
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
        rows with an image), alpha_min, alpha_mean, alpha_max, alpha_std, and responses_without_kept, how many
        trajectories have tokens and keep none, as they do where none exceeds `keep_threshold`. Where given:
        entropy_mean, ref_kl.

    Raises:
        TypeError, ValueError: An argument is of the wrong type, shape, device or range, or not finite when checked.
    """
    scaling = ScaleOptions(scale_min, scale_max, stats, stats_group)
    options = LossOptions(clip_low, clip_high, clip_dual, nll_coef, entropy_coef, kl_coef)
    reduction = Reduction(loss_agg, denominator)
    gate = Gate(keep_ratio, keep_threshold)
    layout = layout_of("logprobs", logprobs, cu_seqlens, check)
    if kl_coef and ref_logprobs is None:
        raise ValueError("ref_logprobs: got None, takes [B, T] log-probabilities where kl_coef is not 0")
    if entropy_coef and entropy is None:
        raise ValueError("entropy: got None, takes [B, T] entropies where entropy_coef is not 0")
    valid = layout.within(arguments.token_mask(mask, logprobs))
    check_values = arguments.wanted(check, logprobs)
    tokens = {"logprobs": logprobs, "old_logprobs": old_logprobs, "entropy": entropy, "ref_logprobs": ref_logprobs,
              "is_weights": is_weights}  # fmt: skip
    arguments.tensor("old_logprobs", old_logprobs)
    ops = backends.token_ops(backend, logprobs, advantages, dependency, *tokens.values())
    shaped = shaped_by(dependency, advantages, valid, has_image, gate, scaling, layout, ops, check_values)
    for name, value in tokens.items():
        check_tokens(name, value, valid, check_values)
    inputs = LossInputs(
        logprobs,
        old_logprobs.detach(),
        shaped.advantages,
        shaped.keep,
        valid,
        entropy,
        None if ref_logprobs is None else ref_logprobs.detach(),
        None if is_weights is None else is_weights.detach(),
        dependency,
    )
    return loss_and_metrics(inputs, shaped.alpha, has_image, options, reduction, layout, ops)
