"""One response, scored token by token: what the report of a run shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from vppo.analysis.tables import token_texts
from vppo.analysis.token_scores import Scoring, score_tokens
from vppo.data import Problem
from vppo.data.prompts import Prompts
from vppo.images import to_rgb
from vppo.perturbations import Perturbation, PixelLayout
from vppo.prefix_sharing import ResponsePasses

KEEP_RATIO = 0.4  # as VPPO trains
AT_ONCE = 128  # rows whose images are in memory together


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


def token_values(responses: Sequence[ScoredResponse]) -> np.ndarray:
    """The dependencies of all tokens of all responses, one after the other, in float64."""
    return np.concatenate([np.asarray(r.dependency, dtype=np.float64) for r in responses] or [np.empty(0)])


def score_responses(
    model: Any,
    processor: Any,
    rows: Sequence[dict[str, Any]],
    *,
    divergence: str = "kl",
    perturbation: Perturbation | None = None,
    keep_ratio: float = KEEP_RATIO,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[ScoredResponse]:
    """Dependency of every token of given responses on their image, with the pictures, in memory.

    Args:
        model: A vision-language model; it is left in the mode it was in.
        processor: Its processor, with a chat template.
        rows: One dict per response: "prompt" (conversational, as TRL takes it), "images" (list of PIL images, at least
            one), "response_ids" (list of token ids), "answer" (the reference answer) and "correct" (bool).
        divergence: "kl", "reverse_kl", "jsd" or "k3".
        perturbation: What the perturbed view does; None blackens half of the model's own patches.
        keep_ratio: Fraction of each response that counts as kept, in (0, 1].
        temperature: Divides the logits of both views.
        seed: Of the perturbation; row `i` is drawn from (seed, i).

    Returns:
        One `ScoredResponse` per row, in order; dependencies in nats.

    Raises:
        ValueError: A row has no image or no response token; the message names it.
    """
    for index, row in enumerate(rows):
        for name in ("images", "response_ids"):
            if not len(row.get(name) or ()):
                raise ValueError(f"rows: row {index} has an empty {name!r}, takes at least one entry")
    patch_size = PixelLayout.of(processor.image_processor).patch_size
    scoring = Scoring(perturbation or Perturbation(patch_size=patch_size), 1, divergence, keep_ratio, temperature, seed)
    passes, scored = ResponsePasses(model), []
    for start in range(0, len(rows), AT_ONCE):
        part = rows[start : start + AT_ONCE]
        problems = [Problem(row["prompt"], list(map(to_rgb, row["images"])), str(row["answer"])) for row in part]
        prompts = Prompts(processor, problems)
        ids, keys = [list(row["response_ids"]) for row in part], list(range(start, start + len(part)))
        found = score_tokens(passes, prompts, range(len(part)), ids, keys, scoring)
        for place, (row, score) in enumerate(zip(part, found, strict=True)):
            scored.append(
                ScoredResponse(
                    image=prompts.pictures(place)[0],
                    perturbed_image=prompts.pictures(place, *scoring.draw(keys[place], 0))[0],
                    question=prompts.problems[place].question,
                    answer=str(row["answer"]),
                    correct=bool(row["correct"]),
                    tokens=token_texts(processor.tokenizer, ids[place]),
                    dependency=score.dependency,
                    kept=score.kept,
                )
            )
    return scored
