"""From hidden states to transformed logits, and the slope on the way back."""

from __future__ import annotations

import pytest
import torch
from support.views import make_views

from vppo_kernels import reference
from vppo_kernels.linear_head import LinearHead
from vppo_kernels.logits import GivenLogits, LogitTransform
from vppo_kernels.vocab_parallel import Shard

TRANSFORMS = {
    "none": {},
    "temperature": dict(temperature=0.6),
    "scale": dict(logit_scale=-0.3),
    "softcap": dict(softcap=5.0),
    "all": dict(temperature=1.7, logit_scale=2.0, softcap=10.0),
}


@pytest.mark.parametrize("options", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transform_and_its_slope(options: dict) -> None:
    raw = torch.linspace(-20, 20, 101, dtype=torch.float64, requires_grad=True)
    plain = reference.transform(raw, **options)
    transform = LogitTransform(**options)
    finished = transform.apply_(raw.detach().clone())
    assert torch.allclose(finished, plain)
    (slope,) = torch.autograd.grad(plain.sum(), raw)
    assert torch.allclose(torch.ones_like(finished) * transform.slope(finished), slope, atol=1e-12)


@pytest.mark.parametrize("active", [None, torch.tensor([8, 0, 3, 9])], ids=["all rows", "some"])
@pytest.mark.parametrize("columns", [slice(0, 100), slice(13, 14), slice(37, 95)], ids=str)
def test_any_tile_of_a_head(active: torch.Tensor | None, columns: slice) -> None:
    views = make_views(rows=10, vocab=100, hidden_size=8, dtype=torch.float64)
    options = dict(temperature=0.9, softcap=20.0)
    hidden = [views.hidden, views.perturbed]
    plain = torch.stack(views.logits(bias=True, **options))
    rows, shard = slice(1, 3), Shard(0, 100, 100, 100)
    tile = (plain if active is None else plain[:, active])[:, rows, columns]
    raw = [h @ views.weight.T + views.bias for h in hidden]
    sources = (
        LinearHead(hidden, views.weight, views.bias, LogitTransform(**options), shard, active),
        GivenLogits(raw, LogitTransform(**options), shard, active),
    )
    for source in sources:
        assert (source.views, source.rows, source.columns) == (2, 10 if active is None else 4, 100)
        assert torch.allclose(source.logits(rows, columns, torch.empty(tile.shape, dtype=torch.float64)), tile)


def test_far_views_do_not_lend_each_other_their_rounding() -> None:
    """A view with huge logits beside a view with small ones: the small ones keep their digits."""
    weight = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    hidden = torch.full((3, 8), 1e5)
    perturbed = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    head = LinearHead([hidden, perturbed], weight, None, LogitTransform(), Shard(0, 50, 50, 50))
    logits = head.logits(slice(0, 3), slice(0, 50), torch.empty(2, 3, 50))
    assert torch.allclose(logits[1].double(), perturbed.double() @ weight.double().T, atol=1e-5)
