"""Every public operation under `torch.compile(fullgraph=True)`: no break, and the results of eager mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from vppo_kernels import (
    TrajectoryStats,
    divergence,
    linear_divergence,
    linear_logprob,
    linear_vppo_loss,
    sampled_divergence,
    topk_mask,
    topk_mask_,
    trajectory_scale,
    trajectory_stats,
    vppo_advantages,
    vppo_loss,
)
from vppo_kernels.loss import AGGREGATIONS

V, D = 30, 8


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing compiled before counts against a limit of recompilations."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs(rows: int = 4, length: int = 6, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    mask = torch.rand(rows, length, generator=g) < 0.8
    mask[-1], mask[0] = False, True
    logprobs = -normal(rows, length).abs() - 0.1
    hidden = normal(rows, length, D)
    return dict(
        hidden=hidden,
        perturbed=hidden + 0.3 * normal(rows, length, D),
        weight=normal(V, D),
        bias=normal(V),
        targets=torch.randint(V, (rows, length), generator=g),
        logprobs=logprobs,
        old=logprobs + 0.3 * normal(rows, length),
        advantages=normal(rows),
        dependency=normal(rows, length).square(),
        mask=mask,
        has_image=torch.arange(rows) != 1,
    )


def packed(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same trajectories end to end, of which each next one is a token shorter."""
    rows, length = given["mask"].shape
    lengths = (length - torch.arange(rows)).clamp_min(0)
    inside = torch.arange(length) < lengths[:, None]
    flat = {name: x[inside] for name, x in given.items() if x.shape[:2] == inside.shape}
    return {**given, **flat, "offsets": torch.nn.functional.pad(lengths.cumsum(0), (1, 0))}


LEAVES = ("hidden", "perturbed", "weight", "bias", "logprobs")
Operation = Callable[..., Any]


def _linear_loss(x: dict[str, Tensor], backend: str, **options: Any) -> Any:
    return linear_vppo_loss(
        x["hidden"], x["weight"], x["targets"], x["old"], x["advantages"], x["mask"], x["dependency"], x["bias"],
        cu_seqlens=x.get("offsets"), backend=backend, **options,
    )  # fmt: skip


def _loss(x: dict[str, Tensor], backend: str, **options: Any) -> Any:
    return vppo_loss(
        x["logprobs"], x["old"], x["advantages"], x["mask"], x["dependency"], cu_seqlens=x.get("offsets"),
        backend=backend, **options,
    )  # fmt: skip


def _selection(x: dict[str, Tensor], backend: str) -> list[Tensor]:
    options: dict[str, Any] = dict(cu_seqlens=x.get("offsets"), backend=backend)
    written = topk_mask_(x["dependency"].clone(), x["mask"], 0.4, **options)
    gated = topk_mask(x["dependency"], x["mask"], 0.4, keep_threshold=0.7, **options)
    return [topk_mask(x["dependency"], x["mask"], 0.4, **options), written, gated]


def _shaping(x: dict[str, Tensor], backend: str) -> list[Any]:
    scored = (x["dependency"], x["mask"])
    options: dict[str, Any] = dict(cu_seqlens=x.get("offsets"), backend=backend)
    return [
        trajectory_stats(*scored, **options),
        trajectory_scale(*scored, **options),
        trajectory_scale(*scored, stats=TrajectoryStats(0.1, 2.0, 0.8), scale_max=1.2, **options),
        vppo_advantages(x["advantages"], *scored, has_image=x["has_image"], check=True, **options),
    ]


EVERY_TERM: dict[str, Any] = dict(nll_coef=0.1, entropy_coef=0.2, clip_dual=2.0)
OPERATIONS: dict[str, Operation] = {
    "linear_divergence": lambda x, backend: linear_divergence(
        x["hidden"], x["perturbed"], x["weight"], x["bias"], targets=x["targets"], softcap=9.0, backend=backend
    ),
    "linear_logprob": lambda x, backend: linear_logprob(
        x["hidden"], x["weight"], x["targets"], x["bias"], vocab_size=V, backend=backend, check=True
    ),
    "divergence": lambda x, backend: divergence(
        x["hidden"], x["perturbed"], kind="jsd", temperature=0.7, backend=backend, check=True
    ),
    "sampled_divergence": lambda x, backend: sampled_divergence(x["logprobs"], x["old"]),
    "selection": _selection,
    "shaping": _shaping,
    "vppo_loss": lambda x, backend: [_loss(x, backend, loss_agg=agg) for agg in AGGREGATIONS],
    "linear_vppo_loss": _linear_loss,
    "linear_vppo_loss of every token": lambda x, backend: [
        _linear_loss(x, backend, **EVERY_TERM, check=True),
        _linear_loss(x, backend, loss_agg="none"),
    ],
}


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    parts = result.values() if isinstance(result, dict) else result
    return [tensor for part in parts if part is not None for tensor in flat(part)]


