"""Every family's image processor: which way its images are perturbed, and that it is right."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import families
from torch import Tensor

from vppo.batch import Batch
from vppo.errors import InputError
from vppo.perturbations import Perturbation, perturb_picture, seeded
from vppo.views import ImageViews, in_tiles


@dataclass(frozen=True)
class Case:
    """An image processor of transformers, as small as it goes.

    Attributes:
        name: Of the family.
        place: Module, under transformers.models, and class.
        on_pixels: Whether the processor's tensors can be perturbed.
        nested: Whether it takes the images of each sample as a list of their own.
        options: Of the image processor.
        call: Options with which the family's processor calls it.
    """

    name: str
    place: str
    on_pixels: bool
    nested: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)

    def build(self) -> Any:
        folder, kind = self.place.split(":")
        pil = not importlib.util.find_spec(f"transformers.models.{folder}.image_processing_pil_{folder}")
        if pil and not importlib.util.find_spec("torchvision"):
            pytest.skip(f"the image processor of {self.name} needs torchvision, which is not here")
        module = importlib.import_module(
            f"transformers.models.{folder}.image_processing{'' if pil else '_pil'}_{folder}"
        )
        return getattr(module, kind + ("" if pil else "Pil"))(**self.options)


SQUARE = {"size": {"height": 56, "width": 56}}
TILES = {"size": {"height": 28, "width": 28}, "min_patches": 1, "max_patches": 6}
QWEN = {"patch_size": 14, "size": {"shortest_edge": 28 * 28, "longest_edge": 64 * 28 * 28}}
ANYRES = {
    "size": {"shortest_edge": 28},
    "crop_size": {"height": 28, "width": 28},
    "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56], [28, 84], [84, 28]],
}
CASES = [
    Case("Qwen2-VL, Qwen2.5-VL", "qwen2_vl:Qwen2VLImageProcessor", True, options=QWEN),
    Case("Qwen3-VL", "qwen2_vl:Qwen2VLImageProcessor", True, options={**QWEN, "patch_size": 16}),
    Case("GLM-4V", "glm4v:Glm4vImageProcessor", True),
    Case("GLM-4.6V", "glm46v:Glm46VImageProcessor", True),
    Case("VideoLLaMA3", "video_llama_3:VideoLlama3ImageProcessor", True),
    Case(
        "LLaVA", "clip:CLIPImageProcessor", True, options={"size": {"shortest_edge": 56}, "crop_size": SQUARE["size"]}
    ),
    Case("PaliGemma", "siglip:SiglipImageProcessor", True, options=SQUARE),
    Case("Gemma3", "gemma3:Gemma3ImageProcessor", True, options=SQUARE),
    Case(
        "Gemma3, pan and scan",
        "gemma3:Gemma3ImageProcessor",
        False,
        options={
            **SQUARE,
            "do_pan_and_scan": True,
            "pan_and_scan_min_crop_size": 16,
            "pan_and_scan_max_num_crops": 4,
            "pan_and_scan_min_ratio_to_activate": 1.2,
        },
    ),
    Case(
        "Idefics2", "idefics2:Idefics2ImageProcessor", True, True, {"size": {"shortest_edge": 28, "longest_edge": 56}}
    ),
    Case(
        "Idefics2, split",
        "idefics2:Idefics2ImageProcessor",
        False,
        True,
        {"size": {"shortest_edge": 28, "longest_edge": 56}, "do_image_splitting": True},
    ),
    Case(
        "Idefics3",
        "idefics3:Idefics3ImageProcessor",
        False,
        True,
        {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 28}},
    ),
    Case(
        "SmolVLM",
        "smolvlm:SmolVLMImageProcessor",
        False,
        True,
        {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 28}},
    ),
    Case("LLaVA-Next", "llava_next:LlavaNextImageProcessor", False, options=ANYRES),
    Case(
        "LLaVA-OneVision",
        "llava_onevision:LlavaOnevisionImageProcessor",
        False,
        options={"size": {"height": 28, "width": 28}, "image_grid_pinpoints": ANYRES["image_grid_pinpoints"]},
    ),
    Case("InternVL", "got_ocr2:GotOcr2ImageProcessor", False, options=TILES, call={"crop_to_patches": True}),
    Case("InternVL, one tile", "got_ocr2:GotOcr2ImageProcessor", True, options=SQUARE),
    Case("Ovis2", "ovis2:Ovis2ImageProcessor", False, options=TILES, call={"crop_to_patches": True}),
    Case(
        "Pixtral, Mistral3",
        "pixtral:PixtralImageProcessor",
        False,
        options={"size": {"longest_edge": 112}, "patch_size": {"height": 14, "width": 14}},
    ),
    Case("Gemma4", "gemma4:Gemma4ImageProcessor", False, options={"max_soft_tokens": 70}),
    Case("HunYuan-VL", "hunyuan_vl:HunYuanVLImageProcessor", False),
    Case("PaddleOCR-VL", "paddleocr_vl:PaddleOCRVLImageProcessor", False),
    Case("Janus", "janus:JanusImageProcessor", False, options=SQUARE),
    Case("DeepSeek-VL", "deepseek_vl:DeepseekVLImageProcessor", False, options=SQUARE),
    Case("SigLIP2, NaFlex", "siglip2:Siglip2ImageProcessor", False, options={"max_num_patches": 64}),
    Case("Aria", "aria:AriaImageProcessor", True),
    Case("Kimi-K2.5", "kimi_k25:Kimi_K25ImageProcessor", False),
    Case("Llama4", "llama4:Llama4ImageProcessor", False, options={"size": {"height": 28, "width": 28}}),
    Case("Aya-Vision, Cohere2-Vision", "cohere2_vision:Cohere2VisionImageProcessor", False, options=TILES),
    Case("LFM2-VL", "lfm2_vl:Lfm2VlImageProcessor", False, True),
    Case("ERNIE 4.5 VL", "ernie4_5_vl_moe:Ernie4_5_VLMoeImageProcessor", True),
]
BY_NAME = {case.name: case for case in CASES}
SAMPLES = [[families.picture(0, (300, 100)), families.picture(1, (90, 200)), families.picture(2, (120, 120))]]


class Family:
    """An image processor, and how its images are perturbed."""

    def __init__(self, case: Case) -> None:
        self.case, self.image_processor = case, case.build()
        self.views = ImageViews(self.process, self.image_processor, case.name)

    def process(self, samples: Sequence[Sequence[Image.Image]]) -> Mapping[str, Any]:
        flat = [picture for pictures in samples for picture in pictures]
        images: Any = [list(pictures) for pictures in samples] if self.case.nested else flat
        return dict(self.image_processor(images=images, return_tensors="pt", **self.case.call))

    def batch(self, samples: Sequence[Sequence[Image.Image]]) -> Batch:
        encoded = dict(self.process(samples))
        if in_tiles(encoded, sum(map(len, samples))):
            encoded["num_tiles"] = self.views.tiles(samples)
        nothing = torch.zeros(len(samples), 0, dtype=torch.long)
        tokens = {f"{part}_{kind}": nothing for part in ("prompt", "completion") for kind in ("ids", "mask")}
        return Batch({**tokens, "num_images": list(map(len, samples)), **encoded})

    def perturbed(self, samples: Sequence[Sequence[Image.Image]], perturbation: Perturbation) -> list[Tensor]:
        batch = self.batch(samples)
        return [
            self.views.perturbed(batch, row, pictures, perturbation, seeded(row))
            for row, pictures in enumerate(samples)
        ]


@cache
def family(name: str) -> Family:
    return Family(BY_NAME[name])


@pytest.mark.parametrize("name", BY_NAME)
def test_which_way(name: str) -> None:
    assert family(name).views.on_pixels == BY_NAME[name].on_pixels


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("name", BY_NAME)
def test_all_black_is_a_black_picture(name: str, images: int) -> None:
    """Three images in a sample, beside a sample of one: what pads them is not perturbed."""
    samples = [SAMPLES[0][:images], [families.picture(3, (64, 160))]]
    chosen = family(name)
    black = chosen.batch([[Image.new("RGB", picture.size) for picture in pictures] for pictures in samples])
    views = chosen.perturbed(samples, Perturbation("patch", chosen.views.layout.patch_size, 1.0))
    clean = chosen.batch(samples)
    for row, view in enumerate(views):
        torch.testing.assert_close(view, black.split["pixel_values"][row], rtol=0, atol=1e-5)
        assert not torch.equal(view, clean.split["pixel_values"][row])


@pytest.mark.parametrize("name", BY_NAME)
def test_no_patch_black_is_the_clean_view(name: str) -> None:
    samples = [SAMPLES[0][:2], [families.picture(3, (64, 160))]]
    chosen = family(name)
    views = chosen.perturbed(samples, Perturbation("patch", chosen.views.layout.patch_size, 0.0))
    for clean, view in zip(chosen.batch(samples).split["pixel_values"], views, strict=True):
        torch.testing.assert_close(view, clean, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [case.name for case in CASES if case.on_pixels])
def test_patches_of_the_pixels_that_are_shown(name: str) -> None:
    """In a white picture the patches that were drawn are black."""
    chosen, white = family(name), [[Image.new("RGB", (120, 120), "white")]]
    side = chosen.views.layout.patch_size
    view = chosen.perturbed(white, Perturbation("patch", side, 0.5))[0]
    clean = chosen.batch(white).split
    grid = clean["image_grid_thw"][0] if "image_grid_thw" in clean else None
    shown, before = (
        np.array(chosen.views.layout.pictures(pixels, grid)[0])[..., 0] > 128
        for pixels in (view, clean["pixel_values"][0])
    )
    height, width = shown.shape
    drawn = (torch.rand(-(-height // side), -(-width // side), generator=seeded(0)) < 0.5).numpy()
    black = drawn.repeat(side, 0).repeat(side, 1)[:height, :width]
    assert before.any() and np.array_equal(shown[before], ~black[before])


@pytest.mark.parametrize("name", [case.name for case in CASES if not case.on_pixels])
def test_patches_of_the_picture(name: str) -> None:
    """As by hand, in the size in which the picture is shown, and processed as any picture."""
    chosen, picture = family(name), families.picture(4, (120, 90))
    side = chosen.views.layout.patch_size
    down, across = chosen.views._scale(picture.size)
    view = chosen.perturbed([[picture]], Perturbation("patch", side, 0.5))[0]
    by_hand = families.blackened(picture, (120 * across, 90 * down), side, seeded(0))
    torch.testing.assert_close(view, chosen.batch([[by_hand]]).split["pixel_values"][0], rtol=0, atol=1e-5)
    assert 0.1 < np.mean(np.all(np.array(by_hand) == 0, axis=-1)) < 0.9


MOSAICS = {  # of a picture of 160 x 80 pixels: rows and columns of tiles, and whether the thumbnail stands before them
    "Idefics3": (2, 4, False),
    "SmolVLM": (2, 4, False),
    "InternVL": (1, 2, False),
    "LLaVA-OneVision": (1, 2, True),
    "LLaVA-Next": (1, 2, True),
}


@pytest.mark.parametrize("kind", ["patch", "noise"])
@pytest.mark.parametrize("name", MOSAICS)
def test_tiles_and_thumbnail_are_of_one_draw(name: str, kind: str) -> None:
    """The tiles put together and made small are the thumbnail."""
    rows, columns, first = MOSAICS[name]
    chosen = family(name)
    grey = Image.new("RGB", (160, 80), (128, 128, 128))
    view = chosen.perturbed([[grey]], Perturbation(kind, 14, 0.5))[0]
    levels = chosen.views.layout.normalisation.level(view.reshape(-1, *view.shape[-3:]))
    assert len(levels) == rows * columns + 1
    thumbnail, tiles = (levels[0], levels[1:]) if first else (levels[-1], levels[:-1])
    side = tiles.shape[-1]
    whole = tiles.view(rows, columns, 3, side, side).permute(2, 0, 3, 1, 4).reshape(3, rows * side, columns * side)
    small = torch.nn.functional.interpolate(whole[None], thumbnail.shape[-2:], mode="area")[0]
    blur = torch.nn.functional.avg_pool2d
    one, other = (blur(x[None], 4).flatten() for x in (thumbnail, small))
    assert one.std() > 5
    assert torch.corrcoef(torch.stack([one, other]))[0, 1] > 0.9


@pytest.mark.parametrize(
    ("name", "size", "canvas"),
    [
        ("Idefics3", (160, 80), (112, 56)),
        ("InternVL", (160, 80), (56, 28)),
        ("LLaVA-Next", (160, 80), (56, 28)),
        ("Pixtral, Mistral3", (160, 80), (112, 56)),
        ("Janus", (160, 80), (56, 28)),
        ("PaddleOCR-VL", (1120, 560), (1120, 560)),
        ("HunYuan-VL", (1024, 512), (1024, 512)),
        ("Gemma4", (960, 480), (528, 240)),
    ],
)
def test_how_large_a_picture_is_shown(name: str, size: tuple[int, int], canvas: tuple[int, int]) -> None:
    """Patches are as large as the model's, whatever the size of the picture."""
    down, across = family(name).views._scale(size)
    assert (size[0] * across, size[1] * down) == pytest.approx(canvas, rel=0.06)


