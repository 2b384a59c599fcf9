"""Pictures of every kind enter training and analysis as a person sees them."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features, List
from datasets import Image as ImageFeature
from PIL import Image, ImageDraw
from support.runs import generation_batch, rows, trainer

from vppo.data import Problems, load_training_data
from vppo.demo.scored import score_responses
from vppo.errors import InputError
from vppo.images import read_picture, rgb_row, to_rgb
from vppo.perturbations import PixelLayout

BLACK, WHITE = (0, 0, 0), (255, 255, 255)
RAMP = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)


def stored(image: Image.Image, kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def opened(image: Image.Image, kind: str, **options: Any) -> Image.Image:
    return Image.open(io.BytesIO(stored(image, kind, **options)))


def drawing() -> Image.Image:
    """A black square on nothing, and nothing is black."""
    image = Image.new("RGBA", (56, 28), (0, 0, 0, 0))
    ImageDraw.Draw(image).rectangle((20, 8, 35, 19), fill=(0, 0, 0, 255))
    return image


def assert_drawing(image: Image.Image) -> None:
    assert image.mode == "RGB" and image.size == (56, 28)
    assert [image.getpixel(place) for place in ((0, 0), (25, 12), (50, 25))] == [WHITE, BLACK, WHITE]


def palette_with_alpha() -> Image.Image:
    image = Image.new("P", (56, 28), 0)
    image.putpalette([0, 0, 0, 0, 0, 0, 0, 255], "RGBA")
    ImageDraw.Draw(image).rectangle((20, 8, 35, 19), fill=1)
    return image


TRANSPARENT: dict[str, Any] = {
    "RGBA": drawing,
    "LA": lambda: drawing().convert("LA"),
    "La": lambda: drawing().convert("LA").convert("La"),
    "RGBa": lambda: drawing().convert("RGBa"),
    "PA": lambda: drawing().convert("P").convert("PA"),
    "palette": palette_with_alpha,
    "palette PNG": lambda: opened(palette_with_alpha(), "PNG"),
    "one colour of RGB": lambda: opened(to_rgb(drawing()), "PNG", transparency=WHITE),
    "PNG": lambda: opened(drawing(), "PNG"),
    "GIF": lambda: opened(drawing(), "GIF"),
    "WebP": lambda: opened(drawing(), "WEBP", lossless=True),
    "TIFF": lambda: opened(drawing(), "TIFF"),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_transparent_parts_are_white(kind: str) -> None:
    assert_drawing(to_rgb(TRANSPARENT[kind]()))


def test_half_transparent_black_is_grey() -> None:
    assert to_rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 128))).getpixel((0, 0)) == (127, 127, 127)


SCALED: dict[str, Any] = {
    "16 bits": lambda: Image.fromarray(RAMP),
    "16 bits, big-endian": lambda: Image.frombytes("I;16B", (256, 4), RAMP.astype(">u2").tobytes()),
    "PNG": lambda: opened(Image.fromarray(RAMP), "PNG"),
    "TIFF": lambda: opened(Image.fromarray(RAMP), "TIFF"),
    "PGM": lambda: opened(Image.fromarray(RAMP), "PPM"),  # Pillow reads it into 32 bits
    "0..1": lambda: Image.fromarray((RAMP / 65535).astype(np.float32)),
    "0..1, TIFF": lambda: opened(Image.fromarray((RAMP / 65535).astype(np.float32)), "TIFF"),
    "0..255, TIFF": lambda: opened(Image.fromarray((RAMP / 257).astype(np.float32)), "TIFF"),
}


@pytest.mark.parametrize("kind", SCALED)
def test_levels_are_scaled_to_eight_bits(kind: str) -> None:
    image = to_rgb(SCALED[kind]())
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.arange(256)[None, :, None].repeat(4, 0).repeat(3, 2))


def test_16_bits_with_a_transparent_level() -> None:
    image = to_rgb(opened(Image.fromarray(RAMP), "PNG", transparency=0))
    assert np.asarray(image)[0, :3, 0].tolist() == [255, 1, 2]


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (RAMP.astype(np.int32), "got 32-bit levels from 0 to 65535, takes 8 or 16 bits"),
        ((RAMP / 100).astype(np.float32), "got floating-point levels from 0 to 655.35, takes 0..1, or 0..255"),
        ((RAMP / 65535 - 0.5).astype(np.float32), "got floating-point levels from -0.5 to 0.5, takes 0..1"),
        ((RAMP / 60000).astype(np.float32), r"got floating-point levels from 0 to 1\.09225, takes 0..1"),
        (np.full((2, 2), np.nan, np.float32), "got floating-point levels from nan to nan"),
    ],
)
def test_levels_without_a_white_are_refused_with_file_and_row(levels: np.ndarray, message: str, tmp_path: Path) -> None:
    image = Image.fromarray(levels)
    with pytest.raises(ValueError, match=message):
        to_rgb(image)
    image.save(tmp_path / "a.tif")
    path = tmp_path / "x.jsonl"
    path.write_text('{"problem": "P", "answer": "A", "images": ["a.tif"]}\n')
    for read in (load_training_data, lambda path: Problems(path)[0]):
        with pytest.raises(InputError, match=rf"x\.jsonl, row 1, column 'images': cannot read .*a\.tif: .*{message}"):
            read(path)


COLOURS: dict[str, Any] = {
    "CMYK": lambda: Image.new("CMYK", (9, 9), (0, 255, 255, 0)),
    "CMYK JPEG": lambda: opened(Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "JPEG"),
    "YCbCr": lambda: Image.new("RGB", (9, 9), "red").convert("YCbCr"),
    "HSV": lambda: Image.new("HSV", (9, 9), (0, 255, 255)),
    "LAB": lambda: Image.new(
        "LAB", (9, 9), (138, 128 + 81, 128 + 70)
    ),  # L 54.3, a 81, b 70: sRGB's red under LAB's white
    "LAB TIFF": lambda: opened(Image.new("LAB", (9, 9), (138, 128 + 81, 128 + 70)), "TIFF"),
}


@pytest.mark.parametrize("kind", COLOURS)
def test_colours_become_rgb(kind: str) -> None:
    red, green, blue = np.asarray(to_rgb(COLOURS[kind]()))[4, 4].tolist()
    assert red >= 247 and green <= 8 and blue <= 8  # JPEG and LAB round


def test_two_levels() -> None:
    image = Image.new("1", (4, 4), 1)
    image.putpixel((0, 0), 0)
    assert [to_rgb(image).getpixel(place) for place in ((0, 0), (1, 1))] == [BLACK, WHITE]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    content = stored(
        frames[0], kind, save_all=True, append_images=frames[1:], **{"WEBP": {"lossless": True}}.get(kind, {})
    )
    assert read_picture(content).getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "PNG", "WEBP"])
def test_orientation_is_turned_back_once(kind: str, tmp_path: Path) -> None:
    turned = Image.new("RGB", (64, 32), "black")
    turned.paste("white", (0, 0, 32, 32))
    exif = Image.Exif()
    exif[Image.ExifTags.Base.Orientation] = 6  # its left is the top
    path = tmp_path / f"a.{kind.lower()}"
    turned.save(path, kind, exif=exif)
    for image in (to_rgb(Image.open(path)), read_picture(path), read_picture(path.read_bytes())):
        assert image.size == (32, 64) and to_rgb(image).size == (32, 64)
        assert image.getpixel((16, 8))[0] > 250 and image.getpixel((16, 56))[0] < 5
    assert Problems([{"problem": "P", "image": Image.open(path)}])[0].images[0].size == (32, 64)


def test_a_plain_picture_is_not_copied() -> None:
    image = Image.new("RGB", (4, 4))
    assert to_rgb(image) is image


def test_a_row_of_a_dataset(tmp_path: Path) -> None:
    drawing().save(tmp_path / "a.png")
    message = {"role": "user", "content": [{"type": "image", "image": drawing()}, {"type": "text", "text": "Q"}]}
    images = [drawing(), tmp_path / "a.png", {"bytes": stored(drawing(), "PNG"), "path": None}]
    array = np.zeros((4, 4, 3), np.uint8)
    row = {"prompt": [{"role": "system", "content": "S"}, message], "images": [*images, array], "answer": "A"}
    changed = rgb_row(row)
    for image in (*changed["images"][:3], changed["prompt"][1]["content"][0]["image"]):
        assert_drawing(image)
    assert changed["images"][3] is array and changed["prompt"][0] == row["prompt"][0] and changed["answer"] == "A"
    assert message["content"][0]["image"].mode == "RGBA", "the caller's row stays as it is"
    assert_drawing(rgb_row({"image": drawing()})["image"])
    assert rgb_row({"prompt": "P", "image": None, "images": None}) == {"prompt": "P", "image": None, "images": None}


# -- the ways in -------------------------------------------------------------------------------------------------------


def test_training_data_and_problems(tmp_path: Path) -> None:
    names = []
    for kind in ("PNG", "GIF", "TIFF", "WEBP"):
        names.append(f"{kind}.{kind.lower()}")
        drawing().save(tmp_path / names[-1], kind, **({"lossless": True} if kind == "WEBP" else {}))
    path = tmp_path / "x.jsonl"
    path.write_text("".join(f'{{"problem": "P", "answer": "A", "images": ["{name}"]}}\n' for name in names))
    for _ in range(2):  # the second time from the cache
        data = pickle.loads(pickle.dumps(load_training_data(path)))  # as a worker of a data loader has it
        for row, problem in zip(data, Problems(path), strict=True):
            assert_drawing(row["images"][0])
            assert_drawing(problem.images[0])


@pytest.mark.parametrize("decoded", [True, False])
def test_the_trainer_is_handed_transparent_pictures(decoded: bool, tmp_path: Path) -> None:
    """As a dataset stores PIL images, and in memory."""
    given = [{**row, "images": [drawing()]} for row in rows(2)]
    features = Features({**Dataset.from_list(given).features, "images": List(ImageFeature(decode=decoded))})
    run = trainer(tmp_path, given)
    batches = [generation_batch(run, list(data)) for data in (given, Dataset.from_list(given, features=features))]
    layout = PixelLayout.of(run.processing_class.image_processor)
    for batch in batches:
        for image in layout.pictures(batch["pixel_values"], batch["image_grid_thw"]):
            assert_drawing(image)


def test_scored_responses_of_transparent_pictures(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    row = {**rows(1)[0], "images": [drawing()], "response_ids": [30, 31], "correct": True}
    (scored,) = score_responses(run.model, run.processing_class, [row])
    assert_drawing(scored.image)
