"""Pictures that a tool or an environment shows: rollouts of one prompt may see different ones."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from support import families
from support.runs import FAMILY, generation_batch, listen, options, plain_dependency, rows
from torch import Tensor
from trl.chat_template_utils import qwen3_vl_chat_template

from vppo import VPPOConfig, VPPOTrainer
from vppo.images import to_rgb

SIZES = ((56, 28), (28, 28), (84, 28))


def look(which: int) -> list[dict[str, Any]]:
    """Shows a picture.

    Args:
        which: The number of the picture.

    Returns:
        The picture.
    """
    return [{"type": "image", "image": families.picture(100 + which, SIZES[which % 3])}, {"type": "text", "text": "so"}]


class Room:
    """An environment of which every rollout sees another wall."""

    def __init__(self, number: int) -> None:
        self.number = number

    def reset(self, **kwargs: Any) -> list[dict[str, Any]]:
        return [{"type": "image", "image": families.picture(200 + self.number)}]


def rooms() -> Callable[[], Room]:
    """Builds rooms with numbers from 0."""
    numbers = count()
    return lambda: Room(next(numbers))


def with_tools(path: Path, data: list[dict[str, Any]], *, tools: Any = (look,), **changes: Any) -> VPPOTrainer:
    environment = changes.pop("environment_factory", None)
    model, processor = families.build(FAMILY)
    processor.chat_template = qwen3_vl_chat_template
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*experimental feature")
        return VPPOTrainer(
            model=model,
            reward_funcs=lambda completions, **_: [len(str(completion)) % 7 / 7 for completion in completions],
            args=VPPOConfig(**options(path, max_completion_length=250, per_device_train_batch_size=8, **changes)),
            train_dataset=Dataset.from_list(data),
            processing_class=processor,
            tools=list(tools),
            environment_factory=environment,
        )


def play(run: VPPOTrainer, calls: Sequence[int | None]) -> None:
    """Row i calls `look(calls[i])`, or answers at once; whoever has seen the picture answers."""
    encode = run.processing_class.tokenizer.encode

    def generate(prompt_ids: list[Any], *args: Any, **kwargs: Any) -> tuple[list[list[int]], None]:
        texts = [f"so {'abc'[i % 3] * (1 + i)}" for i in range(len(prompt_ids))]
        if len(prompt_ids) == len(calls) and "has_tool_images" not in kwargs:
            for i, which in enumerate(calls):
                if which is not None:
                    call = json.dumps({"name": "look", "arguments": {"which": which}})
                    texts[i] = f"<tool_call>\n{call}\n</tool_call>"
        return [encode(text + "<eos>") for text in texts], None

    run._generate_single_turn = generate  # type: ignore[method-assign]


CALLS: dict[str, list[int | None]] = {
    "all, one picture": [1] * 8,
    "all, different pictures": [0, 1, 2, 3, 4, 5, 6, 7],
    "all, different pictures of one size": [0, 3, 6, 9, 0, 3, 6, 9],
    "some": [None, 1, None, 2, 1, None, 1, None],
    "one": [None] * 5 + [2] + [None] * 2,
    "none": [None] * 8,
}


@pytest.mark.parametrize(
    ("calls", "scope", "images"),
    [*[(calls, scope, 1) for calls in CALLS for scope in ("prompt", "rollout")], ("some", "prompt", 0)],
)
def test_a_view_is_of_what_a_rollout_was_shown(
    calls: str, scope: str, images: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = with_tools(tmp_path, rows(2, images=(images,)), perturbation_scope=scope)
    play(run, CALLS[calls])
    seen = listen(monkeypatch)
    batch = generation_batch(run, rows(2, images=(images,)))
    shown = torch.tensor([images + (call is not None) for call in CALLS[calls]])
    assert batch["num_images"] == shown.tolist()
    mask = batch["completion_mask"].bool() & batch["tool_mask"].bool()
    expected = torch.where(mask, plain_dependency(run, batch), 0)
    assert expected.max() > 1e-4 and not expected[shown == 0].any()
    torch.testing.assert_close(seen[0].double(), expected, rtol=1e-4, atol=1e-6)


def odd_picture(kind: str) -> Image.Image:
    """A picture that Pillow's own conversion to RGB shows otherwise than a person sees it."""
    levels = np.arange(56 * 28, dtype=np.uint16).reshape(28, 56) % 256
    if kind == "16 bits":
        return Image.fromarray(levels * 257)
    if kind == "EXIF":
        turned = families.picture(5)
        turned.getexif()[Image.ExifTags.Base.Orientation] = 3
        return turned
    return Image.merge("LA", [Image.new("L", (56, 28)), Image.fromarray(levels.astype(np.uint8))]).convert("RGBA")


