"""How the images of a model are perturbed: on its processor's tensors, or on the pictures before it.

Where every image is shown once, in a layout that `PixelLayout` knows, the processor's tensors are perturbed: that is
fast. Everywhere else, as where a picture is cut into tiles beside a thumbnail of it, the picture is perturbed in its
own coordinates and processed again, so that all its copies come from one draw. Which of the two is right is not looked
up but tried on pictures that say where each of their pixels is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vppo.batch import Batch, split_by_row
from vppo.errors import InputError
from vppo.images import to_rgb
from vppo.perturbations import Perturbation, PixelLayout, perturb, perturb_picture, seeded

Process = Callable[[Sequence[Sequence[Image.Image]]], Mapping[str, Any]]
PROBES = ((1024, 384), (240, 640))  # (width, height): large enough to be cut, of two shapes so that one is padded
TOLERANCE = 1e-4  # of normalised pixels: half a thousandth of a standard deviation is far below one level
MARK = 255  # the blue of a probe, which no padding has
GOLDEN = 0.6180339887  # its multiples, less their whole parts, are spread evenly
MARK_OFF = 4.0  # levels that resizing may move it
ROUNDING = 1.5  # levels that a probe's other colours may be off the straight line, beside one pixel's step


class ImageViews:
    """Perturbed views of images for one processor.

    Args:
        process: From the pictures of each sample to what the processor makes of them, as one batch.
        image_processor: Whose normalisation and patches these are.
        name: Of the processor, in messages.

    Attributes:
        layout: Of the processor's tensors, which are perturbed where `on_pixels`.
        on_pixels: Whether the processor's tensors are perturbed; if not, pictures are, and are processed again.

    Raises:
        InputError: Images cannot be perturbed in either way; the message says what was tried.
    """

    def __init__(self, process: Process, image_processor: Any, name: str) -> None:
        self._process, self._name = process, name
        self._scale = lru_cache(maxsize=4096)(self._measured_scale)
        self.on_pixels = False
        self._test(image_processor)

    @classmethod
    def of(cls, processor: Any) -> ImageViews:
        """Of a transformers processor with a chat template; tried once for each processor."""
        if processor not in _known:
            _known[processor] = cls(process_of(processor), processor.image_processor, type(processor).__name__)
        return _known[processor]

    def perturbed(
        self,
        batch: Batch,
        row: int,
        pictures: Sequence[Any],
        perturbation: Perturbation,
        generator: torch.Generator,
    ) -> Tensor:
        """The perturbed view of one row's images, each drawn in turn from the generator.

        Args:
            batch: Which holds the clean view.
            row: Of the batch.
            pictures: The row's images as the processor was given them; unused where `on_pixels`.
            perturbation: What to do to each image.
            generator: See `vppo.perturbations.seeded`.

        Returns:
            A tensor like the row's `pixel_values`.

        Raises:
            ValueError: The pictures are not those of the clean view.
        """
        if self.on_pixels:
            return batch.perturbed_pixels(row, self.layout, perturbation, generator)
        return self._again(self.pictures(pictures, perturbation, generator), batch.split["pixel_values"][row])

    def pictures(
        self, pictures: Sequence[Image.Image], perturbation: Perturbation, generator: torch.Generator
    ) -> list[Image.Image]:
        """The perturbed view of one sample's images, as pictures of their own size."""
        for picture in pictures:
            if not isinstance(picture, Image.Image):
                raise ValueError(
                    f"images: got {type(picture).__name__}, takes PIL images with {self._name}, whose pictures are "
                    "perturbed before they are processed"
                )
        upright = map(to_rgb, pictures)
        return [perturb_picture(one, perturbation, generator, self._scale(one.size)) for one in upright]

    def shown(self, picture: Image.Image) -> Image.Image:
        """A picture in the resolution in which the model is shown it, where that is the lower one."""
        down, across = self._scale(picture.size)
        width, height = round(picture.width * across), round(picture.height * down)
        return picture.resize((max(width, 1), max(height, 1))) if down < 1 and across < 1 else picture

    def tiles(self, samples: Sequence[Sequence[Image.Image]]) -> list[int]:
        """How many rows of `pixel_values` each sample has, where these are tiles."""
        return [len(self._process([pictures])["pixel_values"]) if len(pictures) else 0 for pictures in samples]

    def _again(self, pictures: Sequence[Image.Image], clean: Tensor) -> Tensor:
        """What the processor makes of pictures of the same sizes, in the place and the padding of the clean view."""
        own = torch.as_tensor(self._process([pictures])["pixel_values"])
        if own.dim() == clean.dim() + 1 and len(own) == 1:
            own = own[0]
        if own.dim() != clean.dim() or any(a > b for a, b in zip(own.shape, clean.shape, strict=True)):
            raise ValueError(
                f"pixel_values: got shape {list(clean.shape)}, but {self._name} makes {list(own.shape)} of the same "
                "images: they were not processed with its own options"
            )
        placed = clean.clone()
        placed[tuple(slice(length) for length in own.shape)] = own.to(clean)
        return placed

    # -- how large the pictures are shown ------------------------------------------------------------------------------

    def _measured_scale(self, size: tuple[int, int]) -> tuple[float, float]:
        """How many pixels the model is shown for one of a picture of this (width, height), downwards and across."""
        down, across = self._measured(size)
        width, height = size
        return max(round(height * down), 1) / height, max(round(width * across), 1) / width  # whole pixels are shown

    def _measured(self, size: tuple[int, int]) -> tuple[float, float]:
        values = torch.as_tensor(self._process([[_located(size, dithered=True)]])["pixel_values"])
        if values.dim() >= 4 and values.shape[-3] == 3:
            slopes = _slopes(self.layout.normalisation.level(values.reshape(-1, *values.shape[-3:])))
            if slopes is not None:  # levels in a pixel that is shown; there are 255 in the whole picture
                return 255 / (size[1] * slopes[0]), 255 / (size[0] * slopes[1])
        patches = values.reshape(-1, values.shape[-1])
        shown = int((patches.amax(1) > patches.amin(1)).sum()) * self.layout.patch_size**2
        both = (max(shown, 1) / (size[0] * size[1])) ** 0.5
        return both, both

    # -- whether it is right -------------------------------------------------------------------------------------------

    def _test(self, image_processor: Any) -> None:
        try:
            self.layout = PixelLayout.of(image_processor)
            self._try()
        except InputError:
            raise
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            raise InputError(
                f"processing_class: got {self._name}, takes a processor whose images can be perturbed; of pictures of "
                f"{' and '.join(f'{w} x {h}' for w, h in PROBES)} pixels it made something else than a tensor in "
                f"'pixel_values' that can be split into images ({reason})"
            ) from error

    def _try(self) -> None:
        located, black = ([[make(size)] for size in PROBES] for make in (_located, _black))
        clean, blackened = self._process(located), self._process(black)
        differing = sorted(name for name in clean if not _same(clean[name], blackened.get(name)))
        if differing != ["pixel_values"]:
            raise InputError(
                f"processing_class: got {self._name}, which shows images to its model in {differing}; takes a "
                "processor that shows them in 'pixel_values' alone, for TRL hands on nothing else"
            )
        rows = self._rows(clean)
        self.on_pixels = self._fits(rows, self._rows(blackened))
        if self.on_pixels:
            return
        for sample, row in zip(located, rows, strict=True):
            if not _same(self._again(sample, row["pixels"]), row["pixels"]):
                raise InputError(
                    f"processing_class: got {self._name}, takes a processor that makes the same of a picture alone and "
                    "beside another one; its images cannot be perturbed"
                )

    def _rows(self, encoded: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Each probe's share of a batch."""
        batch: dict[str, Any] = {**encoded, "num_images": [1] * len(PROBES)}
        batch["pixel_values"] = torch.as_tensor(encoded["pixel_values"])
        if in_tiles(encoded, len(PROBES)):
            batch["num_tiles"] = self.tiles([[_black(size)] for size in PROBES])
        split: dict[str, Any] = split_by_row(batch)
        names = {"pixels": "pixel_values", "grid": "image_grid_thw", "inside": "pixel_attention_mask"}
        return [
            {name: None if split.get(key) is None else split[key][row] for name, key in names.items()}
            for row in range(len(PROBES))
        ]

    def _fits(self, clean: list[dict[str, Any]], blackened: list[dict[str, Any]]) -> bool:
        """Whether a layout of `PixelLayout` is this processor's."""
        all_black = Perturbation("patch", self.layout.patch_size, 1.0)
        for row, black in zip(clean, blackened, strict=True):
            try:
                images = list(self.layout.images(row["pixels"], row["grid"]))
                ours = perturb(row["pixels"], self.layout, all_black, seeded(0), grid=row["grid"], inside=row["inside"])
            except (IndexError, RuntimeError, ValueError):  # tensors of another layout do not fit its shapes
                return False
            if len(images) != 1 or images[0].shape[-3] != 3 or not _same(ours, black["pixels"]):
                return False
            image = images[0].reshape(-1, *images[0].shape[-3:])[0]
            if not _is_in_place(self.layout.normalisation.level(image)):
                return False
        return True


def in_tiles(encoded: Mapping[str, Any], images: int) -> bool:
    """Whether the rows of a batch's `pixel_values` are the tiles of its images, so that TRL needs their numbers."""
    if "spatial_shapes" in encoded:
        return True
    gridded = "image_grid_thw" in encoded or "image_position_ids" in encoded
    return encoded["pixel_values"].ndim == 4 and len(encoded["pixel_values"]) != images and not gridded


_known: WeakKeyDictionary[Any, ImageViews] = WeakKeyDictionary()


def process_of(processor: Any) -> Process:
    def process(samples: Sequence[Sequence[Image.Image]]) -> Mapping[str, Any]:
        texts = []
        for pictures in samples:
            content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": "?"}]
            messages = [{"role": "user", "content": content}]
            texts.append(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        images = [list(pictures) for pictures in samples]
        encoded = processor(images=images, text=texts, padding=True, return_tensors="pt")
        return {name: value for name, value in encoded.items() if name not in ("input_ids", "attention_mask")}

    return process


def _located(size: tuple[int, int], *, dithered: bool = False) -> Image.Image:
    """A picture whose red grows from left to right and whose green from top to bottom.

    Whole levels make steps of a slope; `dithered` spreads their rounding over the other axis, where it averages out.
    """
    width, height = size
    down, across = np.arange(height)[:, None], np.arange(width)[None]
    red, green = (across + 0.5) * (255 / width), (down + 0.5) * (255 / height)
    levels = np.full((height, width, 3), MARK, np.uint8)
    levels[..., 0] = np.floor(red + (down * GOLDEN % 1 if dithered else 0.5))
    levels[..., 1] = np.floor(green + (across * GOLDEN % 1 if dithered else 0.5))
    return Image.fromarray(levels)


def _black(size: tuple[int, int]) -> Image.Image:
    return Image.new("RGB", size)


def _same(one: Any, other: Any) -> bool:
    """Whether two entries of a processor's output are the same, tensors or lists of them."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, Tensor | np.ndarray) and isinstance(other, Tensor | np.ndarray):
        a, b = torch.as_tensor(one), torch.as_tensor(other)
        return a.shape == b.shape and bool(torch.allclose(a.double(), b.double(), rtol=0, atol=TOLERANCE))
    return bool(one == other)


def _is_in_place(levels: Tensor) -> bool:
    """Whether `[3, H, W]` levels show a probe as it is: straight, whole or cut out, padded or not."""
    rows, columns = (there.nonzero().flatten() for there in _marked(levels))
    if len(rows) < 2 or len(columns) < 2:
        return False
    shown = levels[:2, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].double()
    for plane in (shown[0], shown[1].T):
        along = plane.mean(0)
        place = torch.arange(len(along), dtype=torch.float64) - (len(along) - 1) / 2
        slope = (along * place).sum() / place.square().sum()
        off = (plane - (along.mean() + slope * place)).abs().max()
        if slope <= 0 or off > slope + ROUNDING:
            return False
    return True


def _marked(levels: Tensor) -> tuple[Tensor, Tensor]:
    """`[..., H]` and `[..., W]` bool: rows and columns of `[..., 3, H, W]` levels that show a probe."""
    marked = (levels[..., 2, :, :] - MARK).abs() < MARK_OFF
    return marked.any(-1), marked.any(-2)


def _slopes(levels: Tensor) -> tuple[float, float] | None:
    """By how many levels a probe's green and red grow with each pixel of `[planes, 3, H, W]`, in most planes."""
    found: list[list[float]] = [[], []]
    for plane in levels.double():
        rows, columns = _marked(plane)
        if rows.sum() < 2 or columns.sum() < 2:
            continue
        shown = plane[:, rows][:, :, columns]
        for axis, along in enumerate((shown[1].mean(1), shown[0].mean(0))):
            place = torch.arange(len(along), dtype=torch.float64) - (len(along) - 1) / 2
            found[axis].append(float((along * place).sum() / place.square().sum()))
    down, across = (float(np.median(values)) if values else 0.0 for values in found)
    return (down, across) if down > 0 and across > 0 else None
