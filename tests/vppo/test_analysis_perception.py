"""The numbers behind the figures, each recomputed from the parquet files in another way."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from support.analyses import kept_by_definition, write_analysis

from vppo.analysis import perception
from vppo.analysis.perception import FLOOR, Run, runs_of, summarise


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_analysis(tmp_path_factory.mktemp("analysis"), samples=15, length=50, responses=3, models=("a", "b"))


@pytest.fixture(scope="module")
def tables(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Model "a" alone, as the files have it."""
    tokens, trajectories = (pd.read_parquet(folder / f"{name}.parquet") for name in ("tokens", "trajectories"))
    return tokens[tokens["model"] == "a"], trajectories[trajectories["model"] == "a"]


@pytest.fixture(scope="module")
def numbers(folder: Path) -> dict[str, Any]:
    tokens, trajectories = (pd.read_parquet(folder / f"{name}.parquet") for name in ("tokens", "trajectories"))
    return summarise(tokens.sample(frac=1, random_state=0), trajectories, keep_ratio=0.4, draws=4)["a"]


def test_distributions(tables: tuple[pd.DataFrame, pd.DataFrame], numbers: dict[str, Any]) -> None:
    tokens, trajectories = tables
    for values, found in [
        (tokens["dependency"], numbers["token_dependency"]),
        (trajectories["mean_dependency"], numbers["trajectory_dependency"]),
    ]:
        exact = values.astype(float)
        expected = {
            "count": len(exact),
            "mean": exact.mean(),
            "median": exact.median(),
            "q90": exact.quantile(0.9),
            "q99": exact.quantile(0.99),
            "largest": exact.max(),
            "at_floor": (exact <= FLOOR).mean(),
        }
        assert found == pytest.approx(expected)
    assert 0 < numbers["token_dependency"]["at_floor"] < 0.2
    assert numbers["accuracy"] == pytest.approx(trajectories["correct"].mean())
    assert (numbers["responses"], numbers["questions"]) == (45, 15)


