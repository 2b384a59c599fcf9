"""The sweep and its backward as torch sees them: two operators that `torch.compile` does not look into."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vppo_kernels import arguments, tiling, topk
from vppo_kernels.backends import Backend, resolve
from vppo_kernels.linear_head import LinearHead
from vppo_kernels.logits import GivenLogits, LogitTransform, full_precision, logit_dtype
from vppo_kernels.statistics import (
    GRAD_DIVERGENCE,
    GRAD_ENTROPY_P,
    GRAD_ENTROPY_Q,
    GRAD_LOGPROB_P,
    GRAD_LOGPROB_Q,
    JSD_FIELDS,
    JSD_P,
    JSD_Q,
    KL,
    PAIR_FIELDS,
    SOFTMAX_FIELDS,
    unpack_pair,
    unpack_softmax,
)
from vppo_kernels.two_heads import TwoHeads
from vppo_kernels.vocab_parallel import Shard

HEAD = 4  # arguments after the views that can have a gradient: weight and bias of both heads

# the upstream gradients of two views in the order of the swapped ones
SWAPPED = (GRAD_DIVERGENCE, GRAD_ENTROPY_Q, GRAD_ENTROPY_P, GRAD_LOGPROB_Q, GRAD_LOGPROB_P)


def _swaps(kind: str) -> bool:
    """Whether p is the second view, as it is of what is a KL of the swapped views."""
    return kind in ("reverse_kl", "topk")


def _order(kind: str, both: Any) -> Any:
    """What is of the first and of the second view, as p's and q's; and the other way round."""
    return both[::-1] if _swaps(kind) else both


def _fields(kind: str, k: int) -> int:
    """Rows of `saved`."""
    if kind == "topk":
        return topk.fields(k)
    return SOFTMAX_FIELDS if kind == "logprob" else PAIR_FIELDS + (JSD_FIELDS if kind == "jsd" else 0)


def _outputs(kind: str, targets: Tensor | None) -> int:
    """Rows of `values`: (logprobs, entropy), or the fields of `DivergenceOutput`, of which two need targets."""
    return 2 if kind == "logprob" else 3 if targets is None else 5


def _source(
    views: list[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    weight_other: Tensor | None,
    bias_other: Tensor | None,
    active: Tensor | None,
    transform: list[float],
    transform_other: list[float] | None,
    shard: list[int],
    whole: list[bool],
    group: str,
    kind: str,
    backend: str,
    exact: bool,
    wants: list[bool] | None = None,
) -> tuple[GivenLogits | LinearHead | TwoHeads, Backend]:
    """What the arguments of `run_sweep` say where logits come from, p's first; with `wants` it collects gradients."""
    first, columns, max_columns, total = shard
    parts = [Shard(first, columns, max_columns, total, group, each) for each in whole]
    options = [LogitTransform(*fields) for fields in (transform, transform_other) if fields is not None]
    inputs = _inputs(views, weight, bias, weight_other, bias_other)
    dtype = logit_dtype(*_inputs(views, weight, None, weight_other, None))
    chosen = resolve(backend, views[0].device, dtype)
    flags = iter([False] * len(inputs) if wants is None else wants)
    want_views = tuple(next(flags) for _ in views)
    heads = [
        (w, b, next(flags), b is not None and next(flags))
        for w, b in ((weight, bias), (weight_other, bias_other))
        if w is not None
    ]
    if len(heads) == 2:
        first_head, second_head = (
            LinearHead([h], w, b, option, part, active, ((want,), want_w, want_b), chosen.product, exact, True, dtype)
            for h, want, (w, b, want_w, want_b), option, part in zip(
                views, want_views, heads, options, parts, strict=True
            )
        )
        return TwoHeads(*_order(kind, (first_head, second_head))), chosen
    views, want_views = _order(kind, views), _order(kind, want_views)
    if not heads:
        return GivenLogits(views, options[0], parts[0], active, want_views), chosen
    w, b, want_w, want_b = heads[0]
    wanted = want_views, want_w, want_b
    head = LinearHead(views, w, b, options[0], parts[0], active, wanted, chosen.product, exact)
    chosen.check(head)
    return head, chosen