@pytest.mark.parametrize("kind", ["RGBA", "16 bits", "EXIF"])
@pytest.mark.parametrize("way", ["tool", "async tool", "environment"])
def test_pictures_are_shown_as_a_person_sees_them(way: str, kind: str, tmp_path: Path) -> None:
    """The model is given the same for a picture of any kind as for its upright RGB one."""

    def batch_with(picture: Image.Image) -> Any:
        shown = [{"type": "image", "image": picture}]

        def look(which: int) -> list[dict[str, Any]]:
            """Shows a picture.

            Args:
                which: The number of the picture.

            Returns:
                The picture.
            """
            return shown

        async def look_async(which: int) -> list[dict[str, Any]]:
            return shown

        look_async.__doc__, look_async.__name__ = look.__doc__, "look"

        class Window:
            def reset(self, **kwargs: Any) -> list[dict[str, Any]]:
                return shown

        if way == "environment":
            data = [{name: row[name] for name in ("prompt", "answer")} for row in rows(2)]
            run = with_tools(tmp_path, data, tools=(), environment_factory=Window)
        else:
            data = rows(2)
            run = with_tools(tmp_path, data, tools=[look if way == "tool" else look_async])
        play(run, [None] * 8 if way == "environment" else [1] * 8)
        run.model.train()
        run.current_gradient_accumulation_steps = 1
        return run._generate_and_score_completions([row for row in data for _ in range(4)])

    found, expected = batch_with(odd_picture(kind)), batch_with(to_rgb(odd_picture(kind)))
    assert found["num_images"] == [1 if way == "environment" else 2] * 8
    assert torch.equal(found["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize("scope", ["prompt", "rollout"])
@pytest.mark.parametrize("calls", ["all, different pictures", "all, different pictures of one size", "some"])
def test_an_unchanged_view_depends_on_nothing(
    calls: str, scope: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = with_tools(tmp_path, rows(2), perturbation_scope=scope, patch_probability=0.0)
    play(run, CALLS[calls])
    seen = listen(monkeypatch)
    generation_batch(run, rows(2))
    assert seen[0].abs().max() < 1e-9


def environment_batch(path: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[VPPOTrainer, Any, Tensor]:
    data = rows(2, images=(0,))
    for row in data:
        del row["images"]
    run = with_tools(path, data, tools=(), environment_factory=rooms(), **changes)
    play(run, [None] * 8)
    seen = listen(monkeypatch)
    return run, generation_batch(run, data), seen[0]


@pytest.mark.parametrize("scope", ["prompt", "rollout"])
def test_prompts_equal_in_all_but_their_pictures(scope: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, batch, dependency = environment_batch(tmp_path, monkeypatch, perturbation_scope=scope)
    assert batch["prompt_ids"].unique(dim=0).shape[0] == 2 and len(batch["image_grid_thw"]) == 8
    torch.testing.assert_close(dependency.double(), plain_dependency(run, batch), rtol=1e-4, atol=1e-6)
    assert (dependency.amax(1) > 1e-4).sum() > 4


def loss_and_gradients(run: VPPOTrainer, data: list[dict[str, Any]]) -> tuple[Tensor, dict[str, Tensor]]:
    run.model.train()
    run.current_gradient_accumulation_steps = 1
    torch.manual_seed(0)
    loss = run._compute_loss(run.model, run._prepare_inputs([row for row in data for _ in range(4)]))
    loss.backward()
    return loss, {name: weight.grad for name, weight in run.model.named_parameters() if weight.grad is not None}


def agree(shared: VPPOTrainer, plain: VPPOTrainer, data: list[dict[str, Any]]) -> None:
    (loss, grads), (expected, plain_grads) = loss_and_gradients(shared, data), loss_and_gradients(plain, data)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    size = torch.cat([grad.flatten() for grad in plain_grads.values()]).norm()
    assert size > 1e-3
    for name, grad in plain_grads.items():
        assert (grads[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-6 * size, name


@pytest.mark.parametrize("calls", CALLS)
def test_training_passes_agree(calls: str, tmp_path: Path) -> None:
    runs = []
    for sharing in ("auto", "off"):
        run = with_tools(tmp_path, rows(2), prefix_sharing=sharing)
        play(run, CALLS[calls])
        runs.append(run)
    agree(runs[0], runs[1], rows(2))


def test_training_passes_agree_in_an_environment(tmp_path: Path) -> None:
    data = [{name: row[name] for name in ("prompt", "answer")} for row in rows(2)]
    runs = []
    for sharing in ("auto", "off"):
        run = with_tools(tmp_path, data, tools=(), environment_factory=rooms(), prefix_sharing=sharing)
        play(run, [None] * 8)
        runs.append(run)
    agree(runs[0], runs[1], data)
