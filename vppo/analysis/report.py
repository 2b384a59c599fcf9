"""The page of an analysis: summary, figures, and a browser of its responses, in one file that needs no network."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image, UnidentifiedImageError

from vppo.analysis.figures import perception_plots
from vppo.analysis.folder import AnalysisFolder, read_analysis
from vppo.analysis.perception import ESTIMATORS, response_starts, summarise_run
from vppo.analysis.pictures import picture_paths
from vppo.files import write_atomic
from vppo.pages.facts import facts
from vppo.pages.page import NBSP, embedded, render, ticks, write_figures
from vppo.pages.plot import nats, percent
from vppo.pages.theme import DependencyScale
from vppo.pages.token_text import is_special, visible

SIDES = (448, 336, 256, 192, 128)  # pixels of an embedded image: the largest with which all stay within
IMAGE_BYTES = 3_500_000
SHOWN = ("dependency_se", "logprob", "logprob_perturbed", "entropy_perturbed")  # beside the estimators, in the tooltip


def write_analysis_pages(out: Path) -> Path:
    """Writes `figures/*.png` and `report.html` from the tables and the summary of a finished analysis.

    Args:
        out: Folder that `vppo analyze` wrote; pages that it already has are written anew.

    Returns:
        The path of the page.

    Raises:
        InputError: The folder lacks a file or a column; the message names it.
    """
    folder = read_analysis(out)
    numbers = {run.label: summarise_run(run) for run in folder.runs}
    charts = write_figures(out, perception_plots(folder.runs))
    about = {k: v for k, v in folder.summary.items() if k not in ("numbers", "skipped") and v not in (None, {})}
    single = next(iter(numbers.values())) if len(numbers) == 1 else None
    page = render(
        "analysis.html",
        models=list(numbers),
        headline=headline(single, folder) if single else headline_of_several(numbers),
        facts=key_numbers(single) if single else [],
        table=[] if single else comparison_table(numbers),
        about=facts(about),
        skipped=[_skipped(row) for row in folder.summary.get("skipped", [])],
        charts=charts,
        data=_data(folder),
    )
    return write_atomic(out / "report.html", page)


def headline(numbers: Mapping[str, Any], folder: AnalysisFolder) -> str:
    """What one run showed, in a few sentences."""
    tokens, shared = numbers["token_dependency"], numbers["overlap"]
    top = f"{100 * folder.summary['keep_ratio']:g}{NBSP}%"
    text = (
        f"Half of the {tokens['count']:,} tokens depend on the image by less than {_nats(tokens['median'])}, "
        f"and the most dependent fifth holds {percent(numbers['share_of_top']['0.2'])} of all dependency. Of the top "
        f"{top} by exact KL, k3 would pick {percent(shared['kl, k3'])} and entropy {percent(shared['kl, entropy'])}; "
        f"chance, {percent(shared['by chance'])}."
    )
    outcome = numbers["correct_against_wrong"]
    if outcome is None:
        return text
    apart = "apart" if outcome["low"] > 0 or outcome["high"] < 0 else "not told apart by it"
    return (
        f"{text} Correct responses average {_nats(outcome['mean_correct'])}, wrong ones "
        f"{_nats(outcome['mean_wrong'])}: {apart} at 95{NBSP}% confidence."
    )


def headline_of_several(numbers: Mapping[str, Mapping[str, Any]]) -> str:
    """What several runs showed, in a sentence."""
    medians = {label: one["token_dependency"]["median"] for label, one in numbers.items()}
    least, most = min(medians, key=medians.__getitem__), max(medians, key=medians.__getitem__)
    shares = [one["share_of_top"]["0.2"] for one in numbers.values()]
    return (
        f"{len(numbers)} runs side by side. The median token depends least on the image in {least} "
        f"({_nats(medians[least])}) and most in {most} ({_nats(medians[most])}); the most dependent fifth "
        f"of the tokens holds {percent(min(shares))} to {percent(max(shares))} of all dependency."
    )


def key_numbers(numbers: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The numbers of a run, as labels and values."""
    rows = comparison_table({"": numbers})
    return [(label, values[0]) for label, values in rows if values[0] != "–"]  # noqa: RUF001


