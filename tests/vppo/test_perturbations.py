"""Perturbed pixels are what each family's own processor makes of an image perturbed by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from support import families
from torch import Tensor

from vppo.perturbations import Normalisation, Perturbation, PixelLayout, perturb, seeded

BUILT = {family.name: (family, family.build()[1].image_processor) for family in families.FAMILIES}
NAMES = list(BUILT)


def processed(name: str, levels: np.ndarray) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Pixels, grid and pixel mask of one image that the processor does not resize."""
    processor = BUILT[name][1]
    whole = {"do_image_splitting": False, "size": {"longest_edge": 28}} if name == "idefics3" else {}
    out = processor([Image.fromarray(levels)], return_tensors="pt", **whole)
    inside = out.get("pixel_attention_mask")
    return (
        out["pixel_values"][0] if inside is not None else out["pixel_values"],
        out.get("image_grid_thw"),
        None if inside is None else inside[0],
    )


def levels_of(name: str, seed: int = 0) -> np.ndarray:
    return np.asarray(families.picture(seed, BUILT[name][0].native))


def perturbed(name: str, perturbation: Perturbation, levels: np.ndarray, seed: int = 1) -> Tensor:
    pixels, grid, inside = processed(name, levels)
    layout = PixelLayout.of(BUILT[name][1])
    return perturb(pixels, layout, perturbation, seeded(seed), grid=grid, inside=inside)


def assert_same(name: str, ours: Tensor, by_hand: np.ndarray, atol: float) -> None:
    """`by_hand` is in levels, 0..255, already rounded."""
    torch.testing.assert_close(ours, processed(name, by_hand.astype(np.uint8))[0], rtol=0, atol=atol)


