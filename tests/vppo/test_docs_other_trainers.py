"""The recipes of docs/other-trainers.md: the loop runs; those for trainers that are not installed here are Python."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from vppo.demo.batches import encode
from vppo.demo.digits import strips
from vppo.demo.model import build_model, build_processor
from vppo.dependency import measure_dependency
from vppo_kernels import vppo_loss

PAGE = Path(__file__).parents[2] / "docs" / "other-trainers.md"
RECIPES = {
    heading: code
    for heading, code in re.findall(
        r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python\n(.*?)^```", PAGE.read_text(), re.S | re.M
    )
}


@pytest.fixture(scope="module")
def made() -> tuple[Any, Any, dict[str, torch.Tensor], torch.Tensor]:
    """The demo's model in float64, its image processor, a batch with responses, and their mask."""
    processor = build_processor()
    model = build_model(processor, seed=3).double()
    items = list(strips("train", 4, seed=3))
    prompt = encode(processor, items, with_response=False, device=torch.device("cpu"))["input_ids"].shape[1]
    inputs = encode(processor, items, with_response=True, device=torch.device("cpu"))
    inputs = {**inputs, "pixel_values": inputs["pixel_values"].double()}
    return model, processor.image_processor, inputs, inputs["attention_mask"][:, prompt:].bool()


def test_there_is_a_recipe_for_each() -> None:
    assert list(RECIPES) == ["A loop of your own", "ms-swift", "OpenRLHF", "EasyR1"]


@pytest.mark.parametrize("heading", RECIPES)
def test_recipes_are_python(heading: str) -> None:
    compile(RECIPES[heading], heading, "exec")


@pytest.mark.parametrize("kind", ["kl", "jsd"])
def test_dependency_is_that_of_full_logits(kind: str, made: Any) -> None:
    model, _, inputs, mask = made
    model.train()
    tokens, temperature = mask.shape[1], 0.7
    other = {**inputs, "pixel_values": inputs["pixel_values"] * 0.3}
    found = measure_dependency(model, inputs, other, tokens, kind=kind, temperature=temperature)
    assert model.training and found.shape == mask.shape and not found.requires_grad
    with torch.no_grad():
        p, q = ((model(**given).logits[:, -tokens - 1 : -1] / temperature).log_softmax(-1) for given in (inputs, other))
    middle = torch.stack([p, q]).logsumexp(0) - torch.tensor(2.0).double().log()
    kl = (p.exp() * (p - q)).sum(-1)
    jsd = 0.5 * (p.exp() * (p - middle) + q.exp() * (q - middle)).sum(-1)
    expected = {"kl": kl, "jsd": jsd}[kind]
    assert expected.max() > 1e-3
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-8)


def test_the_loop_is_a_step_of_vppo(made: Any) -> None:
    model, image_processor, inputs, mask = made
    scope: dict[str, Any] = {}
    exec(compile(RECIPES["A loop of your own"], "loop", "exec"), scope)
    advantages = torch.tensor([1.0, -0.5, 0.7, -1.2], dtype=torch.float64)
    before = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        logits = model(**inputs).logits[:, -mask.shape[1] - 1 : -1]
    logprobs = logits.log_softmax(-1).gather(2, inputs["input_ids"][:, -mask.shape[1] :, None])[:, :, 0]
    other = {**inputs, "pixel_values": perturbed(scope, image_processor, inputs)}
    dependency = measure_dependency(model, inputs, other, mask.shape[1])
    expected, _ = vppo_loss(logprobs, logprobs, advantages, mask, dependency)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss, metrics = scope["update"](model, optimizer, image_processor, inputs, mask, advantages, 5, 9)
    assert expected != 0 and loss == pytest.approx(expected.item(), rel=1e-5)
    assert (other["pixel_values"] != inputs["pixel_values"]).any() and not torch.equal(before, model.lm_head.weight)
    assert 0 < float(metrics["kept_fraction"]) < 1


def perturbed(scope: dict[str, Any], image_processor: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    layout = scope["PixelLayout"].of(image_processor)
    blackened = scope["Perturbation"]("patch", patch_size=layout.patch_size)
    draw = scope["seeded"](5, 9)
    return scope["perturb"](inputs["pixel_values"], layout, blackened, draw, grid=inputs["image_grid_thw"])
