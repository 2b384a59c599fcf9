"""The same question without anything to look at."""

from __future__ import annotations

from PIL import Image

from vppo.data import Problem

GREY = (128, 128, 128)


def blinded(problem: Problem, how: str) -> Problem:
    """A problem whose images show nothing.

    Args:
        problem: With images or without.
        how: "grey": each image is one grey of the same size, so that the prompt stays as long. "removed": there is no
            image, and no place for one.
    """
    if how == "grey":
        return Problem(problem.prompt, [Image.new("RGB", image.size, GREY) for image in problem.images], problem.answer)
    prompt = []
    for message in problem.prompt:
        content = message["content"]
        if isinstance(content, list):
            message = {**message, "content": [part for part in content if part["type"] != "image"]}
        prompt.append(message)
    return Problem(prompt, [], problem.answer)
