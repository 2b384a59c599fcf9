"""The report of a run: one HTML file that needs no network, and its pictures as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vppo.algorithms import REGISTRY
from vppo.demo.baseline import Baseline
from vppo.demo.figures import run_plots
from vppo.demo.scored import KEEP_RATIO, ScoredResponse, token_values
from vppo.demo.token_picture import token_picture
from vppo.files import write_atomic
from vppo.pages.facts import facts
from vppo.pages.page import NBSP, duration, embedded, percentage, render, ticks, write_figures
from vppo.pages.plot import nats, percent
from vppo.pages.theme import DependencyScale
from vppo.pages.token_text import is_special, visible

EXAMPLES, README_EXAMPLES = 12, 6
MAX_SIDE = 448  # pixels of an embedded photograph; strips of digits are far below
REQUIRED = (
    "algorithm",
    "divergence",
    "seed",
    "steps",
    "accuracy_before",
    "accuracy_after",
    "held_out",
    "dependency_digits",
    "dependency_other",
    "seconds_warmup",
    "seconds_train",
)
DIVERGENCES = {"kl": "exact KL", "reverse_kl": "exact reverse KL", "jsd": "exact JSD", "k3": "k3 estimate"}


def write_report(
    out: Path,
    *,
    summary: dict[str, Any],
    metrics: Sequence[dict[str, Any]],
    responses: Sequence[ScoredResponse],
    baseline: Baseline | None = None,
) -> Path:
    """Writes `out/report.html` and `out/figures/*.png`, each figure for a light page and, `-dark`, for a dark one.

    Args:
        out: Folder of the run.
        summary: What the run's `summary.json` holds; the keys of `REQUIRED`, and any others for the table.
        metrics: What the trainer logged, a dict per step with its "step"; charts without their keys are left out.
        responses: The held-out answers, scored token by token, in nats; may be empty.
        baseline: DAPO's runs, to be seen beside this one.

    Returns:
        The path of the page.

    Raises:
        ValueError: `summary` lacks a key, a row of `metrics` has no step, or the tokens, dependencies and kept flags of
            a response differ in number or hold NaN or infinity.
    """
    _check(summary, metrics, responses)
    scale = DependencyScale.of(token_values(responses))
    plots = run_plots(summary, metrics, responses, baseline)
    pictures = plots + ([token_picture(pick(responses, README_EXAMPLES), scale)] if responses else [])
    charts = write_figures(out, pictures)[: len(plots)]
    page = render(
        "report.html",
        headline=headline(summary),
        algorithm=str(summary["algorithm"]).upper(),
        facts=facts(summary),
        charts=charts,
        top=f"{scale.top:g}",
        ticks=ticks(scale),
        examples=[_example(response, scale) for response in pick(responses, EXAMPLES)],
        chosen=_chosen(responses),
        underlined=_underlined(str(summary["algorithm"])),
        keep_ratio=f"{100 * KEEP_RATIO:g}{NBSP}%",
    )
    return write_atomic(out / "report.html", page)


def headline(summary: dict[str, Any]) -> str:
    """The run in one sentence."""
    before, after = float(summary["accuracy_before"]), float(summary["accuracy_after"])
    digits, other = float(summary["dependency_digits"]), float(summary["dependency_other"])
    name = str(summary["algorithm"])
    algorithm = name.upper()
    if name in REGISTRY and REGISTRY[name].perturbs:
        algorithm += f" with the {DIVERGENCES.get(summary['divergence'], summary['divergence'])}"
    accuracy = (
        f"kept accuracy on {summary['held_out']:,} held-out questions at {percent(after)}"
        if before == after
        else f"took accuracy on {summary['held_out']:,} held-out questions from {percent(before)} to {percent(after)}"
    )
    looking = (
        f"{_ratio(digits / other)} times as much as all others: {nats(digits)} against {nats(other)}{NBSP}nats"
        if other > 0 and digits > other
        else f"by {nats(digits)}{NBSP}nats, all others by {nats(other)}{NBSP}nats"
    )
    return (
        f"{summary['steps']} steps of {algorithm} {accuracy} in {duration(float(summary['seconds_train']))}, after "
        f"{duration(float(summary['seconds_warmup']))} of warm-up (seed{NBSP}{summary['seed']}); tokens that name a "
        f"digit read from the image depend on it {looking}.{_work(summary.get('head_products'))}"
    )


def _work(products: dict[str, float] | None) -> str:
    """What the head did, as a sentence; nothing where it was not counted."""
    if not products or not products["tokens"]:
        return ""
    made = products["forward"] + products["backward"]
    scoring = products["scoring"]
    measuring = (
        f", and {percent(scoring / (made + products['left_out']))} more to measure dependency" if scoring else ""
    )
    return (
        f" {percent(products['active'] / products['tokens'])} of the sampled tokens carried gradient: the head made "
        f"{percent(made / (made + products['left_out']))} of the products that training on all of them "
        f"takes{measuring}."
    )


def pick(responses: Sequence[ScoredResponse], count: int) -> list[ScoredResponse]:
    """The first `count` responses, the last of them replaced by later wrong ones until a quarter is wrong."""
    wrong = [index for index, response in enumerate(responses) if not response.correct][: count // 4]
    others = [index for index in range(len(responses)) if index not in wrong][: count - len(wrong)]
    return [responses[index] for index in sorted(wrong + others)]


def _check(summary: dict[str, Any], metrics: Sequence[dict[str, Any]], responses: Sequence[ScoredResponse]) -> None:
    missing = [key for key in REQUIRED if summary.get(key) is None]
    if missing:
        raise ValueError(f"summary: has no {', '.join(missing)}; takes all of {', '.join(REQUIRED)}")
    for index, row in enumerate(metrics):
        if not isinstance(row.get("step"), int | float):
            raise ValueError(f"metrics: row {index} has step {row.get('step')!r}, takes a number")
    for index, response in enumerate(responses):
        sizes = len(response.tokens), len(response.dependency), len(response.kept)
        if len(set(sizes)) != 1:
            raise ValueError(f"responses: row {index} has %d tokens, %d dependencies and %d kept flags" % sizes)
        if not np.isfinite(response.dependency).all():
            raise ValueError(f"responses: row {index} has a dependency that is not finite")


def _example(response: ScoredResponse, scale: DependencyScale) -> dict[str, Any]:
    values, kept = response.dependency.tolist(), response.kept.tolist()
    places = [percentage(scale, value) for value in values]
    return {
        "image": embedded(response.image, MAX_SIDE),
        "perturbed": embedded(response.perturbed_image, MAX_SIDE),
        "question": response.question,
        "answer": response.answer,
        "correct": response.correct,
        "mean": nats(float(np.mean(values))) if values else None,
        "chips": list(map(_chip, response.tokens, values, kept, places)),
    }


def _chip(token: str, value: float, kept: bool, place: float) -> dict[str, Any]:
    classes = {"kept": kept, "special": is_special(token), "newline": token.endswith("\n")}
    return {
        "text": visible(token),
        "tip": f"{nats(value)} nats, {'kept' if kept else 'filtered out'}",
        "place": place,
        "classes": " ".join(["token", *(name for name, holds in classes.items() if holds)]),
    }


def _chosen(responses: Sequence[ScoredResponse]) -> str:
    """Which of the answers the page shows."""
    shown = pick(responses, EXAMPLES)
    leading = next((i for i, (a, b) in enumerate(zip(shown, responses, strict=False)) if a is not b), len(shown))
    wrong = len(shown) - leading
    if len(shown) == len(responses):
        return f"All {len(responses)} held-out answers."
    first = f"The first {leading} of {len(responses):,} held-out answers"
    return f"{first}, then the next {wrong} that {'is' if wrong == 1 else 'are'} wrong." if wrong else f"{first}."


def _underlined(algorithm: str) -> str:
    """Which tokens are marked; a run that did not filter by dependency has not trained on them."""
    one = REGISTRY.get(algorithm)
    if one is not None and one.filters and one.perturbs:
        return "those that gradient filtering keeps"
    return "those that filtering by dependency would keep, by which this run was not trained"


def _ratio(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:,.0f}"
