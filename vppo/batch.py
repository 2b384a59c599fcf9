"""The rows of a TRL batch, and the views of their images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vppo.perturbations import Perturbation, PixelLayout, perturb
from vppo.trl_utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

# the entries of a TRL batch that a model's forward takes beside the tokens and their mask: of images, and of tokens
IMAGE_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "image_position_ids",
)
TOKEN_INPUTS = ("token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True)
class View:
    """What the rows of a batch are shown.

    Attributes:
        keys: One per row of the batch; rows of one key have the same prompt and are shown the same images. See
            `Batch.alike`.
        pixels: For each key of interest the images to show, in the layout of the row's `pixel_values`; None shows the
            batch's own, which is the clean view.
    """

    keys: Sequence[int]
    pixels: dict[int, Tensor] | None = None


class Batch:
    """The rows of a TRL batch with their images apart, so that any of them can be taken together.

    Args:
        inputs: What `TRLTrainer.generate_and_score_completions` returns: prompts padded on the left, responses on the
            right.

    Attributes:
        prompt_ids, prompt_mask: `[B, P]`.
        completion_ids, completion_mask: `[B, T]`.
        mask: `[B, T]` bool, the response tokens that the policy chose (results of tools are not among them).
        has_image: `[B]` bool.
        prompt_lengths, response_lengths: Tokens of each row.
        prompt_bytes: Each row's prompt without padding, to tell equal ones.
    """

    def __init__(self, inputs: dict[str, Any]) -> None:
        self.split = split_by_row(inputs)
        self.prompt_ids: Tensor = inputs["prompt_ids"]
        self.prompt_mask: Tensor = inputs["prompt_mask"]
        self.completion_ids: Tensor = inputs["completion_ids"]
        self.completion_mask: Tensor = inputs["completion_mask"]
        tool_mask = inputs.get("tool_mask")
        self.mask: Tensor = (self.completion_mask if tool_mask is None else self.completion_mask * tool_mask).bool()
        count = inputs.get("num_images")
        if "pixel_values" not in inputs:
            count = [0] * len(self.prompt_ids)
        elif count is None:
            count = [1] * len(self.prompt_ids)
        self.has_image = torch.tensor([n > 0 for n in count], device=self.prompt_ids.device)
        self.prompt_lengths: list[int] = self.prompt_mask.sum(1).tolist()
        self.response_lengths: list[int] = self.completion_mask.sum(1).tolist()
        ids, given = self.prompt_ids.cpu().numpy(), self.prompt_mask.bool().cpu().numpy()
        self.prompt_bytes = [row[inside].tobytes() for row, inside in zip(ids, given, strict=True)]

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def repeated(self, times: int) -> Batch:
        """The rows several times over: row r of copy k is row `k * len(self) + r`. A view shows each copy its images:
        the batch's own are not copied, and the clean view has none to show.
        """
        copies = copy(self)
        copies.prompt_ids, copies.prompt_mask = self.prompt_ids.repeat(times, 1), self.prompt_mask.repeat(times, 1)
        copies.completion_ids = self.completion_ids.repeat(times, 1)
        copies.completion_mask = self.completion_mask.repeat(times, 1)
        copies.mask, copies.has_image = self.mask.repeat(times, 1), self.has_image.repeat(times)
        copies.prompt_lengths, copies.response_lengths = self.prompt_lengths * times, self.response_lengths * times
        copies.prompt_bytes = self.prompt_bytes * times
        copies.split = {}
        for name in (*IMAGE_INPUTS, *TOKEN_INPUTS):
            values = self.split.get(name)
            if isinstance(values, list):
                copies.split[name] = values * times
            elif name == "pixel_values" and values is not None:
                copies.split[name] = values[:1].expand(times * len(self), *values.shape[1:])
            elif values is not None:
                copies.split[name] = values.repeat(times, *[1] * (values.dim() - 1))
        return copies

    def alike(self, prompts: Sequence[int]) -> list[int]:
        """For each row the first one of its prompt that has the same images: a tool or an environment may have shown
        other ones to another rollout.

        Args:
            prompts: Which prompt each row answers.
        """
        different: dict[int, list[int]] = {}  # of each prompt, rows of which no two have the same images
        firsts: list[int] = []
        for row, prompt in enumerate(prompts):
            seen = different.setdefault(prompt, [])
            first = next((other for other in seen if self._same_images(row, other)), row)
            if first == row:
                seen.append(row)
            firsts.append(first)
        return firsts

    def _same_images(self, row: int, other: int) -> bool:
        values: list[Any] = [self.split[name] for name in IMAGE_INPUTS if self.split.get(name) is not None]
        return all(torch.equal(value[row], value[other]) for value in values)

    def perturbed_pixels(
        self, row: int, layout: PixelLayout, perturbation: Perturbation, generator: torch.Generator
    ) -> Tensor:
        """The perturbed view of one row's images, in the layout of its `pixel_values`."""
        grids, inside = self.split.get("image_grid_thw"), self.split.get("pixel_attention_mask")
        return perturb(
            self.split["pixel_values"][row],
            layout,
            perturbation,
            generator,
            grid=None if grids is None else grids[row],
            inside=None if inside is None else inside[row],
        )

    def prompts(self, rows: Sequence[int], view: View) -> dict[str, Any]:
        """What the model's forward takes for the prompts of these rows, without columns that are padding in all."""
        index = list(rows)
        length = max(self.prompt_lengths[row] for row in rows)
        inputs = {"input_ids": self.prompt_ids[index, -length:], "attention_mask": self.prompt_mask[index, -length:]}
        end = self.prompt_ids.shape[1]
        for name in TOKEN_INPUTS:
            kinds: Any = self.split.get(name)
            if kinds is not None:
                inputs[name] = kinds[index, end - length : end]
        return {**inputs, **self._images(index, view)}

    def whole(self, rows: Sequence[int], view: View) -> dict[str, Any]:
        """What the model's forward takes for prompts and responses of these rows, cut to the longest of each."""
        index, length = list(rows), self.longest(rows)
        inputs = self.prompts(rows, view)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], self.completion_ids[index, :length]], dim=1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], self.completion_mask[index, :length]], dim=1)
        end = self.prompt_ids.shape[1]
        for name in TOKEN_INPUTS:
            if name in inputs:
                kinds: Any = self.split[name]
                inputs[name] = torch.cat([inputs[name], kinds[index, end : end + length]], dim=1)
        return inputs

    def longest(self, rows: Sequence[int]) -> int:
        """The length of the longest response of these rows, 1 at least."""
        return max(1, *(self.response_lengths[row] for row in rows))

    def _images(self, rows: list[int], view: View) -> dict[str, Any]:
        chosen: dict[str, Any] = {}
        if not self.has_image[rows].any():
            return chosen
        for name in IMAGE_INPUTS:
            values = self.split.get(name)
            if values is None:
                continue
            if name == "pixel_values" and view.pixels is not None:
                views = [view.pixels[view.keys[row]] for row in rows]
                chosen[name] = views if isinstance(values, list) else torch.stack(views)
            elif isinstance(values, list):
                chosen[name] = [values[row] for row in rows]
            else:
                chosen[name] = values[rows]
        return unsplit_pixel_values_by_grid(chosen)


