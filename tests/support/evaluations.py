"""Stored answers of an evaluation that no model gave, and published sets of a few questions, laid out as on the hub."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rich.console import Console

from vppo.data import INSTRUCTION
from vppo.evaluation.benchmarks import PAPO, PUBLISHED_SETS, VPPO
from vppo.evaluation.options import EvaluationOptions
from vppo.evaluation.run import Evaluation, grade_and_report, write_table

ANSWERS_TO = [
    ("12", "12"),
    (r"\frac{1}{2}", "0.5"),
    ("B", "B"),
    (r"5\sqrt{3}", r"\sqrt{75}"),
    ("60^\\circ", "60"),
    ("8 kg", "8"),
]
WRONG = ["13", "7", "C", r"\sqrt{2}", "61", "9"]


def store(
    out: Path,
    *,
    sets: Sequence[str] = ("geo3k", "mathverse"),
    questions: int = 12,
    samples: int = 4,
    skill: float = 0.6,
    blind: float = 0.2,
    seed: int = 0,
    graders: Sequence[str] = ("math-verify",),
    subjects: bool = True,
    model: str = "some/model",
) -> Evaluation:
    """A finished evaluation of stored answers, each right with the chance `skill`, or `blind` where nothing is seen."""
    rng = np.random.default_rng(seed)
    asked: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []
    for name in sets:
        for question in range(questions):
            reference, right = ANSWERS_TO[question % len(ANSWERS_TO)]
            subject = ["angles", "areas"][question % 2] if subjects else None
            place = {"benchmark": name, "question": question}
            text = f"Question {question}: what is x? A. 3 B. 4"
            asked.append({**place, "key": f"{name}{question}", "text": text, "reference": reference})
            asked[-1]["subject"] = subject
            for view, count, chance in (("seen", samples, skill), ("grey", 1, blind)):
                for sample in range(count):
                    correct = rng.random() < chance
                    written = right if correct else WRONG[question % len(WRONG)]
                    boxed = rf"\boxed{{{written}}}" if rng.random() < 0.95 else "no idea"
                    measured = view == "seen" and question < 6
                    answers.append(
                        {
                            **place,
                            "view": view,
                            "sample": sample,
                            "subject": subject,
                            "text": f"<think> so </think> {boxed}",
                            "tokens": int(rng.integers(20, 400)),
                            "ended": bool(rng.random() < 0.95),
                            "dependency": float(rng.exponential(0.1)) if measured else None,
                        }
                    )
    out.mkdir(parents=True, exist_ok=True)
    write_table(out / "questions.parquet", pd.DataFrame(asked))
    knobs = EvaluationOptions(samples=samples, graders=tuple(graders)).knobs()
    about = {
        "model": model,
        "sampler": "transformers",
        "device": "cpu",
        "knobs": knobs,
        "sets": {name: PUBLISHED_SETS[name].label for name in sets},
        "skipped": [],
        "warnings": [],
        "seconds_sampling": 12.5,
        "machine": "none",
        "versions": {},
    }
    return grade_and_report(out, pd.DataFrame(asked), pd.DataFrame(answers), about, Console(quiet=True))


def picture(seed: int, size: tuple[int, int] = (56, 28)) -> bytes:
    """A PNG of random pixels."""
    content = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def rows_of(stem: str, count: int) -> list[dict[str, Any]]:
    """Rows as both repositories have them: a user's message with the instruction in it, and the answer."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"<image>What is {i} + 1? {INSTRUCTION}"},
                {"role": "assistant", "content": str(i + 1)},
            ],
            "images": [f"./data/images/{stem}/{i}.png"],
        }
        for i in range(count)
    ]


def publish(root: Path, counts: dict[str, int], rows: dict[str, list[dict[str, Any]]] | None = None) -> Path:
    """Copies of the hub's repositories under `root`, with `counts` questions of the sets that are named.

    Args:
        root: A folder.
        counts: Questions of each set.
        rows: Of some sets, other rows than `rows_of`.
    """
    for name, count in counts.items():
        entry = PUBLISHED_SETS[name]
        folder = root / entry.repo
        stem = Path(entry.pictures.rstrip("/")).stem.removesuffix("_images")
        own = (rows or {}).get(name, rows_of(stem, count))
        file = folder / entry.rows.replace("-*", "-00000-of-00001")
        file.parent.mkdir(parents=True, exist_ok=True)
        if entry.repo == PAPO:
            table = [{"id": str(i), **row} for i, row in enumerate(own)]
            pq.write_table(pa.Table.from_pylist(table), file)
            with zipfile.ZipFile(folder / entry.pictures, "w") as archive:
                for i in range(count):
                    archive.writestr(f"{stem}/{i}.png", picture(i))
        else:
            assert entry.repo == VPPO
            file.write_text(json.dumps(own), encoding="utf-8")
            (folder / entry.pictures).mkdir(parents=True)
            for i in range(count):
                (folder / entry.pictures / f"{i}.png").write_bytes(picture(i))
    return root
