"""`check=True`: a sample of rows against the plain definitions in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from vppo_kernels import arguments, reference
from vppo_kernels.logits import LogitTransform
from vppo_kernels.statistics import DivergenceOutput, LogprobOutput
from vppo_kernels.vocab_parallel import Shard, gather_columns

SAMPLE = 16


def sample_rows(total: int, device: torch.device) -> Tensor:
    """Up to `SAMPLE` rows, evenly spread, first and last among them."""
    places = torch.linspace(0, total - 1, min(SAMPLE, total), dtype=torch.float64, device=device)
    return places.round().long().unique()


def exact_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform, shard: Shard
) -> Tensor:
    """`[rows, V]` logits of the sampled rows in float64, of all ranks' columns."""
    bias = None if bias is None else bias.double()
    columns = shard.total if shard.whole else shard.columns
    local = reference.logits(hidden.double(), weight.double(), bias, vocab_size=columns, **vars(transform))
    return local if shard.whole else gather_columns(local, shard)


def magnitude(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform, shard: Shard
) -> Tensor:  # fmt: skip
    """`[rows]`: the largest sum of absolute terms of a row's logits; the rounding of a logit grows with it."""
    bias = None if bias is None else _unmasked(bias.double()).abs()
    columns = shard.total if shard.whole else shard.columns
    local = reference.logits(hidden.double().abs(), weight.double().abs(), bias, vocab_size=columns)
    scale = abs(transform.logit_scale) / transform.temperature
    return (local if shard.whole else gather_columns(local, shard)).amax(-1) * scale


def _unmasked(z: Tensor) -> Tensor:
    """Logits or a bias with 0 for a masked word, as -inf is not rounded."""
    return z.masked_fill(z == -torch.inf, 0.0)


def exact_transform(logits: Tensor, transform: LogitTransform, shard: Shard) -> Tensor:
    """As `exact_logits`, from `[rows, columns]` raw logits of this rank."""
    return gather_columns(reference.transform(logits.double(), **vars(transform)), shard)


def rounding(*logits: Tensor, terms: Tensor | None = None) -> Tensor:
    """How far the rounding of logits to float32 can move a result, from their size and from `magnitude` as `terms`."""
    size = torch.stack([_unmasked(z).abs().amax(-1) for z in logits]).amax(0) * 4
    return (size if terms is None else torch.maximum(size, terms)) * torch.finfo(torch.float32).eps


def compare(
    got: DivergenceOutput | LogprobOutput,
    expected: DivergenceOutput | LogprobOutput,
    rows: Tensor,
    slack: Tensor,
    cut: bool = False,
) -> None:
    """Raise RuntimeError naming the first output and row outside its bound."""
    for field in got._fields:
        value, truth = getattr(got, field), getattr(expected, field)
        if value is None:
            continue
        value = value.flatten()[rows].double()
        allowed = (reference.LOGPROB_BOUND_CUT if cut else reference.LOGPROB_BOUND) + slack
        if field == "divergence":
            # the slope of a divergence in the logits is of the order of its square root, and its curvature of 1
            allowed = reference.divergence_bound(truth, cut) + slack * truth.clamp_min(0).sqrt() + slack**2
        allowed = allowed + truth.abs() * torch.finfo(torch.float32).eps
        bad = torch.where(torch.isinf(truth), value != truth, ~((value - truth).abs() <= allowed))
        if bad.any():
            at = int(bad.nonzero()[0])
            arguments.disagreement(field, int(rows[at]), float(value[at]), float(truth[at]), float(allowed[at]))


def check_pair(
    got: DivergenceOutput,
    z_p: Tensor,
    z_q: Tensor,
    targets: Tensor | None,
    rows: Tensor,
    kind: str,
    beta: float = 0.5,
    k: int | None = None,
    terms: Tensor | None = None,
    given: bool = False,
    cut: bool = False,
) -> None:
    """Compare with the reference on float64 logits of the sampled rows, `[rows, V]` each; `terms` as `magnitude`.

    Logits that the caller gave, untransformed, have no rounding that could excuse an error: `given` says so.
    """
    chosen = None if targets is None else targets[rows].long()
    slack = torch.zeros_like(z_p[:, 0]) if given else rounding(z_p, z_q, terms=terms)
    expected = reference.divergence(z_p, z_q, chosen, kind, beta, k)
    if k is not None:  # where rounding decides which word is the k-th, there is nothing to compare with
        sure = reference.margin(z_q, k) > 2 * slack
        expected = expected._replace(divergence=torch.where(sure, expected.divergence, got.divergence[rows].double()))
    compare(got, expected, rows, slack, cut)


def check_single(
    got: LogprobOutput, z: Tensor, targets: Tensor, rows: Tensor, terms: Tensor, cut: bool = False
) -> None:  # fmt: skip
    """Compare with the reference on float64 logits of the sampled rows, `[rows, V]`; `terms` as `magnitude`."""
    compare(got, reference.logprob_output(z, targets[rows].long()), rows, rounding(z, terms=terms), cut)
