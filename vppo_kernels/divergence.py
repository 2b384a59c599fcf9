"""Divergence between the next-token distributions of two views: from hidden states, from logits, from samples."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vppo_kernels import checks, reference, tiling, verify
from vppo_kernels.backends import resolve
from vppo_kernels.head import GivenLogits, LinearHead, LogitTransform, Source
from vppo_kernels.statistics import DivergenceOutput

KINDS = ("kl", "reverse_kl", "jsd")
SAMPLED_KINDS = ("k1", "abs_k1", "k2", "k3", "prob_drop")
LOG_RATIO_LIMIT = 20.0


def _pair_forward(
    ctx: Any, source: Source, backend: ModuleType, targets: Tensor | None, kind: str, workspace: int
) -> tuple[Tensor | None, ...]:
    """Run the sweep and note on `ctx` what the backward needs. Reverse KL is KL of the source's swapped views."""
    pair, halves = tiling.forward_pair(source, backend, targets, workspace, jsd=kind == "jsd")
    ctx.pair, ctx.halves, ctx.backend, ctx.kind, ctx.workspace = pair, halves, backend, kind, workspace
    ctx.set_materialize_grads(False)
    value = pair.kl if halves is None else (0.5 * (halves[0] + halves[1])).clamp_min(0.0)
    first, second = (pair.q, pair.p) if kind == "reverse_kl" else (pair.p, pair.q)
    return value, first.entropy, second.entropy, first.logprobs, second.logprobs


def _pair_backward(ctx: Any, source: Source, targets: Tensor | None, grads: tuple[Tensor | None, ...]) -> None:
    def of(grad: Tensor | None) -> Tensor:
        return torch.zeros_like(ctx.pair.kl) if grad is None else grad.to(ctx.pair.kl.dtype)

    entropies = (of(grads[1]), of(grads[2]))
    logprobs: tuple[Tensor | None, Tensor | None] = (None, None) if targets is None else (of(grads[3]), of(grads[4]))
    if ctx.kind == "reverse_kl":
        entropies, logprobs = entropies[::-1], logprobs[::-1]
    tiling.backward_pair(
        source, ctx.backend, ctx.pair, ctx.halves, targets, of(grads[0]), entropies, logprobs, ctx.workspace
    )