@pytest.mark.parametrize("kind", ["patch", "noise", "blur", "grey"])
def test_a_picture_is_perturbed_in_the_pixels_that_are_shown(kind: str) -> None:
    """Twice as large and shown half as large: the same draw, of patches twice as large."""
    small = families.picture(0, (60, 40))
    large = small.resize((120, 80), Image.Resampling.NEAREST)
    perturbation = Perturbation(kind, 14, noise_std=40.0, blur_radius=3.0)
    ours = np.array(perturb_picture(large, perturbation, seeded(1), (0.5, 0.5)).reduce(2), np.float64)
    expected = np.array(perturb_picture(small, perturbation, seeded(1)), np.float64)
    assert np.abs(ours - expected).max() <= (1 if kind != "blur" else 8)
    assert kind == "grey" or np.abs(expected - np.array(small)).max() > 30


# -- what is refused ---------------------------------------------------------------------------------------------------

REFUSED = {
    "DeepSeek-OCR2": ("deepseek_ocr2:DeepseekOcr2ImageProcessor", r"\['pixel_values', 'pixel_values_local'\]"),
    "DeepSeek-VL hybrid": (
        "deepseek_vl_hybrid:DeepseekVLHybridImageProcessor",
        r"\['high_res_pixel_values', 'pixel_values'\]",
    ),
    "Step-3.7": ("step3p7:Step3p7ImageProcessor", r"\['pixel_values', 'pixel_values_local'\]"),
    "Phi-4-multimodal": ("phi4_multimodal:Phi4MultimodalImageProcessor", r"\['image_pixel_values'\]"),
    "Mllama": ("mllama:MllamaImageProcessor", "takes a processor whose images can be perturbed"),
    "Fuyu": ("fuyu:FuyuImageProcessor", "takes a processor whose images can be perturbed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    place, message = REFUSED[name]
    with pytest.raises(InputError, match=rf"^processing_class: got {name}, .*{message}"):
        Family(Case(name, place, False, nested=name == "Mllama"))


class Spoiled:
    """A good processor whose output is changed on the way."""

    def __init__(self, name: str, change: Any) -> None:
        self.family, self.change = family(name), change

    def process(self, samples: Sequence[Sequence[Image.Image]]) -> Mapping[str, Any]:
        encoded = dict(self.family.process(samples))
        return {**encoded, "pixel_values": self.change(encoded["pixel_values"])}

    def views(self) -> ImageViews:
        return ImageViews(self.process, self.family.image_processor, "Spoiled")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("Qwen2-VL, Qwen2.5-VL", lambda pixels: pixels[torch.arange(len(pixels)) ^ 1]),
        ("Qwen2-VL, Qwen2.5-VL", lambda pixels: pixels.view(len(pixels), 3, -1).transpose(1, 2).flatten(1)),
        ("Gemma3", lambda pixels: pixels.transpose(2, 3)),
        ("Gemma3", lambda pixels: pixels.flip(3)),
        ("Gemma3", lambda pixels: pixels.view(-1, 3, 2, 28, 56).transpose(2, 3).reshape(pixels.shape)),
        ("Gemma3", lambda pixels: 2 * pixels),
    ],
)
def test_another_layout_is_not_taken_for_a_known_one(name: str, change: Any) -> None:
    """Neighbouring patches exchanged, channels last, sides exchanged, mirrored, lines interleaved, scaled."""
    assert Spoiled(name, lambda pixels: pixels).views().on_pixels
    assert not Spoiled(name, change).views().on_pixels


def test_a_processor_that_makes_something_else_each_time_is_refused() -> None:
    with pytest.raises(InputError, match="takes a processor that makes the same of a picture alone"):
        Spoiled("LLaVA-Next", lambda pixels: pixels + 0.01 * len(pixels)).views()


def test_pictures_of_another_size_are_refused() -> None:
    chosen = family("Pixtral, Mistral3")
    batch = chosen.batch([[families.picture(0, (28, 28))]])
    with pytest.raises(
        ValueError, match=r"^pixel_values: got shape \[1, 3, 28, 28\], but Pixtral, Mistral3 makes \[1, 3"
    ):
        chosen.views.perturbed(batch, 0, [families.picture(0, (56, 56))], Perturbation(), seeded(0))
    with pytest.raises(ValueError, match=r"^images: got ndarray, takes PIL images with Pixtral, Mistral3"):
        chosen.views.perturbed(batch, 0, [np.zeros((28, 28, 3))], Perturbation(), seeded(0))


def test_tried_once_for_each_processor() -> None:
    processor = families.build("qwen2_vl")[1]
    assert ImageViews.of(processor) is ImageViews.of(processor)
    assert ImageViews.of(processor) is not ImageViews.of(families.build("qwen2_vl")[1])
