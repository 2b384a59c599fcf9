"""Given responses, scored: the numbers of two ordinary forwards, the pictures, the tokens as text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support import families, responses
from support.runs import FAMILY, plain_views, rows
from torch import Tensor

from vppo.demo.scored import score_responses, token_values
from vppo.perturbations import Perturbation
from vppo_kernels import reference, sampled_divergence

NAMES = [f.name for f in families.FAMILIES]
TEXTS = ("3+5=8", "=", "one of two")


def given(native: tuple[int, int], count: int = 3) -> list[dict[str, Any]]:
    """Responses of several lengths to prompts with one image each."""
    data = rows(count, sizes=(native,))
    texts = [TEXTS[i % len(TEXTS)] for i in range(count)]
    ids = [[*(families.VOCABULARY[c] for c in text), families.VOCABULARY["<eos>"]] for text in texts]
    return [{**row, "response_ids": ids[i], "correct": i == 1} for i, row in enumerate(data)]


def by_hand(
    model: Any, processor: Any, row: dict[str, Any], key: tuple[int, int], kind: str, temperature: float
) -> Tensor:
    """Dependency of one row alone, unpadded, in float64."""
    p, q = (z / temperature for z in plain_views(model, processor, row, key))
    response = torch.tensor(row["response_ids"])
    if kind == "k3":
        return sampled_divergence(reference.logprob(p, response), reference.logprob(q, response), kind="k3")
    return reference.divergence(p, q, kind=kind).divergence


@pytest.mark.parametrize("name", NAMES)
def test_dependency_of_every_family(name: str) -> None:
    """Rows of one batch are padded to each other; alone they are not."""
    model, processor = families.build(name)
    data = given((56, 28))
    found = score_responses(model, processor, data, seed=3, temperature=0.8)
    assert [response.text for response in found] == [text + "<eos>" for text in TEXTS]
    for i, (response, row) in enumerate(zip(found, data, strict=True)):
        expected = by_hand(families.build(name)[0], processor, row, (3, i), "kl", 0.8)
        assert response.dependency.dtype == np.float32 and response.dependency.max() > 1e-4
        np.testing.assert_allclose(response.dependency, expected.numpy(), rtol=1e-3, atol=1e-6)
        keep = reference.topk_mask(expected[None], torch.ones(1, len(expected)), 0.4)[0]
        assert response.kept.tolist() == keep.tolist()
        assert (response.answer, response.correct, response.question) == (str(i), i == 1, f"How much {i}?")


@pytest.mark.parametrize("kind", ["kl", "reverse_kl", "jsd", "k3"])
def test_divergences(kind: str) -> None:
    model, processor = families.build(FAMILY)
    (found,) = score_responses(model, processor, given((56, 28), 1), divergence=kind)
    expected = by_hand(families.build(FAMILY)[0], processor, given((56, 28), 1)[0], (0, 0), kind, 1.0)
    np.testing.assert_allclose(found.dependency, expected.numpy(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", families.FAMILIES, ids=lambda family: family.name)
def test_pictures(family: families.Family) -> None:
    """The image as it was given, where the processor neither resizes nor splits it; a grey one in its place."""
    model, processor = families.build(family.name)
    if family.name == "idefics3":
        processor.image_processor.do_image_splitting = False
        processor.image_processor.size = {"longest_edge": 28}
    data = given(family.native, 1)
    (found,) = score_responses(model, processor, data, perturbation=Perturbation("grey"))
    assert np.array_equal(np.asarray(found.image), np.asarray(data[0]["images"][0]))
    assert (np.asarray(found.perturbed_image) == 128).all()
    assert found.perturbed_image.size == found.image.size


def test_keep_ratio_and_seed() -> None:
    model, processor = families.build(FAMILY)
    data = given((56, 28))
    everything = score_responses(model, processor, data, keep_ratio=1.0)
    assert all(response.kept.all() for response in everything)
    again = score_responses(model, processor, data)
    for first, second in zip(everything, again, strict=True):
        assert np.array_equal(first.dependency, second.dependency)
    other = score_responses(model, processor, data, seed=1)
    assert not np.array_equal(everything[0].dependency, other[0].dependency)


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    model, processor = families.build(FAMILY)
    model.train(training)
    score_responses(model, processor, given((56, 28)))
    assert all(module.training == training for module in model.modules())
    assert "forward" not in model.get_output_embeddings().__dict__


@pytest.mark.parametrize("name", ["images", "response_ids"])
def test_rows_that_lack_something_are_refused(name: str) -> None:
    model, processor = families.build(FAMILY)
    data = given((56, 28))
    for empty in ([], None):
        data[1][name] = empty
        with pytest.raises(ValueError, match=rf"rows: row 1 has an empty '{name}', takes at least one entry"):
            score_responses(model, processor, data)


def test_no_rows() -> None:
    model, processor = families.build(FAMILY)
    assert score_responses(model, processor, []) == []


def test_token_values_are_those_of_all_responses_in_order() -> None:
    assert token_values([responses.response(["a"], [0.5]), responses.response(["b", "c"], [0.25, 2.0])]).tolist() == [
        0.5,
        0.25,
        2.0,
    ]
    assert token_values([]).size == 0
    assert token_values(responses.responses(3)).size == 30
