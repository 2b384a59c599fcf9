"""Problems and their images as tensors, made once and joined to any number of responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vppo.batch import TOKEN_INPUTS, Batch
from vppo.data.problems import Problem
from vppo.perturbations import Perturbation
from vppo.trl_utils import pad, prepare_multimodal_messages, unsplit_pixel_values_by_grid
from vppo.views import ImageViews, in_tiles


def chat_text(processor: Any, problem: Problem) -> str:
    """A problem as the model reads it, up to where its answer begins."""
    messages = prepare_multimodal_messages(problem.prompt, images=problem.images)
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def prompts_of(processor: Any, problems: dict[int, Problem]) -> tuple[Prompts, dict[int, int], dict[int, str]]:
    """The problems that a processor takes, whatever is wrong with the others.

    Args:
        processor: Of the model.
        problems: By a number of the caller's.

    Returns:
        The prompts, the place of each number among them, and why the other numbers have none.
    """
    reasons = {}
    try:
        prompts = Prompts(processor, list(problems.values()))
    except Exception:  # of one of them; templates and processors raise many kinds
        for number, problem in list(problems.items()):
            try:
                Prompts(processor, [problem])
            except Exception as error:
                reasons[number] = f"the model's processor does not take it: {error}"
        problems = {number: problem for number, problem in problems.items() if number not in reasons}
        prompts = Prompts(processor, list(problems.values()))
    return prompts, {number: place for place, number in enumerate(problems)}, reasons


class Prompts:
    """Any number of problems with their images, on the CPU.

    Args:
        processor: Of the model, with a chat template.
        problems: With images or without.

    Attributes:
        problems: As given.
        lengths: Tokens of each prompt, those of its images included.

    Raises:
        InputError: The images of this processor cannot be perturbed.
        ValueError: The processor cannot take one of them.
    """

    def __init__(self, processor: Any, problems: Sequence[Problem]) -> None:
        self.problems = problems
        self._pad_id = processor.tokenizer.pad_token_id
        self._views = ImageViews.of(processor)
        nothing = torch.zeros(len(problems), 0, dtype=torch.long)
        texts = [chat_text(processor, problem) for problem in problems]
        images = [problem.images for problem in problems]
        encoded: dict[str, Any] = {"input_ids": nothing, "attention_mask": nothing}
        if problems:
            shown = images if any(images) else None
            encoded = dict(processor(images=shown, text=texts, padding=True, padding_side="left", return_tensors="pt"))
        self._ids, self._mask = encoded.pop("input_ids"), encoded.pop("attention_mask")
        if "pixel_values" in encoded and in_tiles(encoded, sum(map(len, images))):
            encoded["num_tiles"] = self._views.tiles(images)
        self._batch = Batch(
            {
                "prompt_ids": self._ids,
                "prompt_mask": self._mask,
                "completion_ids": nothing,
                "completion_mask": nothing,
                "num_images": [len(group) for group in images],
                **encoded,
            }
        )
        self._encoded = [*encoded, "num_images"]
        self.lengths: list[int] = self._mask.sum(1).tolist()

    def __len__(self) -> int:
        return len(self.lengths)

    def join(
        self, rows: Sequence[int], responses: Sequence[Sequence[int]], device: torch.device | str = "cpu"
    ) -> dict[str, Any]:
        """One row for each response, as the padded tensors that a TRL batch consists of.

        Args:
            rows: The problem of each response; problems may repeat.
            responses: Token ids.
            device: Where the tensors go.
        """
        index = list(rows)
        longest = max(self.lengths[row] for row in index)
        ids = [torch.tensor(response, dtype=torch.long) for response in responses]
        completion_ids = pad(ids, padding_value=self._pad_id, padding_side="right")
        completion_mask = pad([torch.ones_like(r) for r in ids], padding_value=0, padding_side="right")
        inputs: dict[str, Any] = {}
        for name in self._encoded:
            values = self._batch.split[name]
            inputs[name] = [values[row] for row in index] if isinstance(values, list) else values[index]
            if name in TOKEN_INPUTS:  # the response is text
                inputs[name] = torch.cat([inputs[name][:, -longest:], torch.zeros_like(completion_ids)], dim=1)
        inputs = {
            "prompt_ids": self._ids[index, -longest:],
            "prompt_mask": self._mask[index, -longest:],
            "completion_ids": completion_ids,
            "completion_mask": completion_mask,
            **unsplit_pixel_values_by_grid(inputs),
        }
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}

    def perturbed(self, row: int, perturbation: Perturbation, generator: torch.Generator) -> Tensor:
        """The perturbed view of one problem's images, in the layout of the model's `pixel_values`."""
        return self._views.perturbed(self._batch, row, self.problems[row].images, perturbation, generator)

    def pictures(
        self, row: int, perturbation: Perturbation | None = None, generator: torch.Generator | None = None
    ) -> list[Image.Image]:
        """One problem's images as the model is shown them, in the clean view or in the perturbed one of a draw.

        An image that is shown in several tiles is shown here as one picture.
        """
        images = self.problems[row].images
        if not self._views.on_pixels:
            if perturbation is not None and generator is not None:
                images = self._views.pictures(images, perturbation, generator)
            return [self._views.shown(image) for image in images]
        split = self._batch.split
        grids, inside = split.get("image_grid_thw"), split.get("pixel_attention_mask")
        shown = split["pixel_values"][row]
        if perturbation is not None and generator is not None:
            shown = self.perturbed(row, perturbation, generator)
        pictures = self._views.layout.pictures(shown, None if grids is None else grids[row])
        if inside is None:
            return pictures
        return [picture for picture, there in zip(pictures, inside[row], strict=True) if there.any()]
