"""`check=True`: quiet where results are right, RuntimeError where a backend is off by one per cent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from views import make_views

from vppo_kernels import divergence, linear_divergence, linear_logprob, linear_vppo_loss
from vppo_kernels.backends import resolve
from vppo_kernels.verify import sample_rows


def spoiled(function: Callable[..., Any], spoil: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: spoil(function(*args, **kwargs))


FAULTS: dict[str, tuple[str, Callable[[Any], Any], str, str]] = {
    # backend function, its fault, kind, the output that gives it away
    "excess": ("fold_pair", lambda s: s._replace(excess=s.excess * 1.01), "kl", "divergence"),
    "sum of p": ("fold_pair", lambda s: s._replace(p=s.p._replace(sum=s.p.sum * 1.01)), "kl", "divergence"),
    "moment of q": (
        "fold_pair",
        lambda s: s._replace(q=s.q._replace(moment=s.q.moment * 1.01)),
        "kl",
        "entropy_perturbed",
    ),
    "target of p": ("fold_pair", lambda s: s._replace(p=s.p._replace(target=s.p.target * 1.01)), "kl", "logprobs"),
    "halves": ("fold_jsd", lambda halves: tuple(1.01 * half for half in halves), "jsd", "divergence"),
    "reverse": ("fold_pair", lambda s: s._replace(excess=s.excess * 0.99), "reverse_kl", "divergence"),
}


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
    module = resolve(backend)
    options: dict[str, Any] = dict(targets=views.targets, kind=kind, backend=backend, check=True)
    with mock.patch.object(module, name, spoiled(getattr(module, name), spoil)):
        with pytest.raises(RuntimeError, match=rf"check: {output} of row \d+ is .*reference gives .*bound"):
            linear_divergence(views.hidden, views.perturbed, views.weight, **options)
        with pytest.raises(RuntimeError, match=rf"check: {output} of row"):
            divergence(*views.logits(), **options)


@pytest.mark.parametrize("field", ["sum", "moment", "target"])
def test_a_view_that_is_off_by_one_per_cent_is_caught(backend: str, field: str) -> None:
    views = make_views(rows=40, vocab=500)
    module = resolve(backend)
    fault = spoiled(module.fold, lambda s: s._replace(**{field: getattr(s, field) * 1.01}))
    with mock.patch.object(module, "fold", fault):
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
    module = resolve(backend)

    def spoil(stats: Any) -> Any:
        stats.excess[-1] *= 2
        return stats

    with (
        mock.patch.object(module, "fold_pair", spoiled(module.fold_pair, spoil)),
        pytest.raises(RuntimeError, match="divergence of row 32"),
    ):
        linear_divergence(views.hidden, views.perturbed, views.weight, backend=backend, check=True)


@pytest.mark.parametrize("total", [1, 2, 15, 16, 17, 1000])
def test_sampled_rows_are_spread_from_first_to_last(total: int) -> None:
    rows = sample_rows(total, torch.device("cpu")).tolist()
    assert rows[0] == 0 and rows[-1] == total - 1 and len(rows) == min(total, 16) == len(set(rows))
