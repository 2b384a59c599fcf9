"""What our HTML pages are made of: one file each that needs no network, with its figures and images inside."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup, escape
from PIL import Image

from vppo.files import write_atomic
from vppo.pages.plot import Plot
from vppo.pages.theme import THEMES, DependencyScale

NBSP = "\N{NO-BREAK SPACE}"  # between a number and its unit


def render(template: str, **context: Any) -> str:
    """A page of `templates/`; text in `context` is escaped where it is shown."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vppo.pages"),
        autoescape=True,  # questions, answers and tokens are whatever a model or a data set says
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = breakable
    environment.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return environment.get_template(template).render(themes=[asdict(theme) for theme in THEMES], **context)


def breakable(text: str) -> Markup:
    """A name that may go on in the next line behind each `_` and `/`, as text does behind a blank and a hyphen."""
    return Markup(re.sub(r"[_/]", r"\g<0><wbr>", str(escape(text))))


def write_figures(out: Path, plots: Sequence[Plot]) -> list[dict[str, Any]]:
    """Writes `out/figures/*.png`, each for a light page and, `-dark`, for a dark one, and returns them for a page."""
    charts = []
    for plot in plots:
        light, dark = (plot.png(theme) for theme in THEMES)
        write_atomic(out / "figures" / f"{plot.name}.png", light)
        write_atomic(out / "figures" / f"{plot.name}-dark.png", dark)
        charts.append(
            {
                "light": data_uri(light, "png"),
                "dark": data_uri(dark, "png"),
                "alt": plot.alt,
                "caption": plot.caption,
                "width": round(100 * plot.size[0]),
                "height": round(100 * plot.size[1]),
            }
        )
    return charts


def ticks(scale: DependencyScale) -> list[tuple[float, str]]:
    """Where the numbers below a scale's bar stand, in percent of its width, and what they say."""
    return [(percentage(scale, value), label) for value, label in scale.ticks]


def percentage(scale: DependencyScale, value: float) -> float:
    """Where a value in nats lies on the scale, in percent."""
    return round(100 * float(scale.position(np.float64(value))), 1)


def embedded(image: Image.Image, max_side: int) -> dict[str, Any]:
    """An image as a data URI: small ones pixel by pixel, photographs reduced to `max_side` pixels."""
    image = image.convert("RGB")
    small = max(image.size) <= 128
    image.thumbnail((max_side, max_side))
    file = io.BytesIO()
    if small:
        image.save(file, "PNG", optimize=True)
    else:
        image.save(file, "WEBP", quality=75)
    return {
        "uri": data_uri(file.getvalue(), "png" if small else "webp"),
        "width": image.width,
        "height": image.height,
        "small": small,
    }


def data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def duration(seconds: float) -> str:
    """A time span as a person says it: `0.72 s`, `34 s`, `1 min 12 s`, `2 h 5 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if seconds < 10:
        text = f"{seconds:.2g} s"
    elif minutes < 60:
        text = f"{minutes} min {rest} s" if minutes else f"{rest} s"
    else:
        text = f"{minutes // 60} h {minutes % 60} min"
    return text.replace(" ", NBSP)
