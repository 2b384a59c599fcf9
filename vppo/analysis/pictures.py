"""Where an analysis keeps what the model saw."""

from __future__ import annotations

from pathlib import Path


def picture_path(sample: int, number: int, *, perturbed: bool) -> str:
    """The file of one image of a sample, clean or in the first perturbed view, relative to the analysis' folder."""
    place = f"-{number}" if number else ""
    return f"images/{sample}{place}{'-perturbed' if perturbed else ''}.png"


def picture_paths(folder: Path, sample: int, first: tuple[str, str]) -> list[tuple[str, str]]:
    """All images of a sample, each in the clean and in the perturbed view.

    Args:
        folder: Of the analysis.
        sample: The row of the data.
        first: The two views of its first image, which the table of responses names.
    """
    found = [first]
    while (folder / picture_path(sample, len(found), perturbed=False)).is_file():
        clean, perturbed = (picture_path(sample, len(found), perturbed=view) for view in (False, True))
        found.append((clean, perturbed))
    return found