def test_density_integrates_to_the_share_above_the_floor(tables: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    values = tables[0]["dependency"].to_numpy(dtype=np.float64)
    x, density = perception.log_density(values)
    assert np.trapezoid(density, x) == pytest.approx((values > FLOOR).mean(), rel=1e-3)
    logs = np.log10(values[values > FLOOR])
    for place in (-4.0, -2.0, -0.5):  # the sum of one Gaussian a value
        expected = np.exp(-0.5 * ((place - logs) / 0.12) ** 2).sum() / (0.12 * math.sqrt(2 * math.pi) * values.size)
        assert np.interp(place, x, density) == pytest.approx(expected, rel=0.02)


def test_kept_sets_are_the_definitions(tables: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    tokens = tables[0].reset_index(drop=True)
    tokens.loc[tokens["sample"] == 3, "k3"] = np.float32(10)  # at its clamp all are equal, and the earlier win
    for column, ratio in [("kl", 0.4), ("k3", 0.4), ("entropy", 0.07)]:
        found = perception.kept_set(tokens, column, ratio)
        for _, rows in tokens.groupby(["sample", "response"]):
            expected = kept_by_definition(rows[column].to_numpy(), ratio)
            assert found[rows.index].tolist() == expected.tolist()
    assert np.array_equal(perception.kept_set(tokens, "dependency", 0.4), tokens["kept"])


def test_overlaps(tables: tuple[pd.DataFrame, pd.DataFrame], numbers: dict[str, Any]) -> None:
    tokens, trajectories = tables
    groups = [rows for _, rows in tokens.groupby(["sample", "response"])]
    kept = {c: [kept_by_definition(rows[c].to_numpy(), 0.4) for rows in groups] for c in perception.COMPARED}
    pairs = [(a, b) for i, a in enumerate(perception.COMPARED) for b in perception.COMPARED[i + 1 :]]
    for a, b in pairs:
        expected = np.mean([(x & y).sum() / x.sum() for x, y in zip(kept[a], kept[b], strict=True)])
        assert numbers["overlap"][f"{a}, {b}"] == pytest.approx(expected)
    assert numbers["overlap"]["kl, k3"] == pytest.approx(trajectories["kept_overlap_k3"].astype(float).mean())
    chance = np.mean([math.ceil(0.4 * len(rows)) / len(rows) for rows in groups])
    assert numbers["overlap"]["by chance"] == pytest.approx(chance)


def test_lorenz_and_gini(tables: tuple[pd.DataFrame, pd.DataFrame], numbers: dict[str, Any]) -> None:
    values = tables[0]["dependency"].astype(float)
    for share, found in numbers["share_of_top"].items():
        assert found == pytest.approx(values.nlargest(math.ceil(float(share) * len(values))).sum() / values.sum())
    ascending = np.sort(values)
    n = len(ascending)
    gini = 2 * (np.arange(1, n + 1) * ascending).sum() / (n * ascending.sum()) - (n + 1) / n
    assert numbers["gini"] == pytest.approx(gini)
    assert perception.gini(np.ones(10)) == pytest.approx(0, abs=1e-12)
    assert perception.share_of_top(np.zeros(10), 0.2) == pytest.approx(0.2)  # nothing to share is shared evenly


def test_by_relative_position(tables: tuple[pd.DataFrame, pd.DataFrame], numbers: dict[str, Any]) -> None:
    bins: dict[int, list[float]] = {}
    for _, rows in tables[0].groupby(["sample", "response"]):
        for position, value in zip(rows["position"], rows["dependency"], strict=True):
            bins.setdefault(int((position + 0.5) * 20 // len(rows)), []).append(float(value))
    expected = {f"{(place + 0.5) / 20:g}": np.mean(bins[place]) for place in range(20)}
    assert numbers["by_relative_position"] == pytest.approx(expected)
    table = perception.by_relative_position(tables[0])
    assert table["tokens"].sum() == len(tables[0])
    short = perception.by_relative_position(tables[0].groupby(["sample", "response"]).head(2))
    assert short.index.tolist() == [0.275, 0.775]  # two tokens stand in the middles of the two halves
    assert table["median"].tolist() == pytest.approx([np.median(bins[place]) for place in range(20)])
    assert table["q90"].tolist() == pytest.approx([np.quantile(bins[place], 0.9) for place in range(20)])


def test_by_position(tables: tuple[pd.DataFrame, pd.DataFrame], numbers: dict[str, Any]) -> None:
    tokens = tables[0]
    longest = int(tokens["position"].max()) + 1
    expected, first, last = {}, 1, 1
    while first <= longest:
        expected[str(first)] = (
            tokens["dependency"][tokens["position"].between(first - 1, last - 1)].astype(float).mean()
        )
        first, last = last + 1, 2 * last
    assert numbers["by_position"] == pytest.approx(expected)


def test_correct_against_wrong(tables: tuple[pd.DataFrame, pd.DataFrame], numbers: dict[str, Any]) -> None:
    rows = tables[1].assign(mean=tables[1]["mean_dependency"].astype(float))
    right, wrong = rows[rows["correct"]], rows[~rows["correct"]]
    found = numbers["correct_against_wrong"]
    assert (found["correct"], found["wrong"]) == (len(right), len(wrong))
    assert found["difference"] == pytest.approx(right["mean"].mean() - wrong["mean"].mean())
    wins = right["mean"].to_numpy()[:, None] - wrong["mean"].to_numpy()
    assert found["auc"] == pytest.approx(((wins > 0) + 0.5 * (wins == 0)).mean())
    gaps = [
        group["mean"][group["correct"]].mean() - group["mean"][~group["correct"]].mean()
        for _, group in rows.groupby("sample")
        if group["correct"].nunique() == 2
    ]
    assert (found["questions"], found["within"]) == (len(gaps), pytest.approx(np.mean(gaps)))
    assert (found["tokens_correct"], found["tokens_wrong"]) == pytest.approx(
        (right["tokens"].mean(), wrong["tokens"].mean())
    )
    # a bootstrap of our own, whole questions drawn with replacement
    rng, questions, differences = np.random.default_rng(7), [q for _, q in rows.groupby("sample")], []
    values = [(q["mean"].to_numpy(), q["correct"].to_numpy(dtype=bool)) for q in questions]
    for _ in range(2000):
        drawn = [values[place] for place in rng.integers(len(values), size=len(values))]
        means, right_ones = (np.concatenate(column) for column in zip(*drawn, strict=True))
        differences.append(means[right_ones].mean() - means[~right_ones].mean())
    spread = np.ptp(np.quantile(differences, [0.025, 0.975]))
    assert found["high"] - found["low"] == pytest.approx(spread, rel=0.15)
    assert found["low"] < found["difference"] < found["high"]


def test_unjudged_responses_are_left_out(tables: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    rows = tables[1].reset_index(drop=True)
    some = rows.assign(correct=rows["correct"].astype("boolean").where(rows.index >= 9))
    found, expected = perception.correctness(some), perception.correctness(rows[9:])
    assert found == expected and found is not None
    assert perception.correctness(rows.assign(correct=True)) is None
    assert perception.correctness(rows.assign(correct=pd.array([None] * len(rows), "boolean"))) is None


def test_entropy(tables: tuple[pd.DataFrame, pd.DataFrame], numbers: dict[str, Any]) -> None:
    tokens = tables[0]
    expected = tokens[["entropy", "dependency"]].astype(float).corr(method="spearman").iloc[0, 1]
    assert numbers["entropy"]["rank_correlation"] == pytest.approx(expected)
    held = sum(
        rows["dependency"].astype(float)[kept_by_definition(rows["entropy"].to_numpy(), 0.4)].sum()
        for _, rows in tokens.groupby(["sample", "response"])
    )
    assert numbers["entropy"]["dependency_held"] == pytest.approx(held / tokens["dependency"].astype(float).sum())
    tenths = np.array_split(tokens.sort_values("entropy", kind="stable")["dependency"].astype(float), 10)
    found = perception.by_entropy(tokens)["mean"].to_numpy()
    assert found == pytest.approx([tenth.mean() for tenth in tenths], rel=0.2)  # tenths differ by a token at their ends
    assert perception.by_entropy(tokens)["tokens"].sum() == len(tokens)


def test_token_types_and_top_tokens(tables: tuple[pd.DataFrame, pd.DataFrame], numbers: dict[str, Any]) -> None:
    tokens = tables[0].assign(dependency=tables[0]["dependency"].astype(float))
    total = tokens["dependency"].sum()
    types = numbers["token_types"]
    assert sum(kind["tokens"] for kind in types.values()) == len(tokens)
    digits = tokens[tokens["text"].str.strip().str.isdigit()]
    extra = tokens[tokens["text"].isin([" half"])]
    counted = pd.concat([digits, extra])
    assert types["numbers"] == pytest.approx(
        {
            "tokens": len(counted),
            "share": len(counted) / len(tokens),
            "mean": counted["dependency"].mean(),
            "held": counted["dependency"].sum() / total,
            "kept": counted["kept"].mean(),
        }
    )
    by_text = tokens.groupby(tokens["text"].str.strip())["dependency"].agg(["size", "mean"])
    expected = by_text[by_text["size"] >= 10].drop("", errors="ignore").nlargest(12, "mean")
    found = [row for row in numbers["top_tokens"] if row["text"].strip()]
    assert [row["text"] for row in found] == expected.index.tolist()
    assert [row["mean"] for row in found] == pytest.approx(expected["mean"].tolist())
    assert perception.top_tokens(tokens, at_least=10**6).empty


def test_one_draw(tables: tuple[pd.DataFrame, pd.DataFrame], numbers: dict[str, Any]) -> None:
    tokens = tables[0]
    mean = tokens["dependency"].astype(float)
    relative = (2 * tokens["dependency_se"].astype(float) / mean)[mean > FLOOR]  # the root of four draws
    found = numbers["one_draw"]
    assert found["median_relative_error_kept"] == pytest.approx(relative[tokens["kept"]].median())
    assert found["median_relative_error_other"] == pytest.approx(relative[~tokens["kept"]].median())
    groups = [rows for _, rows in tokens.groupby(["sample", "response"])]
    for name, first, second in [
        ("overlap_kl", "kl_first", "kl"),
        ("overlap_k3", "k3_first", "k3"),
        ("overlap_k3_kl", "k3_first", "kl"),
    ]:
        sets = [[kept_by_definition(rows[column].to_numpy(), 0.4) for column in (first, second)] for rows in groups]
        assert found[name] == pytest.approx(np.mean([(a & b).sum() / a.sum() for a, b in sets]))
    assert perception.one_draw(tokens, 0.4, 1) is None


def test_models_are_kept_apart_and_everything_is_json(folder: Path) -> None:
    tokens, trajectories = (pd.read_parquet(folder / f"{name}.parquet") for name in ("tokens", "trajectories"))
    both = summarise(tokens, trajectories, draws=4)
    assert list(both) == ["a", "b"]
    assert both["a"] != both["b"]
    assert json.loads(json.dumps(both, allow_nan=False)) == both
    one = tokens["model"] == "b"
    assert summarise(tokens[one], trajectories[trajectories["model"] == "b"], draws=4)["b"] == both["b"]


def test_rows_may_stand_in_any_order(folder: Path) -> None:
    tokens, trajectories = (pd.read_parquet(folder / f"{name}.parquet") for name in ("tokens", "trajectories"))
    run, shuffled = (runs_of(one, trajectories)[0] for one in (tokens, tokens.sample(frac=1, random_state=1)))
    pd.testing.assert_frame_equal(run.tokens, shuffled.tokens)


def test_a_single_token_without_dependency_has_numbers(folder: Path) -> None:
    tokens, trajectories = (pd.read_parquet(folder / f"{name}.parquet") for name in ("tokens", "trajectories"))
    numeric = tokens.select_dtypes("float32").columns
    (run,) = runs_of(tokens[:1].assign(**dict.fromkeys(numeric, np.float32(0))), trajectories[:1])
    found = perception.summarise_run(Run("one", run.tokens, run.trajectories.assign(mean_dependency=0.0)))
    assert json.dumps(found, allow_nan=False)
    assert found["entropy"] == {"rank_correlation": None, "dependency_held": None}
    assert found["overlap"]["kl, k3"] == 1.0
    assert found["correct_against_wrong"] is None and found["one_draw"] is None
