"""The charts: which are drawn from which data, and what they put where."""

from __future__ import annotations

import io
import itertools
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from support.responses import SUMMARY, metrics, response, responses

from vppo.demo.baseline import Baseline
from vppo.demo.figures import (
    _interval_95,
    _smooth,
    accuracy_plot,
    answer_histogram,
    dependency_plot,
    products_plot,
    reward_plot,
    run_plots,
    shaping_plot,
    token_histogram,
)
from vppo.pages.plot import Plot, nats, percent
from vppo.pages.theme import DARK, LIGHT


def axes(plot: Plot | None) -> list[Axes]:
    """The plot's axes, drawn on a figure of their own."""
    assert plot is not None
    figure = Figure(figsize=plot.size)
    plot.draw(figure, LIGHT)
    return figure.axes


def bars(ax: Axes) -> list[tuple[float, float]]:
    """Left edge and height of each bar that is seen."""
    return [(patch.get_x(), patch.get_height()) for patch in ax.patches if patch.get_height() > 0]  # type: ignore[attr-defined]


def test_numbers_as_a_person_writes_them() -> None:
    assert [nats(value) for value in (0.0, 1.4159, 0.00312, 12.0)] == ["0", "1.42", "0.00312", "12"]
    assert nats(6.3e-7) == "6.3 \N{MULTIPLICATION SIGN} 10⁻⁷"
    assert nats(float(np.float32(1e-9))) == "1.0 \N{MULTIPLICATION SIGN} 10⁻⁹"
    assert percent(0.912) == "91.2\N{NO-BREAK SPACE}%"


def test_a_full_run_has_every_chart() -> None:
    names = [plot.name for plot in run_plots(SUMMARY, metrics(20), responses(8))]
    assert names == [
        "accuracy",
        "reward",
        "dependency_tokens",
        "dependency_answers",
        "dependency_training",
        "shaping",
    ]


def test_a_run_that_measures_no_dependency_has_no_chart_of_it() -> None:
    names = [plot.name for plot in run_plots(SUMMARY, metrics(20, dependency=False), responses(8))]
    assert names == ["accuracy", "reward", "dependency_tokens", "dependency_answers"]


def test_without_metrics_and_responses_the_accuracy_is_left() -> None:
    assert [plot.name for plot in run_plots(SUMMARY, [], [])] == ["accuracy"]


def test_pngs_are_valid_twice_the_size_and_the_same_each_time() -> None:
    plot = accuracy_plot(SUMMARY)
    light, dark = plot.png(LIGHT), plot.png(DARK)
    assert light == plot.png(LIGHT) != dark
    for png, theme in ((light, LIGHT), (dark, DARK)):
        with Image.open(io.BytesIO(png)) as image:
            assert image.format == "PNG"
            assert image.size == (1040, 640)
            assert "Software" not in image.info
            corner = image.convert("RGB").getpixel((0, 0))
            assert isinstance(corner, tuple)
            assert "#{:02x}{:02x}{:02x}".format(*corner) == theme.surface


def test_accuracy_bars_have_the_length_of_the_accuracy() -> None:
    (ax,) = axes(accuracy_plot(SUMMARY))
    assert [patch.get_width() for patch in ax.patches] == [1.0, 0.25, 1.0, 0.875]  # type: ignore[attr-defined]
    assert {percent(0.25), percent(0.875), "before", "after"} <= {text.get_text() for text in ax.texts}


@pytest.mark.parametrize(("share", "n", "low", "high"), [(0.5, 100, 0.4038, 0.5962), (0.0, 10, 0.0, 0.2775)])
def test_interval(share: float, n: int, low: float, high: float) -> None:
    assert _interval_95(share, n) == pytest.approx((low, high), abs=1e-4)


def test_smoothing_keeps_a_constant_and_the_length() -> None:
    assert _smooth(np.full(50, 0.5)).tolist() == [0.5] * 50
    assert _smooth(np.array([1.0, 2.0, 6.0])).tolist() == [1.5, 3.0, 4.0]


def test_reward_that_is_the_accuracy_is_one_curve() -> None:
    (ax,) = axes(reward_plot(metrics(20)))
    assert len(ax.lines) == 2  # as logged, and smoothed
    assert ax.get_title(loc="left") == "Accuracy of the rollouts (the reward)"


def test_accuracy_that_differs_from_the_reward_is_a_second_curve() -> None:
    (ax,) = axes(reward_plot([{**row, "accuracy": row["reward"] / 2} for row in metrics(20)]))
    assert len(ax.lines) == 4
    legend = ax.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["reward", "accuracy"]


def test_a_run_is_seen_beside_the_runs_of_dapo() -> None:
    rewards = [np.linspace(0.2, top, 20).tolist() for top in (0.4, 0.6, 0.8)]
    baseline = Baseline([0, 1, 2], [0.55, 0.75, 0.65], rewards, "a machine")
    (ax,) = axes(reward_plot(metrics(20), baseline))
    (band,) = ax.collections
    corners = band.get_paths()[0].vertices
    assert corners[:, 0].min() == 1 and corners[:, 0].max() == 20
    low, high = (_smooth(np.array(rewards[run])) for run in (0, 2))
    assert corners[:, 1].min() == pytest.approx(low[0]) and corners[:, 1].max() == pytest.approx(high[-1])
    plot = accuracy_plot(SUMMARY, baseline)
    (ax,) = axes(plot)
    edges = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in ax.patches]  # type: ignore[attr-defined]
    assert any(edge == pytest.approx((0.55, 0.75)) for edge in edges)
    assert any("55.0 to 75.0" in text.get_text() for text in ax.texts)
    assert "a machine" in plot.caption