def _views(kind: str, first: Any, second: Any) -> tuple[Any, Any]:
    return (second, first) if kind == "reverse_kl" else (first, second)


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        hidden_perturbed: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor | None,
        transform: LogitTransform,
        vocab_size: int,
        kind: str,
        backend: ModuleType,
        workspace: int,
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(hidden, hidden_perturbed, weight, bias, targets)
        ctx.transform, ctx.vocab_size = transform, vocab_size
        source = LinearHead(_views(kind, hidden, hidden_perturbed), weight, bias, transform, vocab_size)
        with torch.autocast(weight.device.type, enabled=False):
            return _pair_forward(ctx, source, backend, targets, kind, workspace)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, hidden_perturbed, weight, bias, targets = ctx.saved_tensors
        needs = ctx.needs_input_grad
        source = LinearHead(
            _views(ctx.kind, hidden, hidden_perturbed),
            weight,
            bias,
            ctx.transform,
            ctx.vocab_size,
            wants=(_views(ctx.kind, needs[0], needs[1]), needs[2], needs[3]),
        )
        with torch.autocast(weight.device.type, enabled=False):
            _pair_backward(ctx, source, targets, grads)
        grad_hidden = _views(ctx.kind, *source.grad_hidden)
        return (
            None if grad_hidden[0] is None else grad_hidden[0].to(hidden.dtype),
            None if grad_hidden[1] is None else grad_hidden[1].to(hidden_perturbed.dtype),
            source.grad_weight,
            None if source.grad_bias is None else source.grad_bias.to(bias.dtype),
            *(None,) * 6,
        )


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        logits_perturbed: Tensor,
        targets: Tensor | None,
        transform: LogitTransform,
        vocab_size: int,
        kind: str,
        backend: ModuleType,
        workspace: int,
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(logits, logits_perturbed, targets)
        ctx.transform, ctx.vocab_size = transform, vocab_size
        source = GivenLogits(_views(kind, logits, logits_perturbed), transform, vocab_size)
        return _pair_forward(ctx, source, backend, targets, kind, workspace)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, logits_perturbed, targets = ctx.saved_tensors
        wants = _views(ctx.kind, ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        source = GivenLogits(_views(ctx.kind, logits, logits_perturbed), ctx.transform, ctx.vocab_size, wants)
        _pair_backward(ctx, source, targets, grads)
        return *_views(ctx.kind, *source.grad_raw), *(None,) * 6


def _output(values: tuple[Tensor | None, ...], leading: torch.Size) -> DivergenceOutput:
    return DivergenceOutput(*(None if v is None else v.view(leading) for v in values))  # type: ignore[arg-type]


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
    backend: str = "auto",
    check: bool = False,
) -> DivergenceOutput:
    """Exact divergence between the next-token distributions of a clean and a perturbed view (VPPO, Eq. 3).

    The logits `softcap * tanh(logit_scale * (h W^T + b) / softcap) / temperature` of both views exist only as tiles:
    working memory stays within `workspace_limit`, whatever the number of rows and of vocabulary entries is.

    Args:
        hidden: `[..., D]` final hidden states given the clean image; float32, bfloat16 or float16.
        hidden_perturbed: The same given the perturbed image, of the same shape.
        weight: `[V, D]` weight of the language-model head.
        bias: `[V]` or None.
        targets: `[...]` int64 or int32 sampled tokens, whose log-probabilities are wanted too; None if they are not.
        kind: "kl" is `KL(clean || perturbed)`, "reverse_kl" the other direction, "jsd" the Jensen-Shannon divergence.
        temperature: Divides the logits; above 0.
        logit_scale: Multiplies the projection, before the cap.
        softcap: Logits are bounded by it through tanh, as Gemma does; None for no cap.
        vocab_size: Only the first `vocab_size` rows of `weight` are vocabulary, the others padding.
        process_group: Not supported yet.
        backend: "auto" or "torch".
        check: Look for NaN and inf in the inputs, and compare up to 16 rows with the float64 definition.

    Returns:
        `DivergenceOutput(divergence, entropy, entropy_perturbed, logprobs, logprobs_perturbed)`, each `[...]`, float32
        (float64 for float64 inputs), in nats. The divergence is never negative. Differentiable, once, in both hidden
        states, weight and bias, through every output.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, device, target or number is out of range; with `check`, an input is not finite.
        RuntimeError: With `check`, a row disagrees with the definition.
        NotImplementedError: `process_group` is given.
    """
    checks.no_process_group(process_group)
    checks.one_of("kind", kind, KINDS)
    module = resolve(backend)
    transform = LogitTransform(temperature, logit_scale, softcap)
    checks.head(hidden, weight, bias, vocab_size)
    checks.head(hidden_perturbed, weight, bias, vocab_size, name="hidden_perturbed")
    checks.shape("hidden_perturbed", hidden_perturbed, tuple(hidden.shape), "that of hidden")
    vocab_size = len(weight) if vocab_size is None else vocab_size
    leading = hidden.shape[:-1]
    if targets is not None:
        checks.indices("targets", targets, leading, vocab_size, weight.device, check)
        targets = targets.reshape(-1).long()
    flat, flat_perturbed = hidden.reshape(-1, hidden.shape[-1]), hidden_perturbed.reshape(-1, hidden.shape[-1])
    values = _LinearDivergence.apply(
        flat, flat_perturbed, weight, bias, targets, transform, vocab_size, kind, module, tiling.current_workspace()
    )
    if check:
        with torch.no_grad():
            checks.finite_head(weight, bias, vocab_size)
            checks.all_finite("hidden", flat)
            checks.all_finite("hidden_perturbed", flat_perturbed)
            if len(flat):
                rows = verify.sample_rows(len(flat), flat.device)
                z_p, z_q = (
                    verify.exact_logits(h[rows], weight, bias, transform, vocab_size) for h in (flat, flat_perturbed)
                )
                verify.check_pair(DivergenceOutput(*values), z_p, z_q, targets, rows, kind)
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
    """The same as `linear_divergence` for callers that already hold logits.

    Args:
        logits: `[..., V]` given the clean image, any of float32, bfloat16 and float16. Logits that were rounded to 16
            bits have lost small divergences already; nothing here can bring them back.
        logits_perturbed: The same given the perturbed image.
        targets, kind, temperature, logit_scale, softcap, process_group, backend, check: As in `linear_divergence`.
        vocab_size: Only the first `vocab_size` columns are vocabulary.

    Returns:
        `DivergenceOutput`, each `[...]` float32, in nats; differentiable, once, in both logits through every output.

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError: As `linear_divergence`.
    """
    checks.no_process_group(process_group)
    checks.one_of("kind", kind, KINDS)
    module = resolve(backend)
    transform = LogitTransform(temperature, logit_scale, softcap)
    checks.floating("logits", logits)
    checks.floating("logits_perturbed", logits_perturbed)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits: got shape {list(logits.shape)}, takes [..., V] with V of at least 1")
    checks.shape("logits_perturbed", logits_perturbed, tuple(logits.shape), "that of logits")
    checks.same_device("logits_perturbed", logits_perturbed, logits.device, "logits")
    checks.vocabulary(vocab_size, logits.shape[-1], "the columns of logits")
    vocab_size = logits.shape[-1] if vocab_size is None else vocab_size
    leading = logits.shape[:-1]
    z_p, z_q = (z.reshape(-1, z.shape[-1]) for z in (logits, logits_perturbed))
    if targets is not None:
        checks.indices("targets", targets, leading, vocab_size, logits.device, check)
        targets = targets.reshape(-1).long()
    if check:
        checks.all_finite("logits", z_p[:, :vocab_size])
        checks.all_finite("logits_perturbed", z_q[:, :vocab_size])
    values = _Divergence.apply(z_p, z_q, targets, transform, vocab_size, kind, module, tiling.current_workspace())
    if check and len(z_p):
        with torch.no_grad():
            rows = verify.sample_rows(len(z_p), z_p.device)
            exact = [reference.transform(z[rows, :vocab_size].double(), **vars(transform)) for z in (z_p, z_q)]
            verify.check_pair(DivergenceOutput(*values), exact[0], exact[1], targets, rows, kind)
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
    checks.one_of("kind", kind, SAMPLED_KINDS)
    checks.floating("logprobs", logprobs)
    checks.floating("logprobs_perturbed", logprobs_perturbed)
    checks.shape("logprobs_perturbed", logprobs_perturbed, tuple(logprobs.shape), "that of logprobs")
    checks.same_device("logprobs_perturbed", logprobs_perturbed, logprobs.device, "logprobs")
    if clamp is not None:
        checks.positive("clamp", clamp)
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