def comparison_table(numbers: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """A row a measure, a value a run; what a run cannot tell is a dash."""

    def row(label: str, *path: str, form: Any) -> tuple[str, list[str]]:
        values = []
        for one in numbers.values():
            value: Any = one
            for key in path:
                value = None if value is None else value[key]
            values.append("–" if value is None else form(value))  # noqa: RUF001
        return label, values

    def count(value: float) -> str:
        return f"{value:,}"

    def interval(outcome: Mapping[str, float]) -> str:
        return f"{nats(outcome['difference'])} ({nats(outcome['low'])} to {nats(outcome['high'])})"

    return [
        row("questions", "questions", form=count),
        row("responses", "responses", form=count),
        row("tokens", "token_dependency", "count", form=count),
        row("accuracy", "accuracy", form=percent),
        row("cut at the length limit", "truncated", form=percent),
        row("mean dependency", "token_dependency", "mean", form=_nats),
        row("median dependency", "token_dependency", "median", form=_nats),
        row("held by the top 10 %", "share_of_top", "0.1", form=percent),
        row("held by the top 20 %", "share_of_top", "0.2", form=percent),
        row("held by the top 40 %", "share_of_top", "0.4", form=percent),
        row("Gini coefficient", "gini", form="{:.2f}".format),
        row("correct minus wrong, nats (95 %)", "correct_against_wrong", form=interval),
        row("entropy: rank correlation", "entropy", "rank_correlation", form="{:.2f}".format),
        row("kept by exact KL and by k3", "overlap", "kl, k3", form=percent),
        row("kept by exact KL and by JSD", "overlap", "kl, jsd", form=percent),
        row("kept by exact KL and by entropy", "overlap", "kl, entropy", form=percent),
        row("kept by one draw as by the mean", "one_draw", "overlap_kl", form=percent),
    ]


def _nats(value: float) -> str:
    """A number with its unit, which no line break parts."""
    return f"{nats(value)} nats".replace(" ", NBSP)


def _skipped(row: Mapping[str, Any]) -> tuple[str, str]:
    """What was skipped and why."""
    what = ", ".join(f"{key} {value}" for key, value in row.items() if key != "reason")
    return what, str(row.get("reason", ""))


def _data(folder: AnalysisFolder) -> dict[str, Any]:
    """What the browser of responses is made of; it is read by `analysis.js`."""
    tokens = pd.concat([run.tokens for run in folder.runs], ignore_index=True)
    rows = pd.concat([run.trajectories for run in folder.runs], ignore_index=True)
    scales = {name: DependencyScale.of(tokens[name].to_numpy(dtype=np.float64)) for name in ESTIMATORS}
    words, vocabulary = pd.factorize(tokens["text"])
    questions, texts = pd.factorize(rows["question"])
    first = rows.drop_duplicates("sample")[["sample", "image", "perturbed_image"]].itertuples(index=False)
    pictures = {int(s): picture_paths(folder.path, int(s), (clean, perturbed)) for s, clean, perturbed in first}
    paths = sorted({path for pairs in pictures.values() for pair in pairs for path in pair})
    place = {path: index for index, path in enumerate(paths)}
    models = [run.label for run in folder.runs]
    packed = _packed(tokens, words)
    columns = ("model", "sample", "response", "answer", "correct", "truncated", "tokens", "mean_dependency")
    return {
        "keepRatio": folder.summary["keep_ratio"],
        "divergence": folder.summary["divergence"],
        "estimators": [
            {"name": name, "label": label, "top": scales[name].top, "ticks": ticks(scales[name])}
            for name, label in ESTIMATORS.items()
        ],
        "columns": [*ESTIMATORS, *SHOWN, "word"],
        "vocabulary": [visible(text) for text in vocabulary],
        "special": [index for index, text in enumerate(vocabulary) if is_special(text)],
        "newline": [index for index, text in enumerate(vocabulary) if text.endswith("\n")],
        "models": models,
        "questions": texts.tolist(),
        "images": _images(folder.path, paths),
        "responses": [
            {
                "model": models.index(row.model),
                "sample": int(row.sample),
                "response": int(row.response),
                "question": int(question),
                "answer": row.answer if isinstance(row.answer, str) else None,
                "correct": None if pd.isna(row.correct) else bool(row.correct),
                "truncated": bool(row.truncated),
                "mean": float(row.mean_dependency),
                "overlap": float(row.kept_overlap_k3),
                "pictures": [[place[path] for path in pair] for pair in pictures[int(row.sample)]],
                "tokens": content,
            }
            for row, question, content in zip(
                rows[[*columns, "kept_overlap_k3"]].itertuples(),
                questions,
                packed,
                strict=True,
            )
        ],
    }


def _packed(tokens: pd.DataFrame, words: np.ndarray) -> list[str]:
    """The columns of each response's tokens in base64: float32, its bytes sorted by significance, compressed.

    The estimators are exact, so that the page selects what the library selects; what is only shown keeps two digits.
    """
    table = np.empty((len(ESTIMATORS) + len(SHOWN) + 1, len(tokens)), dtype="<f4")
    for index, name in enumerate([*ESTIMATORS, *SHOWN]):
        table[index] = tokens[name].to_numpy(dtype=np.float32)
    table[-1] = words  # exact up to 2**24
    shown = table[len(ESTIMATORS) : -1].view("<u4")
    shown += np.uint32(0x8000)  # rounds to bfloat16, and the zeros that follow compress to nothing
    shown &= np.uint32(0xFFFF0000)
    starts = response_starts(tokens)
    contents = []
    for start, end in zip(starts[:-1], starts[1:], strict=True):  # noqa: RUF007
        planes = np.ascontiguousarray(table[:, start:end]).view(np.uint8).reshape(-1, 4).T
        contents.append(base64.b64encode(gzip.compress(planes.tobytes(), 6, mtime=0)).decode())
    return contents


def _images(folder: Path, paths: Sequence[str]) -> list[dict[str, Any] | None]:
    """The images for the page, so small that together they keep within `IMAGE_BYTES`; None where there is none."""
    sample = paths[:: max(1, len(paths) // 16)]
    for side in SIDES:
        sizes = [len(image["uri"]) * 3 / 4 for path in sample if (image := _image(folder / path, side))]
        if sum(sizes) / max(1, len(sizes)) * len(paths) <= IMAGE_BYTES:
            break
    return [_image(folder / path, side) for path in paths]


def _image(path: Path, side: int) -> dict[str, Any] | None:
    try:
        with Image.open(path) as image:
            return embedded(image, side)
    except (FileNotFoundError, UnidentifiedImageError):
        return None  # the page says so in its place
