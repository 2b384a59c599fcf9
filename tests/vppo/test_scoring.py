"""Scoring apart from the trainer: the head's own forward, rows of a batch, what happens to a logit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from support import families
from support.runs import FAMILY, batch_inputs, rows
from torch import Tensor

from vppo.batch import Batch, View
from vppo.heads import head_forward, logit_options
from vppo.perturbations import Perturbation, PixelLayout, seeded
from vppo.prefix_sharing import ResponsePasses
from vppo.scoring import entropies, measure, score
from vppo_kernels import reference

NAMES = [f.name for f in families.FAMILIES]
PLAIN = {"temperature": 1.0, "logit_scale": 1.0, "softcap": None}


CLEAN = View(range(5))


def some_batch(name: str, images: tuple[int, ...] = (1,)) -> tuple[Any, Batch, View]:
    """A model, five rows of it with images of two sizes, and their perturbed view."""
    model, processor = families.build(name)
    ids = [families.VOCABULARY[character] for character in "3+5=8"]
    data = rows(5, sizes=((56, 28), (28, 56)), images=images)
    batch = Batch(batch_inputs(model, processor, [{**r, "response_ids": ids[: 1 + i]} for i, r in enumerate(data)]))
    layout = PixelLayout.of(processor.image_processor)
    pixels = {i: batch.perturbed_pixels(i, layout, Perturbation(), seeded(i)) for i in range(5)}
    return model, batch, View(range(5), pixels)


def scored(model: Any, batch: Batch, view: View, rows: Any = range(5), **settings: Any) -> Tensor:
    """`score` with what most of these tests do not care about."""
    return score(ResponsePasses(model), batch, rows, CLEAN, view, **{"kind": "kl", "options": PLAIN, **settings})


@pytest.mark.parametrize("name", NAMES)
def test_other_rows_do_not_matter(name: str) -> None:
    model, batch, view = some_batch(name, images=(1, 2))
    whole = scored(model, batch, view)
    assert (whole[batch.mask] > 0).all() and not whole[~batch.mask].any()
    some = scored(model, batch, view, [3, 1])
    torch.testing.assert_close(some[[1, 3]], whole[[1, 3]], rtol=1e-4, atol=1e-8)
    assert not some[[0, 2, 4]].any()


@pytest.mark.parametrize("memory", [1, 1 << 32])
@pytest.mark.parametrize("name", NAMES)
def test_several_views_of_a_row(name: str, memory: int) -> None:
    """Whatever the layout of its images: their mean, and what it may be off by."""
    model, batch, view = some_batch(name, images=(1, 2))
    assert view.pixels is not None
    views = [view, View(range(5), {key: pixels / 2 for key, pixels in view.pixels.items()})]
    both = {5 * draw + key: pixels for draw, one in enumerate(views) for key, pixels in (one.pixels or {}).items()}
    found = measure(
        ResponsePasses(model, memory=memory), batch, range(5), CLEAN, View(range(10), both), kind="kl", options=PLAIN
    )
    each = torch.stack([scored(model, batch, one) for one in views])
    assert (each[0] != each[1])[batch.mask].all() and found.stderr is not None
    torch.testing.assert_close(found.outputs.divergence, each.mean(0), rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(found.stderr, (each[0] - each[1]).abs() / 2, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("draws", [1, 2])
def test_a_process_without_rows_joins_the_others(draws: int) -> None:
    """Nobody has made a perturbed view of its rows."""
    model, batch, _ = some_batch(FAMILY)
    forwards: list[int] = []
    model.model.register_forward_pre_hook(lambda *args: forwards.append(1))
    passes = ResponsePasses(model, sharing="off", max_over_ranks=lambda count: max(count, 1))
    found = measure(passes, batch, [], CLEAN, View(range(5 * draws), {}), kind="kl", options=PLAIN)
    assert len(forwards) == 2 and not any(output.any() for output in found.outputs)
    assert not entropies(passes, batch, [], CLEAN, options=PLAIN).any() and len(forwards) == 3


def test_known_hidden_states_spare_the_clean_pass() -> None:
    model, batch, view = some_batch(FAMILY)
    hidden = ResponsePasses(model).hidden(batch, range(5), CLEAN)
    whole = scored(model, batch, view)
    forwards: list[int] = []
    model.model.register_forward_pre_hook(lambda *args: forwards.append(1))
    reused = scored(model, batch, view, hidden_clean=hidden)
    torch.testing.assert_close(reused, whole, rtol=1e-4, atol=1e-8)
    assert len(forwards) == 1


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_never_formed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by the head, nor any tensor of the vocabulary's width over a whole sequence."""
    model, batch, view = some_batch(name)
    head = model.get_output_embeddings()
    linear, widths = torch.nn.functional.linear, []

    def watched(input: Tensor, weight: Tensor, *args: Any) -> Tensor:
        widths.append(weight.data_ptr() == head.weight.data_ptr())
        return linear(input, weight, *args)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    scored(model, batch, view)
    assert widths and not any(widths)


