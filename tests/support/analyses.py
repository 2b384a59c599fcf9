"""A pretended analysis folder, as `vppo analyze` writes it: geometry questions, answered by no model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageDraw

from vppo_kernels import reference, topk_mask

SENTENCES = [
    "In| triangle| ABC|,| angle| A| is| 60|°| and| angle| B| is| 45|°|.",
    " The| side| AB| has| a| length| of| 12|,| so| we| can| use| the| law| of| s|ines|:",
    "\n\\frac|{|AB|}{|\\sin| C|}| =| \\frac|{|BC|}{|\\sin| A|}|\n",
    " Since| the| angles| of| a| triangle| add| up| to| 180|°|,| C| =| 180|°| -| 60|°| -| 45|°| =| 75|°|.",
    " The| red| circle| to| the| left| touches| the| line| DE| at| point| F|.",
    " Therefore| its| radius| is| half| of| 7|.|5|,| which| gives| 3|.|75|.",
    " Wait|,| the| blue| square| above| has| area| 16|,| so| each| side| is| 4|.",
    " We| need| to| find| x|,| and| the| equation| is| 2|x| +| 3| =| 11|.",
]
END = ["\n\n", "\\boxed", "{", "42", "}", "<|im_end|>"]
QUESTION = "In the figure, what is the length of side BC of the triangle? Sample {sample}."


def words(rng: np.random.Generator, length: int) -> list[str]:
    """A response of so many tokens."""
    found: list[str] = []
    while len(found) < length:
        found += SENTENCES[rng.integers(len(SENTENCES))].split("|")
    return [*found[: max(0, length - len(END))], *END][-length:]


def looks(text: str) -> float:
    """How much a token is made to depend on the image, as a power of ten."""
    word = text.strip()
    if word.isdigit() or word in ("red", "blue", "left", "above"):
        return -0.7
    if word.isupper():
        return -1.0
    return -2.0 if word.isalpha() else -3.5


def picture(rng: np.random.Generator, size: tuple[int, int] = (280, 210)) -> tuple[Image.Image, Image.Image]:
    """A drawing of a triangle, and the same with half of its patches black."""
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    corners = [tuple(int(c) for c in rng.uniform(0.05, 0.95, 2) * size) for _ in range(3)]
    draw.polygon(corners, outline="navy", width=3)
    for name, corner in zip("ABC", corners, strict=True):
        draw.text(corner, name, fill="black")
    pixels = np.asarray(image).copy()
    dropped = rng.random((size[1] // 14, size[0] // 14)) < 0.5
    pixels[np.kron(dropped, np.ones((14, 14), dtype=bool))] = 0
    return image, Image.fromarray(pixels)


def write_analysis(
    out: Path,
    *,
    samples: int = 12,
    length: int = 60,
    responses: int = 1,
    models: Sequence[str] = ("tiny",),
    draws: int = 4,
    seed: int = 0,
    keep_ratio: float = 0.4,
    judged: bool = True,
    replace: dict[int, tuple[str, list[str]]] | None = None,
    pictures: bool = True,
    photograph: tuple[int, int] = (280, 210),
) -> Path:
    """Writes the files that the engine writes, but no page.

    Args:
        out: The folder.
        samples, length, responses, models, draws: How much; lengths vary by a third around `length`.
        seed: Of everything.
        keep_ratio: Of the kept sets.
        judged: Whether responses were compared with a reference answer.
        replace: Sample to its question and its response's tokens, instead of invented ones.
        pictures: Whether to write the images.
        photograph: Their size.
    """
    rng = np.random.default_rng(seed)
    out.mkdir(parents=True, exist_ok=True)
    keys = [(m, s, r) for m in models for s in range(samples) for r in range(responses)]
    questions = {s: QUESTION.format(sample=s) for s in range(samples)}
    texts: list[list[str]] = []
    for _, sample, _ in keys:
        texts.append(words(rng, int(length * rng.uniform(0.67, 1.33))))
        if replace and sample in replace:
            questions[sample], texts[-1] = replace[sample]
    lengths = np.array([len(text) for text in texts])
    flat = [token for text in texts for token in text]
    ids = {text: place for place, text in enumerate(sorted(set(flat)))}
    n = len(flat)

    level = np.array([looks(token) for token in flat]) + np.repeat(rng.normal(0, 0.15, len(keys)), lengths)
    true = level + rng.normal(0, 0.9, n)
    kl_draws = np.minimum(10 ** (true[:, None] + rng.normal(0, 0.3, (n, draws))), 12.0)
    kl_draws[rng.random(n) < 0.05] *= 1e-6
    kl_draws[rng.random(n) < 0.02] = 0.0
    gap = rng.normal(0, np.sqrt(2 * kl_draws)) - kl_draws
    k3_draws = np.clip(np.exp(np.clip(gap, -20, 20)) - np.clip(gap, -20, 20) - 1, 0, 10)
    kl, k3 = kl_draws.mean(1), k3_draws.mean(1)
    entropy = 10 ** (0.25 * true + rng.normal(-0.8, 0.6, n))
    logprob = -entropy * rng.exponential(1, n)
    tokens = pd.DataFrame(
        {
            "model": np.repeat([m for m, _, _ in keys], lengths),
            "sample": np.repeat([s for _, s, _ in keys], lengths).astype(np.int32),
            "response": np.repeat([r for _, _, r in keys], lengths).astype(np.int32),
            "position": np.concatenate([np.arange(k) for k in lengths]).astype(np.int32),
            "token_id": np.array([ids[token] for token in flat], dtype=np.int32),
            "text": flat,
            "dependency": kl,
            "dependency_se": kl_draws.std(1, ddof=1) / np.sqrt(draws) if draws > 1 else np.full(n, np.nan),
            "kl": kl,
            "reverse_kl": kl * 10 ** rng.normal(0, 0.1, n),
            "jsd": np.minimum(kl / 8 * 10 ** rng.normal(0, 0.05, n), np.log(2)),
            "k3": k3,
            "kl_first": kl_draws[:, 0],
            "k3_first": k3_draws[:, 0],
            "logprob": logprob,
            "logprob_perturbed": logprob + gap.mean(1),
            "entropy": entropy,
            "entropy_perturbed": entropy * 10 ** rng.normal(0.05, 0.1, n),
        }
    )
    floats = tokens.columns[tokens.dtypes == np.float64]
    tokens[floats] = tokens[floats].astype(np.float32)
    starts = np.append(0, np.cumsum(lengths))
    kept, kept_k3 = (kept_by_library(tokens[c].to_numpy(), starts, keep_ratio) for c in ("dependency", "k3"))
    tokens.insert(6, "kept", kept)
    parts = [slice(a, b) for a, b in pairwise(starts)]
    correct = rng.random(len(keys)) < 0.6
    trajectories = pd.DataFrame(
        {
            "model": [m for m, _, _ in keys],
            "sample": np.array([s for _, s, _ in keys], dtype=np.int32),
            "response": np.array([r for _, _, r in keys], dtype=np.int32),
            "question": [questions[s] for _, s, _ in keys],
            "answer": [str(s) if judged else None for _, s, _ in keys],
            "text": ["".join(text) for text in texts],
            "correct": correct if judged else [None] * len(keys),
            "tokens": lengths.astype(np.int32),
            "mean_dependency": [np.float32(tokens["dependency"].to_numpy(np.float64)[part].mean()) for part in parts],
            "mean_kl": [np.float32(tokens["kl"].to_numpy(np.float64)[part].mean()) for part in parts],
            "mean_k3": [np.float32(tokens["k3"].to_numpy(np.float64)[part].mean()) for part in parts],
            "kept_overlap_k3": [np.float32((kept & kept_k3)[part].sum() / kept[part].sum()) for part in parts],
            "image": [f"images/{s}.png" for _, s, _ in keys],
            "perturbed_image": [f"images/{s}-perturbed.png" for _, s, _ in keys],
            "truncated": rng.random(len(keys)) < 0.1,
        }
    )
    tokens.to_parquet(out / "tokens.parquet", index=False)
    trajectories.to_parquet(out / "trajectories.parquet", index=False)
    summary: dict[str, Any] = {
        "model": list(models) if len(models) > 1 else models[0],
        "data": "geometry.jsonl",
        "perturbation": "patch",
        "draws": draws,
        "divergence": "kl",
        "keep_ratio": keep_ratio,
        "seed": seed,
        "seconds": 12.5,
        "versions": {"torch": torch.__version__},
        "skipped": [{"sample": samples, "reason": "images/missing.png: does not exist"}],
    }
    (out / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    if pictures:
        (out / "images").mkdir(exist_ok=True)
        for sample in range(samples):
            for name, image in zip(("", "-perturbed"), picture(rng, photograph), strict=True):
                image.save(out / "images" / f"{sample}{name}.png")
    return out


def kept_by_library(values: np.ndarray, starts: np.ndarray, keep_ratio: float) -> np.ndarray:
    """Kept sets of packed responses, one response at a time."""
    kept = [
        topk_mask(torch.from_numpy(values[None, a:b].copy()), torch.ones(1, b - a, dtype=torch.bool), keep_ratio)[0]
        for a, b in pairwise(starts)
    ]
    return torch.cat(kept).numpy()


def kept_by_definition(values: np.ndarray, keep_ratio: float) -> np.ndarray:
    """The kept set of one response, from the reference's plain sort."""
    scores = torch.from_numpy(np.asarray(values, dtype=np.float32)[None].copy())
    return reference.topk_mask(scores, torch.ones_like(scores), keep_ratio)[0].numpy()