def results(operation: Operation, given: dict[str, Tensor], backend: str) -> list[Tensor]:
    """All outputs, and the gradients of all inputs that have one."""
    leaves = {name: given[name].clone().requires_grad_() for name in LEAVES}
    found = flat(operation({**given, **leaves}, backend))
    loss = sum((x.sum() for x in found if x.requires_grad), torch.zeros(()))
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True) if loss.requires_grad else ()
    return [x.detach() for x in (*found, *(g for g in gradients if g is not None))]


def assert_equal(compiled: list[Tensor], eager: list[Tensor]) -> None:
    for got, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


LINEAR = ("linear_divergence", "linear_logprob", "divergence", "linear_vppo_loss")  # what a backend's kernels compute
BOTH = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])


def compare(name: str, backend: str, dynamic: bool, batches: list[dict[str, Tensor]]) -> None:
    operation = OPERATIONS[name]
    compiled = torch.compile(operation, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for given in batches if dynamic else batches[:1]:
        assert_equal(results(compiled, given, backend), results(operation, given, backend))


@BOTH
@pytest.mark.parametrize("name", LINEAR)
def test_every_backend_equal_to_eager(backend: str, name: str, dynamic: bool) -> None:
    compare(name, backend, dynamic, [inputs(), inputs(5, 7, seed=1)])


@BOTH
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in LINEAR])
def test_equal_to_eager(name: str, dynamic: bool) -> None:
    compare(name, "auto", dynamic, [inputs(), inputs(5, 7, seed=1)])


@BOTH
@pytest.mark.parametrize("name", ["selection", "shaping", "vppo_loss", "linear_vppo_loss"])
def test_packed_rows_equal_to_eager(name: str, dynamic: bool) -> None:
    compare(name, "auto", dynamic, [packed(inputs()), packed(inputs(5, 7, seed=1))])


def test_token_functions_are_plain_torch_whatever_is_named(backend_tokens: str) -> None:
    for name in ("selection", "shaping", "vppo_loss"):
        compare(name, backend_tokens, False, [inputs()])


@BOTH
def test_inductor_on_a_whole_step(dynamic: bool) -> None:
    """Dependency, loss from hidden states and loss from log-probabilities in one graph."""

    def step(x: dict[str, Tensor], backend: str) -> Any:
        with torch.no_grad():
            dependency = linear_divergence(x["hidden"], x["perturbed"], x["weight"], backend=backend).divergence
        given = {**x, "dependency": dependency}
        return [_linear_loss(given, backend, entropy_coef=0.1), _loss(given, backend)]

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    assert_equal(results(compiled, inputs(), "auto"), results(step, inputs(), "auto"))


def test_what_stands_at_dropped_tokens_is_not_read(backend: str) -> None:
    given = inputs()
    keep = topk_mask(given["dependency"], given["mask"], 0.4)
    expected = results(_linear_loss, given, backend)
    given["hidden"] = torch.where(keep.unsqueeze(2), given["hidden"], torch.nan)
    given["targets"] = torch.where(given["mask"], given["targets"], -100)
    compiled = torch.compile(_linear_loss, fullgraph=True, backend="aot_eager")
    assert_equal(results(compiled, given, backend), expected)


def test_values_are_not_looked_at_while_tracing() -> None:
    """A NaN that eager mode refuses makes the loss NaN."""
    given = inputs()
    given["logprobs"][0, 0] = torch.nan
    with pytest.raises(ValueError, match="logprobs: got NaN"):
        _loss(given, "auto")
    loss, _ = torch.compile(_loss, fullgraph=True, backend="aot_eager")(given, "auto")
    assert loss.isnan()


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(Exception, match="backend: got 'cuda'"):
        torch.compile(_loss, fullgraph=True, backend="aot_eager")(inputs(), "cuda")