def run_sweep(
    views: list[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    weight_other: Tensor | None,
    bias_other: Tensor | None,
    targets: Tensor | None,
    active: Tensor | None,
    transform: list[float],
    transform_other: list[float] | None,
    shard: list[int],
    whole: list[bool],
    group: str,
    kind: str,
    beta: float,
    k: int,
    backend: str,
    workspace: int,
    exact: bool,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """All rows against the whole vocabulary.

    Args:
        views: One or two `[rows, D]` hidden states, or without a weight `[rows, V]` logits.
        weight, bias: `[V, D]` and `[V]`, of both views, or of the first.
        weight_other, bias_other: `[V_other, D_other]` and `[V_other]` of the second view, if it has its own head.
        targets: `[rows]` int64.
        active: Indices of the hidden states that are rows here; None for all.
        transform: Fields of a `LogitTransform`, the last left out if there is no cap.
        transform_other: The same of the second view's own head; None where there is none.
        shard, group: Fields of a `Shard`.
        whole: The last field of each head's `Shard`; one without a second head.
        kind: "logprob" for one view; "kl", "reverse_kl", "jsd" or "topk" for two.
        beta: Of "jsd": the share of the second view in the mean that both are compared with.
        k: Of "topk": how many words of the second view are told apart.
        backend: Its name.
        workspace: Bound on working memory in bytes, 0 for the one in force.
        exact: As `LinearHead` takes it.
        gradient: Whether a backward may follow. It recomputes tiles, and the gradient of a small divergence is right
            only if they are rounded as in the forward: then nothing is fused.

    Returns:
        `values`, `[2, rows]` (logprobs, entropy) or `[3 or 5, rows]` (divergence, entropies, logprobs), through which
        gradient flows, and `saved`, what the backward needs.
    """
    source, chosen = _source(
        views, weight, bias, weight_other, bias_other, active, transform, transform_other, shard, whole, group, kind,
        backend, exact,
    )  # fmt: skip
    fused = None if gradient else chosen.fused
    with full_precision(source.device):
        if kind == "logprob":
            assert targets is not None
            saved = tiling.forward(source, chosen.tiles, targets, workspace, fused)
            view = unpack_softmax(saved)
            return torch.stack([view.logprobs, view.entropy]), saved
        jsd_terms = None
        if kind == "topk":
            value, saved = topk.forward(source, chosen.tiles, targets, k, workspace)
            packed = saved[:PAIR_FIELDS]
        else:
            share = beta if kind == "jsd" else None
            packed, jsd_terms = tiling.forward_pair(source, chosen.tiles, targets, workspace, share, fused)
            value, saved = packed[KL], packed if jsd_terms is None else torch.cat([packed, jsd_terms])
    pair = unpack_pair(packed)
    if jsd_terms is not None:
        value = ((1 - beta) * jsd_terms[JSD_P] + beta * jsd_terms[JSD_Q]).clamp_min(0.0)
    first, second = _order(kind, (pair.p, pair.q))
    rows = [value, first.entropy, second.entropy, first.logprobs, second.logprobs]
    return torch.stack(rows[: _outputs(kind, targets)]), saved


def run_sweep_backward(
    grad: Tensor,
    saved: Tensor,
    views: list[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    weight_other: Tensor | None,
    bias_other: Tensor | None,
    targets: Tensor | None,
    active: Tensor | None,
    transform: list[float],
    transform_other: list[float] | None,
    shard: list[int],
    whole: list[bool],
    group: str,
    kind: str,
    beta: float,
    k: int,
    backend: str,
    workspace: int,
    exact: bool,
    wants: list[bool],
) -> list[Tensor]:
    """Gradients of the views, then of the weights and biases that there are; of shape `[0]` where `wants` says no.

    `grad` is that of `values`. Rows where all of it is exactly zero are left out of every product.
    """
    rows = (grad != 0).any(0).nonzero().flatten()
    if len(rows) < grad.shape[1]:
        grad, saved = grad[:, rows], saved[:, rows]
        targets = None if targets is None else targets[rows]
        active = rows if active is None else active[rows]
    if _swaps(kind):
        grad = grad[list(SWAPPED[: len(grad)])]
    grad, saved = grad.resolve_neg().contiguous(), saved.contiguous()  # kernels take fields without gaps

    source, chosen = _source(
        views, weight, bias, weight_other, bias_other, active, transform, transform_other, shard, whole, group, kind,
        backend, exact, wants,
    )  # fmt: skip
    with full_precision(source.device):
        if kind == "logprob":
            assert targets is not None
            tiling.backward(source, chosen.tiles, saved, targets, grad, workspace)
        elif kind == "topk":
            topk.backward(source, chosen.tiles, saved, targets, grad, k, workspace)
        else:
            jsd_terms = saved[PAIR_FIELDS:] if kind == "jsd" else None
            tiling.backward_pair(source, chosen.tiles, saved[:PAIR_FIELDS], jsd_terms, beta, targets, grad, workspace)
    if isinstance(source, TwoHeads):
        found = [head.gradients() for head in _order(kind, source.heads)]
        grads = [*(of_view for (of_view,), _, _ in found), *(g for _, *of_head in found for g in of_head)]
    else:
        grad_views, *of_head = source.gradients()
        grads = [*_order(kind, grad_views), *of_head]
    places = [*views, weight, bias, weight_other, bias_other]
    given = [g for g, x in zip(grads, places, strict=False) if x is not None]
    return [grad.new_empty(0) if g is None else g for g in given]


def _inputs(
    views: list[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    weight_other: Tensor | None,
    bias_other: Tensor | None,
) -> list[Tensor]:
    """The tensors that can have a gradient."""
    return [*views, *(x for x in (weight, bias, weight_other, bias_other) if x is not None)]


# The plain functions keep their names for tests that follow every tensor, which cannot look into an operator.
sweep = torch.library.custom_op("vppo_kernels::sweep", run_sweep, mutates_args=())
sweep_backward = torch.library.custom_op("vppo_kernels::sweep_backward", run_sweep_backward, mutates_args=())


@sweep.register_fake
def _(  # type: ignore[no-untyped-def]
    views, weight, bias, weight_other, bias_other, targets, active, transform, transform_other, shard, whole, group,
    kind, beta, k, *_
):  # fmt: skip
    dtype = logit_dtype(*_inputs(views, weight, None, weight_other, None))
    rows = (views[0] if active is None else active).shape[0]
    empty = views[0].new_empty
    return empty(_outputs(kind, targets), rows, dtype=dtype), empty(_fields(kind, k), rows, dtype=dtype)


@sweep_backward.register_fake
def _(grad, saved, views, weight, bias, weight_other, bias_other, *rest):  # type: ignore[no-untyped-def]
    inputs, wants = _inputs(views, weight, bias, weight_other, bias_other), rest[-1]
    return [torch.empty_like(x) if want else grad.new_empty(0) for x, want in zip(inputs, wants, strict=True)]


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for a backward.

    Raises:
        NotImplementedError: It asks for forward mode.
    """
    arguments.reverse_mode(*tensors)
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    views, *tensors = inputs[: 1 + HEAD + 2]
    ctx.views, ctx.options = len(views), inputs[1 + HEAD + 2 : -1]
    ctx.save_for_backward(*views, *tensors, output[1])


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    views, (*head, targets, active, saved) = ctx.saved_tensors[: ctx.views], ctx.saved_tensors[ctx.views :]
    want_views, *want_head = ctx.needs_input_grad[: 1 + HEAD]
    wants = [*want_views, *(want for want, x in zip(want_head, head, strict=True) if x is not None)]
    grads = iter(sweep_backward(grad, saved, list(views), *head, targets, active, *ctx.options, wants))

    def taken(want: bool) -> Tensor | None:
        found = next(grads)
        return found if want else None

    of_views = [taken(want) for want in want_views]
    of_head = [None if x is None else taken(want) for want, x in zip(want_head, head, strict=True)]
    return of_views, *of_head, *(None,) * (len(ctx.options) + 3)


sweep.register_autograd(_gradients, setup_context=_save)
