"""Perturbed views of images (VPPO, Appendix F), drawn on the tensors that a processor has made, or on pictures.

Working on processed tensors spares a second run of the processor, and the perturbed view keeps the clean one's shape;
`vppo.views` decides where that can be done.
Every draw is seeded by what it belongs to, so any step of a run can be reproduced by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

KINDS = ("patch", "noise", "blur", "grey")
GREY = 128.0


@dataclass(frozen=True)
class Normalisation:
    """How a processor turned 0..255 into pixel values: `(rescale * x - mean) / std` per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale: float = 1 / 255

    @classmethod
    def of(cls, image_processor: Any) -> Normalisation:
        """Read from a transformers image processor."""
        normalises = getattr(image_processor, "do_normalize", True)
        rescale = getattr(image_processor, "rescale_factor", 1 / 255)
        return cls(
            tuple(image_processor.image_mean) if normalises else (0.0, 0.0, 0.0),
            tuple(image_processor.image_std) if normalises else (1.0, 1.0, 1.0),
            rescale if getattr(image_processor, "do_rescale", True) else 1.0,
        )

    def pixel(self, value: float, like: Tensor) -> Tensor:
        """The pixel value of a 0..255 grey level, `[C, 1, 1]`."""
        mean, std = (torch.tensor(x, dtype=torch.float32, device=like.device) for x in (self.mean, self.std))
        return ((value * self.rescale - mean) / std).view(-1, 1, 1)

    def level(self, pixels: Tensor) -> Tensor:
        """Back to 0..255, `[..., C, H, W]`."""
        mean, std = (torch.tensor(x, device=pixels.device).view(-1, 1, 1) for x in (self.mean, self.std))
        return (pixels.float() * std + mean) / self.rescale


LEVELS = Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 1.0)  # of a picture as it is stored