def in_rows(inputs: Mapping[str, Any]) -> bool:
    """Whether `pixel_values` has one entry per row, `[B, n, ...]`, padded to the fullest row's n images or tiles.

    Idefics, SmolVLM and Granite Docling have it so. It shows in a `pixel_attention_mask`, which belongs to the rows,
    too; with `spatial_shapes` that mask belongs to tiles.
    """
    return inputs.get("pixel_attention_mask") is not None and inputs.get("spatial_shapes") is None


def split_by_row(inputs: dict[str, Any]) -> dict[str, Any]:
    """TRL's `split_pixel_values_by_grid`; images that have one entry per row are left as they are.

    TRL takes those for one entry per image where the batch happens to have as many images as rows.
    """
    return inputs if in_rows(inputs) else split_pixel_values_by_grid(inputs)


def with_entries(inputs: dict[str, Any], rows: int) -> dict[str, Any]:
    """Tells TRL where images have one entry per row; see `split_by_row`. What it counts as `num_tiles` are entries."""
    return {**inputs, "num_tiles": [1] * rows} if in_rows(inputs) else inputs


def without_no_images(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A hook before a model's forward: images that are none at all are left out, as every model takes it.

    TRL cuts batches in pieces, and a piece of text-only problems comes with a `pixel_values` of no rows, or of padding.
    """
    pixels = kwargs.get("pixel_values")
    if isinstance(pixels, Tensor) and (
        not len(pixels) or (in_rows(kwargs) and not kwargs["pixel_attention_mask"].any())
    ):
        kwargs = {name: value for name, value in kwargs.items() if name not in IMAGE_INPUTS}
    return args, kwargs
