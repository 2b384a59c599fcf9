"""Which tokens depend on the image: kinds, and single ones."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from vppo.analysis.figures.parts import draw_bars, draw_dots, elide, plot_of
from vppo.analysis.perception import Run, token_types, top_tokens
from vppo.pages.plot import Plot, nats, percent, prepare
from vppo.pages.theme import Theme
from vppo.pages.token_text import visible


def type_plot(runs: Sequence[Run]) -> Plot:
    """Mean dependency by kind of token."""
    tables = [token_types(run.tokens) for run in runs]
    order = _by_mean(tables)

    def draw(figure: Figure, theme: Theme) -> None:
        ax = prepare(figure.subplots(), "Kinds of token")
        if len(runs) == 1:
            notes = [f"{percent(row.held)} held by {percent(row.share)}" for row in tables[0].loc[order].itertuples()]
            draw_bars(ax, order, tables[0].loc[order, "mean"].tolist(), notes, theme)
        else:
            draw_dots(figure, ax, order, [_column(table, order, "mean") for table in tables], runs, theme)
        ax.set_xlabel("mean dependency, nats")

    caption = "Mean dependency by kind of token, judged by the token's text alone (English words, digits, LaTeX)."
    if len(runs) == 1:
        caption += " Beside each bar: the share of all dependency that the kind holds, and its share of the tokens."
    alts = [_listed([kind for kind in order if kind in table.index], table) for table in tables]
    return plot_of("types", caption, runs, alts, draw, rows=len(order))


def top_token_plot(runs: Sequence[Run]) -> Plot | None:
    """The individual tokens of highest mean dependency; None where no token occurs often enough in every run."""
    at_least, count = 10, 12
    tables = [top_tokens(run.tokens, count=10**9, at_least=at_least) for run in runs]
    shared = [text for text in tables[0].index if all(text in table.index for table in tables)]
    if not shared:
        return None
    order = _by_mean([table.loc[shared] for table in tables])[:count]
    labels = [elide(visible(text), 18) for text in order]

    def draw(figure: Figure, theme: Theme) -> None:
        ax = prepare(figure.subplots(), "Most dependent tokens")
        if len(runs) == 1:
            notes = [f"{row.tokens:,} times, kept {percent(row.kept)}" for row in tables[0].loc[order].itertuples()]
            draw_bars(ax, labels, tables[0].loc[order, "mean"].tolist(), notes, theme)
        else:
            draw_dots(figure, ax, labels, [_column(table, order, "mean") for table in tables], runs, theme)
        for label in ax.get_yticklabels():
            label.set_fontfamily("DejaVu Sans Mono")
            label.set_parse_math(False)  # a lone $ is text here
        ax.set_xlabel("mean dependency, nats")

    caption = f"The texts of highest mean dependency among those that occur at least {at_least} times"
    caption += "." if len(runs) == 1 else " in every run, by the mean of the runs."
    alts = [_listed(order, table) for table in tables]
    return plot_of("top_tokens", caption, runs, alts, draw, rows=len(order))


def _by_mean(tables: Sequence[pd.DataFrame]) -> list[str]:
    """Rows of tables by their mean over the tables, highest first."""
    means = pd.concat([table["mean"] for table in tables], axis=1).mean(axis=1)
    return means.sort_values(ascending=False, kind="stable").index.tolist()


def _listed(rows: Sequence[str], table: pd.DataFrame) -> str:
    return ", ".join(f"{elide(visible(row), 18)} {nats(float(table.loc[row, 'mean']))}" for row in rows)


def _column(table: pd.DataFrame, rows: Sequence[str], column: str) -> list[float]:
    return table[column].reindex(rows).astype(float).tolist()
