"""Divergence between the next-token distributions of two views: from hidden states, from logits, from samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vppo_kernels import arguments, tensor_cores, tiling, verify, vocab_parallel
from vppo_kernels.logits import LogitTransform
from vppo_kernels.statistics import DivergenceOutput
from vppo_kernels.sweep import sweep, wants_gradient

KINDS = ("kl", "reverse_kl", "jsd")
SAMPLED_KINDS = ("k1", "abs_k1", "k2", "k3", "prob_drop")
LOG_RATIO_LIMIT = 20.0


def _output(values: Tensor, leading: torch.Size) -> DivergenceOutput:
    rows = [value.view(leading) for value in values.unbind(0)]
    return DivergenceOutput(*rows, *(None,) * (5 - len(rows)))


def linear_divergence(
    hidden: Tensor,
    hidden_perturbed: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    targets: Tensor | None = None,
    kind: str = "kl",
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    process_group: Any = None,
    precision: str = "default",
    backend: str = "auto",
    check: bool = False,
) -> DivergenceOutput:
    """Exact divergence between the next-token distributions of a clean and a perturbed view (VPPO, Eq. 3).

    The logits `softcap * tanh(logit_scale * (h W^T + b) / softcap) / temperature` of both views exist only as tiles:
    working memory stays within `workspace_limit`, whatever the number of rows and of vocabulary entries is.

    A bias of -inf masks its word: the word has no probability, no part in any result, and no gradient, and its
    log-probability as a target is -inf. Infinite results have no gradient. A row whose words are all masked is NaN. A
    `softcap` masks nothing, as tanh turns -inf into -softcap; a `logit_scale` of 0 or below turns the row into NaN.

    With the same number of threads results repeat bit for bit. With another number, gradients of hidden states and
    weight may differ in their last bits: they are torch's matrix products, which then sum in another order.

    Args:
        hidden: `[..., D]` final hidden states given the clean image; float32, bfloat16 or float16.
        hidden_perturbed: The same given the perturbed image, of the same shape.
        weight: `[V, D]` weight of the language-model head.
        bias: `[V]` or None; finite, or -inf.
        targets: `[...]` int64 or int32 sampled tokens, whose log-probabilities are wanted too; None if they are not.
        kind: "kl" is `KL(clean || perturbed)`, "reverse_kl" the other direction, "jsd" the Jensen-Shannon divergence.
        temperature: Divides the logits; above 0.
        logit_scale: Multiplies the projection, before the cap.
        softcap: Logits are bounded by it through tanh, as Gemma does; None for no cap.
        vocab_size: Only the first `vocab_size` rows of the whole weight are vocabulary, the others padding.
        process_group: Its ranks hold consecutive parts of the vocabulary, of any sizes, in rank order (tensor
            parallel): `weight` and `bias` are this rank's, everything else, upstream gradients too, is the same on all
            ranks. Results and gradients of hidden states are of the whole vocabulary. None for a whole weight; a
            weight that is a DTensor sharded on dimension 0 brings its own group.
        precision: "default" or "exact", which differ where tensor cores multiply: on a GPU, if hidden states and weight
            are both bfloat16 or both float16. Those cut off what they add, so that a divergence is off by up to
            `1e-5 KL + 2e-5 sqrt(KL) + 1e-8` nats, a log-probability or entropy by up to 2e-4. "exact" sums the inner
            dimension in slabs, takes longer, and keeps float32's bounds: `1e-5 KL + 3e-6 sqrt(KL) + 1e-8` and 2e-5.
        backend: "auto", "torch", "native", "triton", or "triton_fused" (no logits in memory; see its module).
        check: Raise on NaN and inf in the inputs (-inf is allowed in the bias), and compare up to 16 rows with the
            float64 definition. Code that `torch.compile` traces has no values to check: there only types and
            shapes are checked.

    Returns:
        `DivergenceOutput(divergence, entropy, entropy_perturbed, logprobs, logprobs_perturbed)`, each `[...]`, float32
        (float64 for float64 inputs), in nats. The divergence is never negative. Differentiable, once, in both hidden
        states, weight and bias, through every output.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, device, target or number is out of range; with `check`, an input is not finite.
        RuntimeError: With `check`, a row disagrees with the definition.
    """
    arguments.one_of("kind", kind, KINDS)
    exact = tensor_cores.check_precision(precision)
    transform = LogitTransform(temperature, logit_scale, softcap)
    weight, bias, process_group = vocab_parallel.localize(weight, bias, process_group)
    hidden = vocab_parallel.local_hidden("hidden", hidden)
    hidden_perturbed = vocab_parallel.local_hidden("hidden_perturbed", hidden_perturbed)
    arguments.head(hidden, weight, bias, empty=process_group is not None)
    arguments.head(hidden_perturbed, weight, bias, "hidden_perturbed", empty=process_group is not None)
    arguments.shape("hidden_perturbed", hidden_perturbed, tuple(hidden.shape), "that of hidden")
    views = [hidden.reshape(-1, hidden.shape[-1]), hidden_perturbed.reshape(-1, hidden.shape[-1])]
    same = transform.arguments() | dict(
        targets=targets, kind=kind, precision=precision, backend=backend, workspace_limit=tiling.current_workspace()
    )
    shard = vocab_parallel.shard_of(process_group, views, len(weight), vocab_size, "weight", same)
    leading = hidden.shape[:-1]
    if targets is not None:
        arguments.indices("targets", targets, leading, shard.total, weight.device, check)
        targets = targets.reshape(-1).long().contiguous()
    values, _ = sweep(
        views, weight, bias, targets, None, transform.fields(), list(shard[:4]), shard.group, kind, backend,
        tiling.current_workspace(), exact, wants_gradient(*views, weight, bias),
    )  # fmt: skip
    if arguments.wanted(check, weight):
        with torch.no_grad():
            arguments.finite_head(weight, bias, shard.columns)
            arguments.all_finite("hidden", views[0])
            arguments.all_finite("hidden_perturbed", views[1])
            if len(views[0]):
                rows = verify.sample_rows(len(views[0]), weight.device)
                sampled = [(h[rows], weight, bias, transform, shard) for h in views]
                z_p, z_q = (verify.exact_logits(*each) for each in sampled)
                terms = torch.maximum(*(verify.magnitude(*each) for each in sampled))
                cut = not exact and tensor_cores.multiply(*views, weight)
                verify.check_pair(_output(values, values.shape[1:]), z_p, z_q, targets, rows, kind, terms, cut=cut)
    return _output(values, leading)


def divergence(
    logits: Tensor,
    logits_perturbed: Tensor,
    *,
    targets: Tensor | None = None,
    kind: str = "kl",
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
        targets, kind, temperature, logit_scale, softcap, process_group, backend, check: As in `linear_divergence`.
        vocab_size: Only the first `vocab_size` columns are vocabulary.

    Returns:
        `DivergenceOutput`, each `[...]` float32, in nats; differentiable, once, in both logits through every output.

    Raises:
        TypeError, ValueError, RuntimeError: As `linear_divergence`.
    """
    arguments.one_of("kind", kind, KINDS)
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
        targets=targets, kind=kind, backend=backend, workspace_limit=tiling.current_workspace()
    )
    shard = vocab_parallel.shard_of(process_group, views, logits.shape[-1], vocab_size, "logits", same)
    if targets is not None:
        arguments.indices("targets", targets, leading, shard.total, logits.device, check)
        targets = targets.reshape(-1).long().contiguous()
    check_values = arguments.wanted(check, logits)
    if check_values:
        arguments.logits("logits", views[0][:, : shard.columns])
        arguments.logits("logits_perturbed", views[1][:, : shard.columns])
    values, _ = sweep(
        views, None, None, targets, None, transform.fields(), list(shard[:4]), shard.group, kind, backend,
        tiling.current_workspace(), False, wants_gradient(*views),
    )  # fmt: skip
    if check_values and len(views[0]):
        with torch.no_grad():
            rows = verify.sample_rows(len(views[0]), logits.device)
            z_p, z_q = (verify.exact_transform(z[rows, : shard.columns], transform, shard) for z in views)
            given = transform == LogitTransform()
            verify.check_pair(_output(values, values.shape[1:]), z_p, z_q, targets, rows, kind, given=given)
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
