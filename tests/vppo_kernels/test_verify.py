"""`check=True`: quiet where results are right, RuntimeError where a backend is off by one per cent."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from support.views import make_views
from torch import Tensor

from vppo_kernels import divergence, linear_divergence, linear_logprob, linear_vppo_loss
from vppo_kernels.backends import resolve
from vppo_kernels.verify import sample_rows


def spoiled(function: Callable[..., Any], spoil: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: spoil(function(*args, **kwargs))


def scaled(row: int, factor: float) -> Callable[[Tensor], Tensor]:
    """A fault in one row of packed statistics: p's max, sum, weighted_sum, target, the same of q, mean_diff, excess."""

    def spoil(stats: Tensor) -> Tensor:
        stats = stats.clone()
        stats[row] *= factor
        return stats

    return spoil


FAULTS: dict[str, tuple[str, Callable[[Any], Any], str, str]] = {
    # backend function, its fault, kind, the output that gives it away
    "excess": ("fold_pair", scaled(9, 1.01), "kl", "divergence"),
    "sum of p": ("fold_pair", scaled(1, 1.01), "kl", "divergence"),
    "weighted_sum of q": ("fold_pair", scaled(6, 1.01), "kl", "entropy_perturbed"),
    "target of p": ("fold_pair", scaled(3, 1.01), "kl", "logprobs"),
    "jsd_terms": ("fold_jsd", lambda jsd_terms: 1.01 * jsd_terms, "jsd", "divergence"),
    "reverse": ("fold_pair", scaled(9, 0.99), "reverse_kl", "divergence"),
}


def faulty(backend: str, name: str, spoil: Callable[[Any], Any]) -> Any:
    """The backend with a fault in one of its operations, and in the fused sweep that stands in for it."""
    chosen = resolve(backend, torch.device("cpu"), torch.float32)
    patches = contextlib.ExitStack()
    for operations, each in ((chosen.tiles, name), (chosen.fused, name.replace("fold", "sweep"))):
        if operations is not None and each != "sweep_jsd":
            patches.enter_context(mock.patch.object(operations, each, spoiled(getattr(operations, each), spoil)))
    return patches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["kl", "reverse_kl", "jsd"])
def test_good_results_pass(backend: str, kind: str, dtype: torch.dtype) -> None:
    views = make_views(rows=40, vocab=1500, dtype=dtype)
    options: dict[str, Any] = dict(targets=views.targets, kind=kind, backend=backend, check=True)
    linear_divergence(views.hidden, views.perturbed, views.weight, views.bias, **options)
    linear_divergence(
        views.hidden, views.perturbed, views.weight, temperature=0.7, softcap=30.0, vocab_size=1500, **options
    )
    divergence(*views.logits(), temperature=1.2, vocab_size=1500, **options)
    linear_logprob(views.hidden, views.weight, views.targets, views.bias, logit_scale=0.5, backend=backend, check=True)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_pair_that_is_off_by_one_per_cent_is_caught(backend: str, fault: str) -> None:
    name, spoil, kind, output = FAULTS[fault]
    views = make_views(rows=40, vocab=500, divergences=(1e-3, 1.0))
    options: dict[str, Any] = dict(targets=views.targets, kind=kind, backend=backend, check=True)
    with faulty(backend, name, spoil):
        with pytest.raises(RuntimeError, match=rf"check: {output} of row \d+ is .*reference gives .*bound"):
            linear_divergence(views.hidden, views.perturbed, views.weight, **options)
        with pytest.raises(RuntimeError, match=rf"check: {output} of row"):
            divergence(*views.logits(), **options)


@pytest.mark.parametrize("row", [1, 2, 3], ids=["sum", "weighted_sum", "target"])
def test_a_view_that_is_off_by_one_per_cent_is_caught(backend: str, row: int) -> None:
    views = make_views(rows=40, vocab=500)
    with faulty(backend, "fold", scaled(row, 1.01)):
        with pytest.raises(RuntimeError, match=r"check: (logprobs|entropy) of row"):
            linear_logprob(views.hidden, views.weight, views.targets, backend=backend, check=True)
        with pytest.raises(RuntimeError, match=r"check: (logprobs|entropy) of row"):
            linear_vppo_loss(
                views.hidden.unsqueeze(0),
                views.weight,
                views.targets.unsqueeze(0),
                torch.zeros(1, 40),
                torch.ones(1),
                torch.ones(1, 40),
                backend=backend,
                check=True,
            )


def test_one_bad_row_is_caught_and_named(backend: str) -> None:
    """The last row is always among the sample."""
    views = make_views(rows=33, vocab=100)

    def spoil(stats: Tensor) -> Tensor:
        stats = stats.clone()
        stats[9, -1] *= 2
        return stats

    with (
        faulty(backend, "fold_pair", spoil),
        pytest.raises(RuntimeError, match="divergence of row 32"),
    ):
        linear_divergence(views.hidden, views.perturbed, views.weight, backend=backend, check=True)


@pytest.mark.parametrize("total", [1, 2, 15, 16, 17, 1000])
def test_sampled_rows_are_spread_from_first_to_last(total: int) -> None:
    rows = sample_rows(total, torch.device("cpu")).tolist()
    assert rows[0] == 0 and rows[-1] == total - 1 and len(rows) == min(total, 16) == len(set(rows))