def test_missing_values_are_left_out_of_curves() -> None:
    rows: list[dict[str, Any]] = [
        {"step": 1, "reward": 0.1},
        {"step": 2, "reward": None},
        {"step": 3, "reward": float("nan")},
        {"step": 4},
        {"step": 5, "reward": 0.5},
    ]
    (ax,) = axes(reward_plot(rows))
    assert np.asarray(ax.lines[0].get_xdata()).tolist() == [1.0, 5.0]
    assert reward_plot([{"step": 1, "reward": float("nan")}]) is None


def test_token_histogram_counts_every_token_once() -> None:
    values = [0.0, 1e-12, 1e-8, 2e-8, 1e-3, 1.0, 1.0, 9.0]
    plot = token_histogram(SUMMARY, [response(["t"] * 8, values)])
    (ax,) = axes(plot)
    heights = bars(ax)
    assert sum(height for _, height in heights) == pytest.approx(1.0)
    at_floor = [height for left, height in heights if left < -8]
    assert sum(at_floor) == pytest.approx(3 / 8)  # zero, rounding, and the floor itself, in a bin of their own
    assert ax.get_xticklabels()[0].get_text() == "≤ 10⁻⁸"
    assert plot is not None
    assert "37.5" in plot.alt
    assert {"digits 1.5", "other 0.0125"} <= {text.get_text() for text in ax.texts}


def test_token_histogram_of_zeros_has_one_bar() -> None:
    summary = {**SUMMARY, "dependency_digits": 0.0, "dependency_other": 0.0}
    (ax,) = axes(token_histogram(summary, [response(["t"] * 4, [0.0] * 4)]))
    assert bars(ax) == [(-8.8, 1.0)]
    assert not ax.texts  # a mean of zero has no place on a log axis


def test_answer_histogram_counts_every_answer_once() -> None:
    (ax,) = axes(answer_histogram([*responses(20), response([], [])]))
    assert sum(height for _, height in bars(ax)) == 20
    (ax,) = axes(answer_histogram([response(["t"], [0.0])]))
    assert sum(height for _, height in bars(ax)) == 1
    assert answer_histogram([response([], [])]) is None


def test_dependency_in_training_shows_the_quantiles_that_were_logged() -> None:
    (ax,) = axes(dependency_plot(metrics(20)))
    assert [text.get_text() for text in ax.texts] == ["median", "mean", "90 %"]
    assert ax.get_yscale() == "log"
    zeros = [{"step": step, "vppo/dependency_mean": 0.0} for step in (1, 2)]
    (ax,) = axes(dependency_plot(zeros))
    assert np.asarray(ax.lines[0].get_ydata()).tolist() == [1e-8, 1e-8]


def test_shaping_shows_what_was_logged() -> None:
    rows = metrics(20)
    assert len(axes(shaping_plot(rows))) == 2
    assert len(axes(shaping_plot([{"step": row["step"], "vppo/kept_fraction": 0.4} for row in rows]))) == 1
    assert shaping_plot(metrics(20, dependency=False)) is None


def test_a_run_of_one_step_is_drawn() -> None:
    for plot in run_plots(SUMMARY, metrics(1), responses(1)):
        assert plot.png(LIGHT).startswith(b"\x89PNG")


def test_products_fill_the_width_and_those_of_scoring_stand_apart() -> None:
    found = {"scoring": 1000, "forward": 800, "backward": 1200, "tokens": 1000, "active": 400, "left_out": 2000}
    plot = products_plot({**SUMMARY, "head_products": found})
    (ax,) = axes(plot)
    widths = [round(patch.get_width(), 6) for patch in ax.patches]  # type: ignore[attr-defined]
    assert widths == [0.2, 0.3, 0.5, 0.25]
    assert plot is not None and "1,000 sampled tokens" in plot.caption and "40.0" in plot.caption
    assert "left out 50.0" in plot.alt.replace("\N{NO-BREAK SPACE}", " ")
    assert products_plot(SUMMARY) is None


def test_what_the_products_are_called_stands_apart_however_few_they_are() -> None:
    found = {"scoring": 100, "tokens": 9, "active": 4, "forward": 0, "backward": 144, "left_out": 738}
    (ax,) = axes(products_plot({**SUMMARY, "head_products": found}))
    (figure := ax.figure).draw_without_rendering()  # type: ignore[union-attr]
    legend = ax.get_legend()
    assert legend is not None and legend.get_window_extent().x1 <= figure.bbox.x1
    texts = legend.get_texts()
    assert [text.get_text().split()[0] for text in texts] == ["forward", "backward", "left"]
    places = [text.get_window_extent() for text in texts]
    assert all(a.x1 < b.x0 for a, b in itertools.pairwise(places))


def test_products_of_nothing_are_not_drawn() -> None:
    found = ("scoring", "forward", "backward", "tokens", "active", "left_out")
    assert products_plot({**SUMMARY, "head_products": dict.fromkeys(found, 0)}) is None