@dataclass(frozen=True)
class Perturbation:
    """What the perturbed view does to an image.

    Attributes:
        kind: "patch" blackens random patches, "noise" adds Gaussian noise and clips, "blur" is a Gaussian blur, "grey"
            replaces the image by grey 128.
        patch_size: Side of a blackened patch in pixels.
        patch_probability: Chance of each patch to be blackened, 0..1.
        noise_std: Standard deviation of the noise on the 0..255 scale.
        blur_radius: Standard deviation of the blur in pixels.

    Raises:
        ValueError: A field is out of range.
    """

    kind: str = "patch"
    patch_size: int = 14
    patch_probability: float = 0.5
    noise_std: float = 189.0
    blur_radius: float = 6.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"perturbation: got {self.kind!r}, takes one of {list(KINDS)}")
        if not (isinstance(self.patch_size, int) and self.patch_size >= 1):
            raise ValueError(f"patch_size: got {self.patch_size!r}, takes a whole number of pixels from 1")
        if not 0 <= self.patch_probability <= 1:
            raise ValueError(f"patch_probability: got {self.patch_probability!r}, takes a number from 0 to 1")
        if not self.noise_std > 0:
            raise ValueError(f"noise_std: got {self.noise_std!r}, takes a number above 0")
        if not self.blur_radius > 0:
            raise ValueError(f"blur_radius: got {self.blur_radius!r}, takes a number above 0")

    @classmethod
    def of(cls, options: Any, model_patch_size: int) -> Perturbation:
        """What the options of a run ask for.

        Args:
            options: With the fields of this class, but `perturbation` for `kind`; a `patch_size` of None
                is the model's own.
            model_patch_size: In pixels.
        """
        size = model_patch_size if options.patch_size is None else options.patch_size
        return cls(options.perturbation, size, options.patch_probability, options.noise_std, options.blur_radius)

    def __call__(
        self,
        image: Tensor,
        normalisation: Normalisation,
        generator: torch.Generator,
        scale: tuple[float, float] = (1.0, 1.0),
    ) -> Tensor:
        """Perturb one image.

        Args:
            image: `[..., C, H, W]` normalised pixels; leading dimensions (the frames of a clip) share one draw.
            normalisation: How those pixels came about.
            generator: Source of the draw, on the CPU so that it does not depend on the device.
            scale: How many pixels the model is shown for one of the image, along height and width. Patches, noise and
                blur are those of the pixels that it is shown.

        Returns:
            A new tensor of the same shape, dtype and device.
        """
        if self.kind == "patch":
            return self._patch(image, normalisation, generator, scale)
        if self.kind == "noise":
            return self._noise(image, normalisation, generator, scale)
        if self.kind == "blur":
            return _gaussian_blur(image, (self.blur_radius / scale[0], self.blur_radius / scale[1]))
        return normalisation.pixel(GREY, image).to(image.dtype).expand(image.shape).clone()

    def _patch(
        self, image: Tensor, normalisation: Normalisation, generator: torch.Generator, scale: tuple[float, float]
    ) -> Tensor:
        rows, columns = (_shown(side, by) // self.patch_size for side, by in zip(image.shape[-2:], scale, strict=True))
        black = torch.rand((int(rows[-1]) + 1, int(columns[-1]) + 1), generator=generator) < self.patch_probability
        black = black[rows][:, columns].to(image.device)
        return torch.where(black, normalisation.pixel(0.0, image).to(image.dtype), image)

    def _noise(
        self, image: Tensor, normalisation: Normalisation, generator: torch.Generator, scale: tuple[float, float]
    ) -> Tensor:
        rows, columns = (_shown(side, by) for side, by in zip(image.shape[-2:], scale, strict=True))
        drawn = torch.randn((image.shape[-3], int(rows[-1]) + 1, int(columns[-1]) + 1), generator=generator)
        noise = drawn[:, rows][:, :, columns].to(image.device)
        low, high = normalisation.pixel(0.0, image), normalisation.pixel(255.0, image)
        noisy = image.float() + noise * (high - low) * (self.noise_std / 255.0)
        return noisy.clamp(low, high).to(image.dtype)


def _shown(side: int, scale: float) -> Tensor:
    """`[side]` for each row, or column, of an image the one in which the model is shown its middle."""
    return ((torch.arange(side, dtype=torch.float64) + 0.5) * scale).long()


def _gaussian_blur(image: Tensor, sigmas: tuple[float, float]) -> Tensor:
    """Separable Gaussian blur with mirrored edges; linear, so it may act on normalised pixels."""
    flat = image.reshape(-1, 1, *image.shape[-2:]).float()
    for axis, sigma in zip((2, 3), sigmas, strict=True):
        reach = min(int(3 * sigma + 0.5), flat.shape[axis] - 1)  # mirroring reaches no further than the image
        offsets = torch.arange(-reach, reach + 1, dtype=torch.float32, device=image.device)
        kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
        kernel = (kernel / kernel.sum()).view((1, 1, -1, 1) if axis == 2 else (1, 1, 1, -1))
        padding = (0, 0, reach, reach) if axis == 2 else (reach, reach, 0, 0)
        flat = torch.nn.functional.conv2d(torch.nn.functional.pad(flat, padding, mode="reflect"), kernel)
    return flat.view(image.shape).to(image.dtype)


def seeded(*key: int) -> torch.Generator:
    """A CPU generator whose stream belongs to the key, such as (seed, step, prompt)."""
    state = np.random.SeedSequence(key).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))