@pytest.mark.parametrize("own", [False, True])
def test_the_heads_forward_is_put_back(own: bool) -> None:
    model, _ = families.build(FAMILY)
    head = model.get_output_embeddings()
    before = None
    if own:  # as TRL's cast_lm_head_to_fp32 leaves it
        before = head.forward = lambda hidden: hidden

    with pytest.raises(RuntimeError, match="on the way"), head_forward(model, lambda head, hidden: None):
        raise RuntimeError("on the way")
    assert head.__dict__.get("forward") is before


def test_half_precision_is_that_of_the_hidden_states() -> None:
    """Whatever a bfloat16 model loses it has lost before its head: the divergence itself is as good as float64's."""
    model, batch, view = some_batch(FAMILY)
    model.bfloat16()
    found = scored(model, batch, view)
    weight = model.get_output_embeddings().weight.double()
    with torch.no_grad():
        p, q = (ResponsePasses(model).hidden(batch, range(5), v).double() @ weight.T for v in (CLEAN, view))
    truth = reference.kl(p, q)[batch.mask]
    assert found.dtype == torch.float32
    assert ((found[batch.mask] - truth).abs() <= reference.divergence_bound(truth)).all()


def test_an_offloaded_head_is_brought_back_for_its_forward() -> None:
    model, batch, view = some_batch(FAMILY)
    whole = scored(model, batch, view)
    head = model.get_output_embeddings()
    cpu_offload(head, torch.device("cpu"))
    hooked = head.forward
    offloaded = scored(model, batch, view)
    assert torch.equal(offloaded, whole)
    assert head.weight.device.type == "meta" and head.forward is hooked


def test_nothing_requires_grad() -> None:
    model, batch, view = some_batch(FAMILY)
    assert not scored(model, batch, view).requires_grad


def test_rows_whose_response_is_masked_out_whole() -> None:
    model, batch, view = some_batch(FAMILY)
    batch.mask[:] = False
    assert not scored(model, batch, view).any()
    assert not scored(model, batch, view, kind="k3").any()


def test_external_tokens_of_a_response_do_not_count() -> None:
    """Tool results are part of the response's text, not of what the policy chose."""
    model, processor = families.build(FAMILY)
    inputs = batch_inputs(model, processor, [{**rows(1)[0], "response_ids": [20, 21, 22, 23]}])
    tools = torch.tensor([[1, 0, 0, 1]])
    assert torch.equal(Batch({**inputs, "tool_mask": tools}).mask, tools.bool())


@pytest.mark.parametrize(
    ("config", "scale", "softcap"),
    [
        ({}, 1.0, None),
        ({"logit_scale": 0.25}, 0.25, None),
        ({"logit_scale": None}, 1.0, None),
        ({"output_multiplier": 2.0}, 2.0, None),
        ({"lm_head_multiplier": 3.0}, 3.0, None),
        ({"logits_scaling": 8.0}, 0.125, None),
        ({"logits_scaling": 8.0, "model_type": "hyperclovax"}, 8.0, None),
        ({"final_logit_softcapping": 30.0}, 1.0, 30.0),
    ],
)
def test_logit_options_are_read_as_trl_reads_them(config: dict[str, Any], scale: float, softcap: float | None) -> None:
    text = SimpleNamespace(**{"model_type": "any", **config})
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))
    assert logit_options(model, 0.7) == {"temperature": 0.7, "logit_scale": scale, "softcap": softcap}


@pytest.mark.parametrize("kind", ["kl", "k3"])
def test_logit_options_reach_the_divergence(kind: str) -> None:
    model, batch, view = some_batch(FAMILY)
    options = {"temperature": 0.7, "logit_scale": 2.0, "softcap": 3.0}
    found = scored(model, batch, view, kind=kind, options=options)
    weight = model.get_output_embeddings().weight.double()
    with torch.no_grad():
        hidden = (ResponsePasses(model).hidden(batch, range(5), v).double() for v in (CLEAN, view))
        p, q = (reference.logits(h, weight, **options) for h in hidden)
    if kind == "kl":
        expected = reference.kl(p, q)
    else:
        d = (reference.logprob(q, batch.completion_ids) - reference.logprob(p, batch.completion_ids)).clamp(-20, 20)
        expected = (d.exp() - d - 1).clamp(0, 10)
    torch.testing.assert_close(found[batch.mask].double(), expected[batch.mask], rtol=1e-4, atol=1e-7)
