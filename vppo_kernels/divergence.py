"""Divergence between the next-token distributions of two views: from hidden states, from logits, from samples."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vppo_kernels import arguments, tensor_cores, tiling, verify, vocab_parallel
from vppo_kernels.logits import LogitTransform
from vppo_kernels.statistics import DivergenceOutput
from vppo_kernels.sweep import sweep, wants_gradient
from vppo_kernels.topk import MOST_WORDS

KINDS = ("kl", "reverse_kl", "jsd", "topk")
SAMPLED_KINDS = ("k1", "abs_k1", "k2", "k3", "prob_drop")
LOG_RATIO_LIMIT = 20.0


def _output(values: Tensor, leading: torch.Size) -> DivergenceOutput:
    rows = [value.view(leading) for value in values.unbind(0)]
    return DivergenceOutput(*rows, *(None,) * (5 - len(rows)))


def _checked_kind(kind: str, beta: float, k: int | None) -> tuple[str, float]:
    """The kind, which at either end of "jsd" is a Kullback-Leibler divergence, and what is `beta` of it, else 0.5.

    Raises:
        ValueError: There is no such kind, `beta` is out of range, or `k` is there or missing where it should not be.
    """
    arguments.one_of("kind", kind, KINDS)
    if kind == "topk" and not (isinstance(k, int) and not isinstance(k, bool) and k >= 1):
        raise ValueError(f"k: got {k!r}, takes an integer of at least 1 with kind 'topk'")
    if kind != "topk" and k is not None:
        raise ValueError(f"k: got {k!r}, takes None with kind {kind!r}")
    if not (isinstance(beta, int | float) and 0 <= beta <= 1):
        raise ValueError(f"beta: got {beta!r}, takes a number from 0 to 1")
    if kind != "jsd":
        return kind, 0.5
    return {0.0: ("reverse_kl", 0.5), 1.0: ("kl", 0.5)}.get(float(beta), (kind, float(beta)))


def _check_words(kind: str, total: int) -> None:
    if kind == "topk" and total > MOST_WORDS:
        raise ValueError(f"kind: got 'topk' with a vocabulary of {total} words, takes at most {MOST_WORDS} there")


class _Head(NamedTuple):
    """What turns hidden states into logits, checked as far as that goes without them."""

    weight: Any
    bias: Any
    transform: LogitTransform


def _head_of_other(
    own: _Head,
    weight: Tensor | None,
    bias: Tensor | None,
    temperature: float | None,
    logit_scale: float | None,
    softcap: float | None,
) -> _Head | None:
    """The second view's own head, from the arguments that end in "_other"; None where it is the first's."""
    if weight is None and bias is not None:
        raise ValueError("bias_other: got a tensor without weight_other, takes None there")
    given = own.transform.arguments()
    for name, value in dict(temperature=temperature, logit_scale=logit_scale, softcap=softcap).items():
        if value is not None:
            given[name] = value
    if given["softcap"] == math.inf:
        given["softcap"] = None
    transform = LogitTransform(**given, of="_other")  # type: ignore[arg-type]
    if weight is None:
        weight, bias = own.weight, own.bias
    if weight is own.weight and bias is own.bias and transform == own.transform:
        return None
    return _Head(weight, bias, transform)


def linear_divergence(
    hidden: Tensor,
    hidden_perturbed: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    weight_other: Tensor | None = None,
    bias_other: Tensor | None = None,
    targets: Tensor | None = None,
    kind: str = "kl",
    beta: float = 0.5,
    k: int | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature_other: float | None = None,
    logit_scale_other: float | None = None,
    softcap_other: float | None = None,
    vocab_size: int | None = None,
    process_group: Any = None,
    precision: str = "default",
    backend: str = "auto",
    check: bool = False,
) -> DivergenceOutput:
    """Exact divergence between the next-token distributions of two views (VPPO, Eq. 3).

    The views are those of a clean and a perturbed image under one head, or those of a student and a teacher, each under
    its own. The logits `softcap * tanh(logit_scale * (h W^T + b) / softcap) / temperature` of both exist only as tiles:
    working memory stays within `workspace_limit`, whatever the number of rows and of vocabulary entries is.

    A bias of -inf masks its word: the word has no probability, no part in any result, and no gradient, and its
    log-probability as a target is -inf. Infinite results have no gradient: where the bias of the second head alone
    masks a word, "kl" is +inf. A row whose words are all masked is NaN. A `softcap` masks nothing, as tanh turns -inf
    into -softcap; a `logit_scale` of 0 or below turns the row into NaN.

    With the same number of threads results repeat bit for bit. With another number, gradients of hidden states and
    weight may differ in their last bits: they are torch's matrix products, which then sum in another order.

    Args:
        hidden: `[..., D]` final hidden states given the clean image, or of the student; float32, bfloat16 or float16.
        hidden_perturbed: The same given the perturbed image, or of the teacher: `[..., D]`, or `[..., D_other]` with
            `weight_other`.
        weight: `[V, D]` weight of the language-model head.
        bias: `[V]` or None; finite, or -inf.
        weight_other: `[V_other, D_other]` weight of the second view's own head, whose words have the same indices; None
            for the same head. Without `vocab_size` V_other is V. Dtypes may differ. Where nothing of a head asks for
            a gradient, no product is made for one. Under one head both views' logits share most of their rounding, and
            it cancels; of two heads it does not, so that a divergence below 1e-2 nats may miss the bound of `precision`
            by as much as float32 products do: by up to a factor of 1.4 at widths 1,536 and 2,560.
        bias_other: `[V_other]` or None: of `weight_other`.
        targets: `[...]` int64 or int32 sampled tokens, whose log-probabilities are wanted too; None if they are not.
        kind: "kl" is `KL(first || second)`: `KL(clean || perturbed)`, `KL(student || teacher)`. "reverse_kl" is the
            other direction, "jsd" the Jensen-Shannon divergence. "topk" is `KL(second || first)` of k + 1
            probabilities: those of the second view's k likeliest words (of equal ones any), and the sum of all others,
            each exact over the whole vocabulary.
        beta: Of "jsd", generalised as GKD and TRL do (arXiv 2306.13649, Eq. 1), with p of the first and q of the second
            view: `beta KL(q || m) + (1 - beta) KL(p || m)`, `m = beta q + (1 - beta) p`. From 0 to 1. At both ends the
            formula is 0 whatever p and q are; there it stands, as it does in TRL, for what the divergence by `beta` or
            by `1 - beta` tends to: "reverse_kl" at 0, "kl" at 1.
        k: Of "topk", and None for the others. What is kept for a backward grows with it: `3 k + 12` numbers a row.
        temperature: Divides the logits; above 0.
        logit_scale: Multiplies the projection, before the cap.
        softcap: Logits are bounded by it through tanh, as Gemma does; None for no cap.
        temperature_other, logit_scale_other, softcap_other: Of the second view, with or without a weight of its own;
            None for those of the first. A `softcap_other` of math.inf is no cap.
        vocab_size: Only the first `vocab_size` rows of the whole weight, of either head, are vocabulary, the others
            padding.
        process_group: Its ranks hold consecutive parts of the vocabulary, of any sizes, in rank order (tensor
            parallel): `weight` and `bias` are this rank's, everything else, upstream gradients too, is the same on all
            ranks. Results and gradients of hidden states are of the whole vocabulary. None for a whole weight; a
            weight that is a DTensor sharded on dimension 0 brings its own group. Of two heads both are split in the
            same places (padding aside), or one is whole on every rank: a replicated DTensor, or a plain tensor without
            `process_group` beside a sharded one.
        precision: "default" or "exact", which differ where tensor cores multiply: on a GPU, if hidden states and weight
            are both bfloat16 or both float16. Those cut off what they add, so that a divergence is off by up to
            `1e-5 KL + 2e-5 sqrt(KL) + 1e-8` nats, a log-probability or entropy by up to 2e-4. "exact" sums the inner
            dimension in slabs, takes longer, and keeps float32's bounds: `1e-5 KL + 3e-6 sqrt(KL) + 1e-8` and 2e-5.
            Of two heads "exact" also multiplies in float64 what would be multiplied in float32, which takes about
            twice as long, and keeps that bound where the default may miss it.
        backend: "auto", "torch", "native", "triton", or "native_fused" and "triton_fused" (no logits in memory; see
            their modules).
        check: Raise on NaN and inf in the inputs (-inf is allowed in a bias), and compare up to 16 rows with the
            float64 definition. Code that `torch.compile` traces has no values to check: there only types and
            shapes are checked.

    Returns:
        `DivergenceOutput(divergence, entropy, entropy_perturbed, logprobs, logprobs_perturbed)`, each `[...]`, float32
        (float64 for float64 inputs), in nats. The divergence is never negative. Differentiable, once, in both hidden
        states, weights and biases, through every output.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, device, target or number is out of range; with `check`, an input is not finite.
        RuntimeError: With `check`, a row disagrees with the definition.
    """
    kind, beta = _checked_kind(kind, beta, k)
    exact = tensor_cores.check_precision(precision)
    own = _Head(weight, bias, LogitTransform(temperature, logit_scale, softcap))
    other = _head_of_other(own, weight_other, bias_other, temperature_other, logit_scale_other, softcap_other)
    given = [own] if other is None else [own, other]
    local, whole, process_group = vocab_parallel.localize_heads([head[:2] for head in given], process_group)
    heads = [_Head(*part, head.transform) for part, head in zip(local, given, strict=True)]
    ends = ["", "_other"][: len(heads)]  # of the names of what belongs to each head
    hidden = vocab_parallel.local_hidden("hidden", hidden)
    hidden_perturbed = vocab_parallel.local_hidden("hidden_perturbed", hidden_perturbed)
    split, (w_last, b_last, _) = process_group is not None, heads[-1]
    arguments.head(hidden, heads[0].weight, heads[0].bias, empty=split)
    arguments.head(hidden_perturbed, w_last, b_last, "hidden_perturbed", empty=split, of=ends[-1])
    arguments.same_device(f"weight{ends[-1]}", w_last, hidden.device, "weight")
    leading = hidden.shape[:-1]
    arguments.shape("hidden_perturbed", hidden_perturbed, (*leading, w_last.shape[1]), "the rows of hidden")
    views = [h.reshape(leading.numel(), h.shape[-1]) for h in (hidden, hidden_perturbed)]
    same: dict[str, Any] = dict(
        targets=targets, kind=kind, beta=beta, k=k, precision=precision, backend=backend,
        workspace_limit=tiling.current_workspace(),
    )  # fmt: skip
    columns: dict[str, int] = {}
    for head, end in zip(heads, ends, strict=True):
        same |= head.transform.arguments(end)
        columns[f"weight{end}"] = len(head.weight)
    shards = vocab_parallel.shards_of(process_group, views, columns, whole, vocab_size, same)
    _check_words(kind, shards[0].total)
    if targets is not None:
        arguments.indices("targets", targets, leading, shards[0].total, hidden.device, check)
        targets = targets.reshape(-1).long().contiguous()
    tensors = [*heads[0][:2], *((None, None) if other is None else heads[1][:2])]
    values, _ = sweep(
        views, *tensors, targets, None, heads[0].transform.fields(),
        None if other is None else heads[1].transform.fields(), list(shards[0][:4]), [part.whole for part in shards],
        shards[0].group, kind, beta, min(k or 0, shards[0].total), backend, tiling.current_workspace(), exact,
        wants_gradient(*views, *tensors),
    )  # fmt: skip
    if arguments.wanted(check, hidden):
        with torch.no_grad():
            for head, part, end in zip(heads, shards, ends, strict=True):
                arguments.finite_head(head.weight, head.bias, part.total if part.whole else part.columns, end)
            arguments.all_finite("hidden", views[0])
            arguments.all_finite("hidden_perturbed", views[1])
            if len(views[0]):
                rows = verify.sample_rows(len(views[0]), hidden.device)
                of_views = list(zip(views, (heads[0], heads[-1]), (shards[0], shards[-1]), strict=True))
                sampled = [(h[rows], *head, part) for h, head, part in of_views]
                z_p, z_q = (verify.exact_logits(*each) for each in sampled)
                terms = torch.maximum(*(verify.magnitude(*each) for each in sampled))
                cut = not exact and any(tensor_cores.multiply(h, head.weight) for h, head, _ in of_views)
                verify.check_pair(
                    _output(values, values.shape[1:]), z_p, z_q, targets, rows, kind, beta, k, terms, cut=cut
                )
    return _output(values, leading)


def divergence(
    logits: Tensor,
    logits_perturbed: Tensor,
    *,
    targets: Tensor | None = None,
    kind: str = "kl",
    beta: float = 0.5,
    k: int | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    process_group: Any = None,
    backend: str = "auto",
    check: bool = False,
) -> DivergenceOutput:
    """As `linear_divergence`, for callers that already hold logits.

    A logit of -inf is a masked word of that view. Where the second view alone masks a word, however little probability
    the first gives it, "kl" is +inf and has no gradient; "reverse_kl" where the first alone does; "jsd" is finite.
    With a softcap, or a logit_scale that is not above 0, see `linear_divergence`.

    Args:
        logits: `[..., V]` given the clean image, any of float32, bfloat16 and float16. Logits that were rounded to 16
            bits have lost small divergences already; nothing here can bring them back.
        logits_perturbed: The same given the perturbed image.
        targets, kind, beta, k, temperature, logit_scale, softcap: As in `linear_divergence`.
        vocab_size: Only the first `vocab_size` columns are vocabulary.
        process_group, backend, check: As in `linear_divergence`.

    Returns:
        `DivergenceOutput`, each `[...]` float32, in nats; differentiable, once, in both logits through every output.

    Raises:
        TypeError, ValueError, RuntimeError: As `linear_divergence`.
    """
    kind, beta = _checked_kind(kind, beta, k)
    transform = LogitTransform(temperature, logit_scale, softcap)
    arguments.floating("logits", logits)
    arguments.floating("logits_perturbed", logits_perturbed)
    if logits.dim() < 1 or (logits.shape[-1] == 0 and process_group is None):
        raise ValueError(f"logits: got shape {list(logits.shape)}, takes [..., V] with V of at least 1")
    arguments.shape("logits_perturbed", logits_perturbed, tuple(logits.shape), "that of logits")
    arguments.same_device("logits_perturbed", logits_perturbed, logits.device, "logits")
    leading = logits.shape[:-1]
    views = [z.reshape(leading.numel(), z.shape[-1]) for z in (logits, logits_perturbed)]
    same = transform.arguments() | dict(
        targets=targets, kind=kind, beta=beta, k=k, backend=backend, workspace_limit=tiling.current_workspace()
    )
    shard = vocab_parallel.shard_of(process_group, views, logits.shape[-1], vocab_size, "logits", same)
    _check_words(kind, shard.total)
    if targets is not None:
        arguments.indices("targets", targets, leading, shard.total, logits.device, check)
        targets = targets.reshape(-1).long().contiguous()
    check_values = arguments.wanted(check, logits)
    if check_values:
        arguments.logits("logits", views[0][:, : shard.columns])
        arguments.logits("logits_perturbed", views[1][:, : shard.columns])
    values, _ = sweep(
        views, None, None, None, None, targets, None, transform.fields(), None, list(shard[:4]), [shard.whole],
        shard.group, kind, beta, min(k or 0, shard.total), backend, tiling.current_workspace(), False,
        wants_gradient(*views),
    )  # fmt: skip
    if check_values and len(views[0]):
        with torch.no_grad():
            rows = verify.sample_rows(len(views[0]), logits.device)
            z_p, z_q = (verify.exact_transform(z[rows, : shard.columns], transform, shard) for z in views)
            given = transform == LogitTransform()
            verify.check_pair(_output(values, values.shape[1:]), z_p, z_q, targets, rows, kind, beta, k, given=given)
    return _output(values, leading)


def sampled_divergence(
    logprobs: Tensor, logprobs_perturbed: Tensor, *, kind: str = "k3", clamp: float | None = 10.0
) -> Tensor:
    """One-sample estimates of the divergence, from the sampled token's log-probability in both views.

    With `d = log q(y) - log p(y)`, held within +-20: "k1" is `-d`, "abs_k1" `|d|`, "k2" `d^2 / 2`, "k3"
    `exp(d) - d - 1` (the estimator of VPPO's released code), "prob_drop" `p(y) - q(y)`.

    Args:
        logprobs: `[...]` log p(y) given the clean image, in nats.
        logprobs_perturbed: `[...]` log q(y) given the perturbed image.
        kind: One of "k1", "abs_k1", "k2", "k3", "prob_drop".
        clamp: Bound on the estimate's size; None for none.

    Returns:
        `[...]` in the dtype of the inputs; differentiable in both.

    Raises:
        TypeError, ValueError: An argument is of the wrong type, shape, device or range.
    """
    arguments.one_of("kind", kind, SAMPLED_KINDS)
    arguments.floating("logprobs", logprobs)
    arguments.floating("logprobs_perturbed", logprobs_perturbed)
    arguments.shape("logprobs_perturbed", logprobs_perturbed, tuple(logprobs.shape), "that of logprobs")
    arguments.same_device("logprobs_perturbed", logprobs_perturbed, logprobs.device, "logprobs")
    if clamp is not None:
        arguments.positive("clamp", clamp)
    if kind == "prob_drop":
        value = logprobs.exp() - logprobs_perturbed.exp()
    else:
        d = (logprobs_perturbed - logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        value = {
            "k1": lambda: -d,
            "abs_k1": lambda: d.abs(),
            "k2": lambda: 0.5 * d.square(),
            "k3": lambda: torch.expm1(d) - d,
        }[kind]()
    return value if clamp is None else value.clamp(-clamp, clamp)
