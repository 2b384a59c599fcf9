"""One response, scored token by token: what the analysis produces and the report shows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class ScoredResponse:
    """A response and how much each of its tokens depends on the image.

    Attributes:
        image: What the model was shown.
        perturbed_image: The same picture as the perturbed view saw it.
        question: The prompt's text, as a person reads it.
        answer: The reference answer.
        correct: Whether the reward's verifier accepted the response.
        tokens: The response's tokens as text, `n` of them, special tokens included.
        dependency: `[n]` float32, the divergence of each token between the two views, in nats.
        kept: `[n]` bool, the tokens that gradient filtering keeps.
    """

    image: Image.Image
    perturbed_image: Image.Image
    question: str
    answer: str
    correct: bool
    tokens: list[str]
    dependency: np.ndarray
    kept: np.ndarray

    @property
    def text(self) -> str:
        return "".join(self.tokens)