@dataclass(frozen=True)
class PixelLayout:
    """Where the images are in a model's `pixel_values`, and how they were normalised.

    Two layouts are known: `[..., 3, H, W]`, and the flattened patches of the Qwen-VL family (one row per patch, the
    rows of a merge block next to each other, columns channel-major over two equal frames), which come with a
    `[images, 3]` grid of (frames, patch rows, patch columns).
    """

    normalisation: Normalisation
    patch_size: int = 14
    merge_size: int = 2
    temporal_patch_size: int = 2

    @classmethod
    def of(cls, image_processor: Any) -> PixelLayout:
        """Read from a transformers image processor."""
        return cls(
            Normalisation.of(image_processor),
            _side(getattr(image_processor, "patch_size", None)) or cls.patch_size,
            getattr(image_processor, "merge_size", None) or cls.merge_size,
            getattr(image_processor, "temporal_patch_size", None) or cls.temporal_patch_size,
        )

    def _block_shape(self, frames: int, height: int, width: int) -> tuple[int, ...]:
        merge, side = self.merge_size, self.patch_size
        return (frames, height // merge, width // merge, merge, merge, 3, self.temporal_patch_size, side, side)

    def to_image(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """`[patches, 3 * T * side * side]` of one image to `[frames, T, 3, H, W]`."""
        frames, height, width = grid
        blocks = patches.view(self._block_shape(frames, height, width))
        image = blocks.permute(0, 6, 5, 1, 3, 7, 2, 4, 8)
        return image.reshape(frames, self.temporal_patch_size, 3, height * self.patch_size, width * self.patch_size)

    def to_patches(self, image: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """The inverse of `to_image`."""
        frames, height, width = grid
        merge, side = self.merge_size, self.patch_size
        blocks = image.reshape(
            frames, self.temporal_patch_size, 3, height // merge, merge, side, width // merge, merge, side
        )
        return blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(frames * height * width, -1)

    def images(self, pixel_values: Tensor, grid: Tensor | None) -> Iterator[Tensor]:
        """The images of one sample, each `[..., 3, H, W]`."""
        if grid is None:
            yield from _planes(pixel_values)
            return
        for patches, (frames, height, width) in zip(
            pixel_values.split(grid.prod(-1).tolist()), grid.tolist(), strict=True
        ):
            yield self.to_image(patches, (frames, height, width))

    def map(self, pixel_values: Tensor, grid: Tensor | None, change: Callable[[Tensor], Tensor]) -> Tensor:
        """One sample's pixels with `change` applied to each of its images.

        Args:
            pixel_values: `[..., 3, H, W]`, or `[patches, columns]` with `grid`.
            grid: `[images, 3]` or None.
            change: From `[..., 3, H, W]` to the same shape.

        Raises:
            ValueError: The tensor has neither layout.
        """
        changed = [change(image) for image in self.images(pixel_values, grid)]
        if not changed:
            return pixel_values
        if grid is None:
            return torch.stack(changed).view(pixel_values.shape)
        return torch.cat([self.to_patches(x, tuple(g)) for x, g in zip(changed, grid.tolist(), strict=True)])

    def pictures(self, pixel_values: Tensor, grid: Tensor | None) -> list[Image.Image]:
        """One sample's images as pictures, the first frame of each: what the model was really shown."""
        pictures = []
        for image in self.images(pixel_values, grid):
            frame = image.reshape(-1, *image.shape[-3:])[0]
            levels = self.normalisation.level(frame).round().clamp(0, 255).to(torch.uint8)
            pictures.append(Image.fromarray(levels.permute(1, 2, 0).cpu().numpy()))
        return pictures


def _side(size: Any) -> int | None:
    """Of a square, which some processors store with a height and a width."""
    return size["height"] if hasattr(size, "keys") else size


def _planes(pixel_values: Tensor) -> Tensor:
    if pixel_values.dim() < 3 or pixel_values.shape[-3] not in (1, 3):
        raise ValueError(
            f"pixel_values: got shape {list(pixel_values.shape)}, takes [..., 3, H, W], or [patches, columns] together "
            "with image_grid_thw"
        )
    return pixel_values.reshape(-1, *pixel_values.shape[-3:])


def perturb(
    pixel_values: Tensor,
    layout: PixelLayout,
    perturbation: Perturbation,
    generator: torch.Generator,
    *,
    grid: Tensor | None = None,
    inside: Tensor | None = None,
) -> Tensor:
    """The perturbed view of one sample's images, each drawn in turn from the generator.

    Args:
        pixel_values: The sample's pixels in one of the layouts that `PixelLayout` knows.
        layout: Of the model's image processor.
        perturbation: What to do to each image.
        generator: See `seeded`.
        grid: `[images, 3]` where the pixels are flattened patches.
        inside: `[..., H, W]` bool or 0/1, where the pixels are image and not padding; padding stays as it is.

    Returns:
        A new tensor like `pixel_values`.
    """
    perturbed = layout.map(pixel_values, grid, lambda image: perturbation(image, layout.normalisation, generator))
    if inside is None:
        return perturbed
    return torch.where((inside != 0).unsqueeze(-3), perturbed, pixel_values)


def perturb_picture(
    picture: Image.Image,
    perturbation: Perturbation,
    generator: torch.Generator,
    scale: tuple[float, float] = (1.0, 1.0),
) -> Image.Image:
    """The perturbed view of an RGB picture that a processor has not seen yet; see `Perturbation.__call__`."""
    levels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()
    changed = perturbation(levels, LEVELS, generator, scale).round().to(torch.uint8)
    return Image.fromarray(changed.permute(1, 2, 0).numpy())
