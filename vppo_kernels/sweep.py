"""The sweep and its backward as torch sees them: two operators that `torch.compile` does not look into."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vppo_kernels import arguments, tiling
from vppo_kernels.backends import resolve
from vppo_kernels.logits import GivenLogits, LinearHead, LogitTransform, full_precision, logit_dtype
from vppo_kernels.statistics import (
    GRAD_DIVERGENCE,
    GRAD_ENTROPY_P,
    GRAD_ENTROPY_Q,
    GRAD_LOGPROB_P,
    GRAD_LOGPROB_Q,
    JSD_FIELDS,
    PAIR_FIELDS,
    SOFTMAX_FIELDS,
    unpack_pair,
    unpack_softmax,
)
from vppo_kernels.vocab_parallel import Shard

# rows of `saved`
FIELDS = {"logprob": SOFTMAX_FIELDS, "kl": PAIR_FIELDS, "reverse_kl": PAIR_FIELDS, "jsd": PAIR_FIELDS + JSD_FIELDS}


# the upstream gradients of two views in the order of the swapped ones
SWAPPED = (GRAD_DIVERGENCE, GRAD_ENTROPY_Q, GRAD_ENTROPY_P, GRAD_LOGPROB_Q, GRAD_LOGPROB_P)


def _order(kind: str, both: Any) -> Any:
    """Reverse KL is KL of the swapped views."""
    return both[::-1] if kind == "reverse_kl" else both


def _shard(numbers: list[int], group: str) -> Shard:
    first, columns, max_columns, total = numbers
    return Shard(first, columns, max_columns, total, group)


def _outputs(kind: str, targets: Tensor | None) -> int:
    """Rows of `values`: (logprobs, entropy), or the fields of `DivergenceOutput`, of which two need targets."""
    return 2 if kind == "logprob" else 3 if targets is None else 5


def run_sweep(
    views: list[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    targets: Tensor | None,
    active: Tensor | None,
    transform: list[float],
    shard: list[int],
    group: str,
    kind: str,
    backend: str,
    workspace: int,
    exact: bool,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """All rows against the whole vocabulary.

    Args:
        views: One or two `[rows, D]` hidden states, or without a weight `[rows, V]` logits.
        weight, bias: `[V, D]` and `[V]`.
        targets: `[rows]` int64.
        active: Indices of the hidden states that are rows here; None for all.
        transform: Fields of a `LogitTransform`, the last left out if there is no cap.
        shard, group: Fields of a `Shard`.
        kind: "logprob" for one view; "kl", "reverse_kl" or "jsd" for two.
        backend: Its name.
        workspace: Bound on working memory in bytes, 0 for the one in force.
        exact: As `LinearHead` takes it.
        gradient: Whether a backward may follow. It recomputes tiles, and the gradient of a small divergence is right
            only if they are rounded as in the forward: then nothing is fused.

    Returns:
        `values`, `[2, rows]` (logprobs, entropy) or `[3 or 5, rows]` (divergence, entropies, logprobs), through which
        gradient flows, and `saved`, what the backward needs.
    """
    views = _order(kind, views)
    options, part = LogitTransform(*transform), _shard(shard, group)
    chosen = resolve(backend, views[0].device, logit_dtype(*_inputs(views, weight, None)))
    source: GivenLogits | LinearHead
    if weight is None:
        source = GivenLogits(views, options, part)
    else:
        source = LinearHead(views, weight, bias, options, part, active, product=chosen.product, exact=exact)
    fused = None if gradient else chosen.fused
    with full_precision(source.device):
        if kind == "logprob":
            assert targets is not None
            saved = tiling.forward(source, chosen.tiles, targets, workspace, fused)
            view = unpack_softmax(saved)
            return torch.stack([view.logprobs, view.entropy]), saved
        packed, jsd_terms = tiling.forward_pair(source, chosen.tiles, targets, workspace, kind == "jsd", fused)
    pair = unpack_pair(packed)
    value = pair.kl if jsd_terms is None else (0.5 * (jsd_terms[0] + jsd_terms[1])).clamp_min(0.0)
    first, second = _order(kind, (pair.p, pair.q))
    rows = [value, first.entropy, second.entropy, first.logprobs, second.logprobs]
    saved = packed if jsd_terms is None else torch.cat([packed, jsd_terms])
    return torch.stack(rows[: _outputs(kind, targets)]), saved


def run_sweep_backward(
    grad: Tensor,
    saved: Tensor,
    views: list[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    targets: Tensor | None,
    active: Tensor | None,
    transform: list[float],
    shard: list[int],
    group: str,
    kind: str,
    backend: str,
    workspace: int,
    exact: bool,
    wants: list[bool],
) -> list[Tensor]:
    """Gradients of the views, then of weight and bias if there are any; of shape `[0]` where `wants` says no.

    `grad` is that of `values`. Rows where all of it is exactly zero are left out of every product.
    """
    rows = (grad != 0).any(0).nonzero().flatten()
    if len(rows) < grad.shape[1]:
        grad, saved = grad[:, rows], saved[:, rows]
        targets = None if targets is None else targets[rows]
        active = rows if active is None else active[rows]
    if kind == "reverse_kl":
        grad = grad[list(SWAPPED[: len(grad)])]
    grad, saved = grad.resolve_neg().contiguous(), saved.contiguous()  # kernels take fields without gaps

    swapped, options, part = _order(kind, views), LogitTransform(*transform), _shard(shard, group)
    want_views = tuple(_order(kind, wants[: len(views)]))
    chosen = resolve(backend, views[0].device, logit_dtype(*_inputs(views, weight, None)))
    source: GivenLogits | LinearHead
    if weight is None:
        source = GivenLogits(swapped, options, part, active, want_views)
    else:
        want_head = want_views, wants[len(views)], bias is not None and wants[-1]
        source = LinearHead(swapped, weight, bias, options, part, active, want_head, chosen.product, exact)
    with full_precision(source.device):
        if kind == "logprob":
            assert targets is not None
            tiling.backward(source, chosen.tiles, saved, targets, grad, workspace)
        else:
            jsd_terms = saved[PAIR_FIELDS:] if kind == "jsd" else None
            tiling.backward_pair(source, chosen.tiles, saved[:PAIR_FIELDS], jsd_terms, targets, grad, workspace)
    grad_views, *grad_head = source.gradients()
    grads = [*_order(kind, grad_views), *grad_head][: len(wants)]
    return [grad.new_empty(0) if g is None else g for g in grads]


def _inputs(views: list[Tensor], weight: Tensor | None, bias: Tensor | None) -> list[Tensor]:
    """The tensors that can have a gradient."""
    return [*views, *(x for x in (weight, bias) if x is not None)]


# The plain functions keep their names for tests that follow every tensor, which cannot look into an operator.
sweep = torch.library.custom_op("vppo_kernels::sweep", run_sweep, mutates_args=())
sweep_backward = torch.library.custom_op("vppo_kernels::sweep_backward", run_sweep_backward, mutates_args=())


@sweep.register_fake
def _(views, weight, bias, targets, active, transform, shard, group, kind, backend, workspace, exact, gradient):  # type: ignore[no-untyped-def]
    dtype, rows = logit_dtype(*_inputs(views, weight, None)), (views[0] if active is None else active).shape[0]
    empty = views[0].new_empty
    return empty(_outputs(kind, targets), rows, dtype=dtype), empty(FIELDS[kind], rows, dtype=dtype)


@sweep_backward.register_fake
def _(grad, saved, views, weight, bias, *rest):  # type: ignore[no-untyped-def]
    inputs, wants = _inputs(views, weight, bias), rest[-1]
    return [torch.empty_like(x) if want else grad.new_empty(0) for x, want in zip(inputs, wants, strict=True)]


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for a backward.

    Raises:
        NotImplementedError: It asks for forward mode.
    """
    arguments.reverse_mode(*tensors)
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    views, weight, bias, targets, active, *ctx.options, _ = inputs
    ctx.views = len(views)
    ctx.save_for_backward(*views, weight, bias, targets, active, output[1])


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    *views, weight, bias, targets, active, saved = ctx.saved_tensors
    want_views, want_weight, want_bias = ctx.needs_input_grad[:3]
    wants = list(want_views)
    if weight is not None:
        wants += [want_weight] if bias is None else [want_weight, want_bias]
    grads = sweep_backward(grad, saved, views, weight, bias, targets, active, *ctx.options, wants)
    given = [g if want else None for g, want in zip(grads, wants, strict=True)] + [None, None]
    count = ctx.views
    return given[:count], given[count], given[count + 1], *(None,) * 10


sweep.register_autograd(_gradients, setup_context=_save)