@pytest.mark.parametrize("patch", [None, 5])
@pytest.mark.parametrize("name", NAMES)
def test_patches_are_black(name: str, patch: int | None) -> None:
    """With the model's own patch, and with one that does not divide the image."""
    levels = levels_of(name).copy()
    size = patch or BUILT[name][0].patch
    ours = perturbed(name, Perturbation("patch", size), levels)
    grid = [-(-side // size) for side in levels.shape[:2]]
    black = torch.rand(grid, generator=seeded(1)) < 0.5
    assert 0 < black.sum() < black.numel()
    for row, column in black.nonzero().tolist():
        levels[row * size : (row + 1) * size, column * size : (column + 1) * size] = 0
    assert_same(name, ours, levels, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_grey(name: str) -> None:
    levels = levels_of(name)
    assert_same(name, perturbed(name, Perturbation("grey"), levels), np.full_like(levels, 128), atol=1e-6)


HALF_A_LEVEL = 0.51 / 255 / 0.26  # rounding by hand, over the smallest standard deviation of a channel


@pytest.mark.parametrize("name", NAMES)
def test_noise(name: str) -> None:
    levels = levels_of(name)
    noise = torch.randn((3, *levels.shape[:2]), generator=seeded(1)).permute(1, 2, 0).numpy()
    by_hand = np.clip(levels + 189.0 * noise, 0, 255).round()
    assert (by_hand == 0).any() and (by_hand == 255).any()
    assert_same(name, perturbed(name, Perturbation("noise"), levels), by_hand, atol=HALF_A_LEVEL)


@pytest.mark.parametrize("name", NAMES)
def test_blur(name: str) -> None:
    """Radius 2: three of them fit into the smallest image."""
    levels = levels_of(name)
    by_hand = gaussian_filter(levels.astype(np.float64), sigma=(2, 2, 0), mode="mirror", truncate=3.0).round()
    ours = perturbed(name, Perturbation("blur", blur_radius=2.0), levels)
    assert_same(name, ours, by_hand, atol=HALF_A_LEVEL)


def test_blur_of_an_image_smaller_than_its_reach() -> None:
    image = torch.rand(3, 5, 4)
    ours = Perturbation("blur")(image, Normalisation((0.5,) * 3, (0.5,) * 3), seeded(0))
    assert ours.shape == image.shape
    assert (ours.amax((1, 2)) - ours.amin((1, 2)) < 0.5 * (image.amax((1, 2)) - image.amin((1, 2)))).all()
    constant = torch.full((3, 1, 7), 0.3)
    torch.testing.assert_close(
        Perturbation("blur")(constant, Normalisation((0.0,) * 3, (1.0,) * 3), seeded(0)), constant
    )


@pytest.mark.parametrize("kind", ["patch", "noise", "blur", "grey"])
def test_idefics3_padding_stays_as_it_is(kind: str) -> None:
    """One row has one image, the other two: the first row's second image is padding, and the model must see that."""
    processor = BUILT["idefics3"][1]
    images = [[families.picture(0, (28, 28))], [families.picture(1, (28, 28)), families.picture(2, (28, 28))]]
    out = processor(images, return_tensors="pt")
    inside = out["pixel_attention_mask"][0]
    padding = ~inside.bool().any(-1).any(-1)
    assert padding.any() and not padding.all()
    pixels = out["pixel_values"][0]
    perturbation = Perturbation(kind, 7, 1.0)
    ours = perturb(pixels, PixelLayout.of(processor), perturbation, seeded(0), inside=inside)
    assert torch.equal(ours[padding], pixels[padding])
    assert all(not torch.equal(a, b) for a, b in zip(ours[~padding], pixels[~padding], strict=True))


@pytest.mark.parametrize("kind", ["patch", "noise", "blur", "grey"])
def test_both_frames_of_a_qwen_patch_are_alike(kind: str) -> None:
    ours = perturbed("qwen2_5_vl", Perturbation(kind), levels_of("qwen2_5_vl"))
    frames = ours.view(-1, 3, 2, 14, 14)
    assert torch.equal(frames[:, :, 0], frames[:, :, 1])


@pytest.mark.parametrize("kind", ["patch", "noise"])
def test_every_image_of_a_sample_has_its_own_draw(kind: str) -> None:
    layout = PixelLayout.of(BUILT["llava"][1])
    pixels = torch.zeros(2, 3, 56, 56)
    ours = perturb(pixels, layout, Perturbation(kind), seeded(0))
    assert not torch.equal(ours[0], ours[1])
    assert torch.equal(ours, perturb(pixels, layout, Perturbation(kind), seeded(0)))
    assert not torch.equal(ours, perturb(pixels, layout, Perturbation(kind), seeded(1)))
    assert not pixels.any(), "the clean view is not written over"


def test_patch_probability() -> None:
    layout, pixels = PixelLayout.of(BUILT["llava"][1]), torch.ones(1, 3, 1400, 1400)

    def share(probability: float) -> float:
        ours = perturb(pixels, layout, Perturbation("patch", 14, probability), seeded(0))
        return (ours != 1).all(1).float().mean().item()

    assert share(0.0) == 0.0 and share(1.0) == 1.0
    assert share(0.3) == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_pictures_show_what_the_model_was_shown(name: str) -> None:
    levels = levels_of(name)
    pixels, grid, _ = processed(name, levels)
    (picture,) = PixelLayout.of(BUILT[name][1]).pictures(pixels, grid)
    assert np.array_equal(np.asarray(picture), levels)


def test_normalisation_follows_the_processor() -> None:
    processor = BUILT["llava"][1].__class__(do_normalize=False)
    plain = Normalisation.of(processor)
    assert plain.pixel(255.0, torch.zeros(1)).flatten().tolist() == pytest.approx([1.0] * 3)
    raw = Normalisation.of(processor.__class__(do_normalize=False, do_rescale=False))
    assert raw.pixel(255.0, torch.zeros(1)).flatten().tolist() == pytest.approx([255.0] * 3)
    levels = torch.tensor([0.0, 100.0, 255.0]).expand(3, 1, 3)
    normal = Normalisation.of(BUILT["llava"][1])
    pixels = torch.cat([normal.pixel(float(level), levels) for level in levels[0, 0]], dim=2)
    torch.testing.assert_close(normal.level(pixels), levels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["patch", "noise", "blur", "grey"])
def test_dtype_is_kept(kind: str, dtype: torch.dtype) -> None:
    image = torch.rand(3, 28, 28, dtype=dtype)
    assert Perturbation(kind)(image, Normalisation((0.5,) * 3, (0.5,) * 3), seeded(0)).dtype == dtype


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kind", "black"),
        ("patch_size", 0),
        ("patch_size", 2.5),
        ("patch_probability", 1.5),
        ("noise_std", 0.0),
        ("blur_radius", float("nan")),
    ],
)
def test_refused(field: str, value: Any) -> None:
    name = "perturbation" if field == "kind" else field
    with pytest.raises(ValueError, match=rf"^{name}: got {value!r}, takes "):
        Perturbation(**{field: value})


def test_an_unknown_layout_is_refused() -> None:
    layout = PixelLayout.of(BUILT["llava"][1])
    with pytest.raises(ValueError, match=r"pixel_values: got shape \[8, 1176\], takes \[\.\.\., 3, H, W\]"):
        perturb(torch.zeros(8, 1176), layout, Perturbation(), seeded(0))
