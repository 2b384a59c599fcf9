"""The sweep as an operator of torch: its schema, its shapes while tracing, and `torch.compile` without a break."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.views import make_views
from torch import Tensor

from vppo_kernels import divergence, linear_divergence, linear_logprob
from vppo_kernels.sweep import sweep, sweep_backward
from vppo_kernels.tiling import MIB

KINDS = ("logprob", "kl", "reverse_kl", "jsd", "topk")


def arguments(kind: str, backend: str, source: str, with_targets: bool = True) -> tuple[Any, ...]:
    """Of the forward operator, leaves that want gradients."""
    views = make_views(rows=6, vocab=40, hidden_size=8).grad()
    linear, two_heads = source != "logits", source == "two heads" and kind != "logprob"
    inputs = [views.hidden, views.perturbed] if linear else [z.detach().requires_grad_() for z in views.logits()]
    head = (views.weight, views.bias) if linear else (None, None)
    other = (views.weight.detach().flip(0).clone().requires_grad_(), None) if two_heads else (None, None)
    targets = views.targets if with_targets else None
    shard = [0, 37, 37, 37]
    targets = None if targets is None else targets % 37
    return (
        inputs[: 1 if kind == "logprob" else 2],
        *head,
        *other,
        targets,
        None,
        [0.8, 1.1, 9.0],
        [1.2, 0.9] if two_heads else None,
        shard,
        [False] * (2 if two_heads else 1),
        "",
        kind,
        0.3,
        3,
        backend,
        MIB,
        False,
        True,
    )


@pytest.mark.parametrize("source", ["linear", "logits", "two heads"])
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(backend: str, kind: str, source: str) -> None:
    given = arguments(kind, backend, source, with_targets=kind != "kl")
    torch.library.opcheck(sweep, given)
    values, saved = sweep(*given)
    wants = [True] * (len(given[0]) + sum(x is not None for x in given[1:5]))
    wants[0] = False
    inputs = [[x.detach() for x in given[0]], *(None if x is None else x.detach() for x in given[1:5])]
    checks = ("test_schema", "test_faketensor")  # it has no gradient of its own
    torch.library.opcheck(
        sweep_backward,
        (torch.ones_like(values), saved.detach(), *inputs, *given[5:-1], wants),
        test_utils=checks,
    )


def test_compile_passes_over_it_without_a_break(backend: str) -> None:
    views = make_views(rows=10, vocab=60, hidden_size=8)
    scale = torch.linspace(0, 1, 10)

    def loss(hidden: Tensor, perturbed: Tensor, weight: Tensor) -> Tensor:
        pair = linear_divergence(hidden, perturbed, weight, targets=views.targets, backend=backend)
        single = linear_logprob(hidden, weight, views.targets, temperature=0.9, backend=backend)
        given = divergence(2 * hidden, 2 * perturbed, kind="jsd", backend=backend)
        return (scale * (pair.divergence + single.logprobs + given.divergence)).sum() + pair.entropy.mean()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = views.grad()
        value = function(leaves.hidden, leaves.perturbed, leaves.weight)
        results.append((value, *torch.autograd.grad(value, (leaves.hidden, leaves.perturbed, leaves.weight))))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-7)
