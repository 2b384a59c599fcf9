"""The figures of an analysis: what they draw is what the numbers say, for one run and for several."""

from __future__ import annotations

import io
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from support.analyses import write_analysis

from vppo.analysis import figures
from vppo.analysis.folder import read_analysis
from vppo.analysis.perception import Run, by_relative_position, correctness, lorenz, one_draw, overlaps, summarise_run
from vppo.pages.plot import Plot, nats, percent
from vppo.pages.theme import LIGHT, THEMES

NAMES = [
    *("tokens", "frequency", "responses", "correctness", "position", "distance", "lorenz", "entropy", "overlap"),
    *("types", "top_tokens", "draw_error", "draw_sets"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    folder = tmp_path_factory.mktemp("analysis")
    write_analysis(folder, samples=10, length=50, responses=2, models=("first", "second"), pictures=False)
    return read_analysis(folder).runs


def axes(plot: Plot | None) -> Axes:
    """The plot's first axes, drawn on a figure of their own."""
    assert plot is not None
    figure = Figure(figsize=plot.size)
    plot.draw(figure, LIGHT)
    return figure.axes[0]


def widths(ax: Axes) -> list[float]:
    return [patch.get_width() for patch in ax.patches]  # type: ignore[attr-defined]


def heights(ax: Axes) -> list[float]:
    return [patch.get_height() for patch in ax.patches]  # type: ignore[attr-defined]


def dots(ax: Axes) -> list[list[float]]:
    """Where the dots of each run stand along the x axis."""
    return [np.asarray(line.get_xdata()).tolist() for line in ax.lines if line.get_marker() == "o"]


@pytest.mark.parametrize("count", [1, 2])
def test_every_figure_is_drawn_in_both_appearances(runs: list[Run], count: int) -> None:
    plots = figures.perception_plots(runs[:count])
    assert [plot.name for plot in plots] == NAMES
    for plot in plots:
        assert len(plot.caption) > 20 and len(plot.alt) > 5
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pngs = [plot.png(theme) for theme in THEMES]
        for png, theme in zip(pngs, THEMES, strict=True):
            with Image.open(io.BytesIO(png)) as image:
                corner = image.convert("RGB").getpixel((0, 0))
                assert isinstance(corner, tuple)
                assert "#{:02x}{:02x}{:02x}".format(*corner) == theme.surface


def test_token_bars_hold_every_token(runs: list[Run]) -> None:
    ax = axes(figures.token_plot(runs[:1]))
    assert sum(heights(ax)) == pytest.approx(1)
    kept = sum(height for height in heights(ax)[: len(heights(ax)) // 2])
    assert kept == pytest.approx(runs[0].tokens["kept"].mean())


def test_frequencies_and_responses_are_counted_once(runs: list[Run]) -> None:
    assert sum(heights(axes(figures.frequency_plot(runs[:1])))) == pytest.approx(1)
    assert sum(heights(axes(figures.trajectory_plot(runs[:1])))) == len(runs[0].trajectories)


def test_correct_and_wrong_are_shares_of_their_own_group(runs: list[Run]) -> None:
    ax = axes(figures.correctness_plot(runs[:1]))
    for patch in ax.patches:
        assert np.asarray(patch.get_data().values).sum() == pytest.approx(1)  # type: ignore[attr-defined]
    outcome = correctness(runs[0].trajectories)
    assert outcome is not None
    shown = {text.get_text() for text in ax.texts}
    assert shown == {f"correct {nats(outcome.mean_correct)}", f"wrong {nats(outcome.mean_wrong)}"}
    several = axes(figures.correctness_plot(runs))
    outcomes = [correctness(run.trajectories) for run in runs]
    assert dots(several) == [[outcome.difference] for outcome in outcomes if outcome]


def test_curves_are_the_tables(runs: list[Run]) -> None:
    expected = [by_relative_position(run.tokens)["mean"].tolist() for run in runs]
    one, several = axes(figures.relative_position_plot(runs[:1])), axes(figures.relative_position_plot(runs))
    assert np.asarray(one.lines[1].get_ydata()).tolist() == expected[0]
    assert [np.asarray(line.get_ydata()).tolist() for line in several.lines] == expected


def test_lorenz_dots_are_the_shares(runs: list[Run]) -> None:
    ax = axes(figures.lorenz_plot(runs[:1]))
    shares = summarise_run(runs[0])["share_of_top"]
    dotted = next(line for line in ax.lines if line.get_marker() == "o")
    assert np.asarray(dotted.get_ydata()).tolist() == pytest.approx(list(shares.values()))
    x, y = lorenz(runs[0].tokens["dependency"].to_numpy())
    curve = np.asarray(ax.lines[1].get_xydata())
    assert np.interp(curve[:, 0], x, y) == pytest.approx(curve[:, 1])
    assert [text.get_text() for text in ax.texts][::-1] == [
        f"top {100 * float(share):.0f} %: {percent(value)}" for share, value in shares.items()
    ]


def test_overlap_cells_and_dots(runs: list[Run]) -> None:
    tables = [overlaps(run.tokens, 0.4) for run in runs]
    ax = axes(figures.overlap_plot(runs[:1]))
    cells = [text.get_text() for text in ax.texts]
    values = tables[0].to_numpy()
    assert cells == ["" if i == j else percent(values[i, j]) for i in range(4) for j in range(4)]
    several = axes(figures.overlap_plot(runs))
    assert dots(several) == [[table.iloc[i, j] for i in range(4) for j in range(i + 1, 4)] for table in tables]


def test_bars_of_types_tokens_and_draws(runs: list[Run]) -> None:
    numbers = summarise_run(runs[0])
    types = sorted((kind["mean"] for kind in numbers["token_types"].values()), reverse=True)
    assert widths(axes(figures.type_plot(runs[:1]))) == pytest.approx(types)
    assert widths(axes(figures.top_token_plot(runs[:1]))) == pytest.approx([t["mean"] for t in numbers["top_tokens"]])
    one = one_draw(runs[0].tokens, 0.4, 4)
    assert one is not None
    expected = [one.overlap_kl, one.overlap_k3, one.overlap_k3_kl]
    assert widths(axes(figures.draw_set_plot(runs[:1]))) == pytest.approx(expected)


def test_a_run_without_something_has_no_figure_of_it(runs: list[Run]) -> None:
    one = replace(runs[0], draws=1, trajectories=runs[0].trajectories.assign(correct=True))
    names = [plot.name for plot in figures.perception_plots([one])]
    assert names == [name for name in NAMES if name not in ("correctness", "draw_error", "draw_sets")]
    several = figures.perception_plots([one, runs[1]])  # what one run lacks, the other still shows
    assert [plot.name for plot in several] == NAMES
    assert dots(axes(figures.draw_set_plot([one, runs[1]]))) == dots(axes(figures.draw_set_plot([runs[1], one])))


def test_the_smallest_analysis_is_drawn(runs: list[Run]) -> None:
    """One token, on which nothing depends."""
    numbers = runs[0].tokens.select_dtypes("float32").columns
    nothing = replace(
        runs[0],
        tokens=runs[0].tokens[:1].assign(**dict.fromkeys(numbers, np.float32(0))),
        trajectories=runs[0].trajectories[:1].assign(mean_dependency=0.0),
    )
    for shown in ([nothing], [nothing, nothing]):
        for plot in figures.perception_plots(shown):
            assert plot.png(LIGHT).startswith(b"\x89PNG")


def test_any_text_and_label_is_drawn(runs: list[Run], tmp_path: Path) -> None:
    odd = runs[0].tokens.assign(text=["$x^$", "<script>", "\\frac{", "\x00"][:1] * len(runs[0].tokens))
    shown = [replace(runs[0], tokens=odd, label="$" + "long " * 30), replace(runs[1], tokens=odd, label="_hidden")]
    for count in (1, 2):
        for plot in figures.perception_plots(shown[:count]):
            assert plot.png(LIGHT).startswith(b"\x89PNG")
