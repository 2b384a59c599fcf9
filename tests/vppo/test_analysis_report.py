"""The page of an analysis: complete, safe against what a model writes, and driven in a browser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from support.analyses import kept_by_definition, write_analysis

import vppo.pages
from vppo.analysis.folder import read_analysis
from vppo.analysis.perception import summarise_run
from vppo.analysis.pictures import picture_path
from vppo.analysis.report import _images, comparison_table, headline, write_analysis_pages

SCRIPT = "<script>document.body.dataset.attacked = 1</script>"
ATTACKS = [SCRIPT, "</script>", "<!--", "<img src=x onerror=alert(1)>", "&lt;", '" onfocus="', "\u2028", "\\u003c"]
ATTACK = (f"{SCRIPT}</script><!-- <b>bold</b> &amp;", [*ATTACKS, "<!--<script>", " so", "<|im_end|>"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An analysis of two models with its page; the answers to sample 2 attack it."""
    out = tmp_path_factory.mktemp("analysis")
    write_analysis(out, samples=6, length=40, responses=2, models=("tiny", "<b>other</b>"), replace={2: ATTACK})
    path = write_analysis_pages(out)
    assert path == out / "report.html"
    return out


@pytest.fixture(scope="module")
def tokens(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "tokens.parquet")


@pytest.fixture(scope="module")
def trajectories(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "trajectories.parquet")


@pytest.fixture
def page(folder: Path, open_page: Callable[..., Any]) -> Any:
    page = open_page(folder / "report.html")
    page.wait_for_selector("#response .tokens li.kept")
    return page


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For pages whose figures do not matter: drawing them takes seconds."""
    monkeypatch.setattr("vppo.analysis.report.perception_plots", lambda runs: [])


def options(page: Any) -> list[list[int]]:
    """Sample and response of every entry of the list, in its order."""
    shown = page.locator("#responses li > span:nth-child(2)").all_text_contents()
    return [[int(part) for part in re.fullmatch(r"sample (\d+), response (\d+)", text).groups()] for text in shown]


def values_of(tokens: pd.DataFrame, model: str, sample: int, response: int) -> pd.DataFrame:
    key = (tokens["model"] == model) & (tokens["sample"] == sample) & (tokens["response"] == response)
    return tokens[key].sort_values("position")


def kept(page: Any) -> list[bool]:
    return page.locator("#response .tokens li").evaluate_all("all => all.map(t => t.classList.contains('kept'))")


def choose(page: Any, sample: int, response: int) -> None:
    """Opens a response by a click in the list."""
    page.locator("#responses li").nth(options(page).index([sample, response])).click()
    page.wait_for_function(
        f"document.querySelector('#which').textContent.includes('sample {sample}, response {response}')"
    )
    page.wait_for_timeout(100)


def test_the_page_needs_nothing_but_itself(folder: Path) -> None:
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href|srcset)=\"(?!data:)", html)
    assert "@import" not in html and "url(" not in html
    policy = re.search(r'content="(default-src[^"]*)"', html)
    assert policy and policy[1].startswith("default-src 'none'; img-src data:;") and "http" not in policy[1]
    assert len(re.findall(r"<script", html)) == 2  # the data and the page's own
    assert all(re.search(r'alt="[^"]{10,}"', image) for image in re.findall(r"<img[^>]*>", html, re.DOTALL))
    pngs = {path.name for path in (folder / "figures").iterdir()}
    assert len(pngs) == 26 and {name.replace("-dark", "") for name in pngs} == {n for n in pngs if "-dark" not in n}


def test_what_models_and_data_write_is_shown_and_not_run(page: Any, folder: Path) -> None:
    choose(page, 2, 0)
    shown = page.locator("#response .tokens li").all_text_contents()
    assert shown[: len(ATTACKS)] == [text.replace("\u2028", "\ufffd") for text in ATTACKS]
    assert page.locator("#response .question").text_content() == ATTACK[0]
    assert page.locator("h1").text_content() == "What tiny, <b>other</b> looks at"
    assert page.evaluate("document.body.dataset.attacked") is None
    assert page.locator("#response b").count() == 1  # the reference, in bold; nothing of the attack's


def test_the_response_shown_is_that_of_the_tables(page: Any, tokens: pd.DataFrame, trajectories: pd.DataFrame) -> None:
    choose(page, 4, 1)
    rows = values_of(tokens, "tiny", 4, 1)
    assert page.locator("#response .tokens li").all_text_contents() == [t.replace("\n", "↵") for t in rows["text"]]
    assert kept(page) == rows["kept"].tolist()
    row = trajectories[(trajectories["model"] == "tiny") & (trajectories["sample"] == 4)].iloc[1]
    assert page.locator(".question").text_content() == row["question"]
    verdict = page.locator("#verdict").text_content()
    assert verdict.startswith("✓ correct, the reference is 4" if row["correct"] else "✗ wrong, the reference is 4")
    sources = page.locator("#response img").evaluate_all(
        "all => all.map(i => [i.src.slice(0, 16), i.alt, i.naturalWidth])"
    )
    assert [source[0] for source in sources] == ["data:image/webp;"] * 2
    assert sources[0][1:] == ["The image of sample 4, as the model saw it", 280]
    assert sources[1][1] == "The image of sample 4, perturbed"


def test_slider_and_switch_select_as_the_library_does(page: Any, tokens: pd.DataFrame) -> None:
    choose(page, 1, 0)
    rows = values_of(tokens, "tiny", 1, 0)
    for name in ("k3", "reverse_kl", "jsd", "entropy", "kl"):
        page.locator(f"#estimators input[value={name}]").check()
        for ratio in (1, 7, 40, 73, 100):
            page.locator("#ratio").fill(str(ratio))
            assert kept(page) == kept_by_definition(rows[name].to_numpy(), ratio / 100).tolist(), (name, ratio)
            assert page.locator("#kept").text_content() == f"{ratio}\u00a0%"
    page.locator("#ratio").fill("40")
    page.locator("#estimators input[value=k3]").check()
    chosen, reference = (kept_by_definition(rows[name].to_numpy(), 0.4) for name in ("k3", "kl"))
    values = rows["k3"].to_numpy(dtype=np.float64)
    said = page.locator("#share").text_content().replace("\u00a0", " ")
    held = f"{100 * values[chosen].sum() / values.sum():.1f} % of its k3"
    same = f"{100 * (chosen & reference).sum() / chosen.sum():.1f} % of them are kept by exact KL too"
    assert said == f"{chosen.sum()} of {len(rows)} tokens kept, which hold {held}; {same}"


@pytest.mark.usefixtures("no_figures")
def test_the_only_response_to_a_sample_has_no_number(tmp_path: Path, open_page: Callable[..., Any]) -> None:
    write_analysis(tmp_path, samples=2, length=20)
    page = open_page(write_analysis_pages(tmp_path))
    page.wait_for_selector("#response .tokens li.kept")
    assert page.locator("#responses li > span:nth-child(2)").all_text_contents() == ["sample 0", "sample 1"]
    assert page.locator("#which").text_content() == "sample 0 (1 of 2)"


@pytest.mark.usefixtures("no_figures")
def test_all_images_of_a_sample_are_shown_in_both_views(tmp_path: Path, open_page: Callable[..., Any]) -> None:
    write_analysis(tmp_path, samples=2, length=20)
    for number in (1, 2):
        for perturbed in (False, True):
            path = tmp_path / picture_path(0, number, perturbed=perturbed)
            Image.new("RGB", (140 + number, 70), "red").save(path)
    (tmp_path / picture_path(0, 2, perturbed=True)).unlink()
    page = open_page(write_analysis_pages(tmp_path))
    page.wait_for_selector("#response .tokens li.kept")
    captions = page.locator(".pictures figcaption").all_text_contents()
    assert captions == [f"{view} {i} of 3" for i in (1, 2, 3) for view in ("image", "perturbed view")]
    widths = page.locator(".pictures img").evaluate_all("all => all.map(image => image.naturalWidth)")
    assert widths == [280, 280, 141, 141, 142] and page.locator(".pictures .none").count() == 1
    assert "The image 2 of 3 of sample 0, perturbed" in page.locator(".pictures img").nth(3).get_attribute("alt")
    page.locator("#next").click()
    page.wait_for_function("document.querySelectorAll('.pictures figure').length === 2")
    assert page.locator(".pictures figcaption").all_text_contents() == ["image", "perturbed view"]


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("width", [1280, 420])
def test_the_numbers_fold_away_on_a_phone(tmp_path: Path, open_page: Callable[..., Any], width: int) -> None:
    write_analysis(tmp_path, samples=2, length=20)
    page = open_page(write_analysis_pages(tmp_path), viewport={"width": width, "height": 800})
    facts, title = page.locator(".folds dt").first, page.locator(".folds summary")
    phone = width == 420
    assert (facts.is_visible(), title.is_visible()) == (not phone, phone)
    if phone:
        title.click()
        assert facts.is_visible()


def test_no_sentence_names_a_colour_that_only_one_appearance_has() -> None:
    """On a dark page little is dark, and much is not."""
    package = Path(vppo.pages.__file__).parents[1]
    files = [*package.glob("analysis/*.py"), *package.glob("demo/*.py"), *package.glob("pages/templates/*.html")]
    for file in files:
        found = re.findall(r"\b(?:dark|light|deep|pale|bright)er\b", file.read_text(encoding="utf-8"))
        assert not found, file


@pytest.mark.usefixtures("no_figures")
def test_the_earlier_of_equal_tokens_is_kept(tmp_path: Path, open_page: Callable[..., Any]) -> None:
    write_analysis(tmp_path, samples=1, length=30)
    table = pd.read_parquet(tmp_path / "tokens.parquet")
    table.assign(k3=np.float32(10)).to_parquet(tmp_path / "tokens.parquet")
    page = open_page(write_analysis_pages(tmp_path))
    page.wait_for_selector("#response .tokens li.kept")
    page.locator("#estimators input[value=k3]").check()
    count = int(np.ceil(0.4 * len(table)))
    assert kept(page) == [True] * count + [False] * (len(table) - count)


@pytest.mark.usefixtures("no_figures")
def test_the_first_ratio_is_the_analysis_own(tmp_path: Path, open_page: Callable[..., Any]) -> None:
    """Also where it lies between two steps of the slider."""
    write_analysis(tmp_path, samples=1, length=100, keep_ratio=0.125)
    page = open_page(write_analysis_pages(tmp_path))
    page.wait_for_selector("#response .tokens li.kept")
    assert kept(page) == pd.read_parquet(tmp_path / "tokens.parquet")["kept"].tolist()
    assert page.locator("#kept").text_content() == "12.5\u00a0%"


def test_colours_follow_the_number_that_is_chosen(page: Any, tokens: pd.DataFrame) -> None:
    choose(page, 1, 0)
    rows = values_of(tokens, "tiny", 1, 0)
    read = "all => all.map(t => parseFloat(t.style.getPropertyValue('--d')))"
    for name in ("kl", "entropy"):
        page.locator(f"#estimators input[value={name}]").check()
        shares = page.locator("#response .tokens li").evaluate_all(read)
        top = float(page.locator("#response .ticks span").last.text_content().removeprefix("≥ "))
        assert shares == pytest.approx((100 * np.sqrt(np.clip(rows[name] / top, 0, 1))).tolist(), abs=0.06)
    assert (
        len(
            set(
                page.locator("#response .tokens li").evaluate_all(
                    "all => all.map(t => getComputedStyle(t).backgroundColor)"
                )
            )
        )
        > 5
    )


def test_sorting_and_filtering(page: Any, trajectories: pd.DataFrame) -> None:
    def order(rows: pd.DataFrame) -> list[list[int]]:
        return rows[["sample", "response"]].to_numpy().tolist()

    assert order(trajectories) == options(page)
    for name, expected in [
        ("most", trajectories.sort_values("mean_dependency", ascending=False, kind="stable")),
        ("least", trajectories.sort_values("mean_dependency", kind="stable")),
        ("wrong", trajectories.sort_values("correct", kind="stable")),
        ("correct", trajectories.sort_values("correct", ascending=False, kind="stable")),
        ("disagreement", trajectories.sort_values("kept_overlap_k3", kind="stable")),
        ("data", trajectories),
    ]:
        page.locator("#sort").select_option(name)
        assert options(page) == order(expected), name
        assert "(1 of 24)" in page.locator("#which").text_content()
    assert page.locator("#model").locator("option").all_text_contents() == ["all", "tiny", "<b>other</b>"]
    page.locator("#model").select_option("1")
    page.locator("#sort").select_option("most")
    other = trajectories[trajectories["model"] != "tiny"]
    assert options(page) == order(other.sort_values("mean_dependency", ascending=False, kind="stable"))
    assert page.locator("#which").text_content().startswith("<b>other</b>, sample")


def test_tooltip_by_pointer_and_by_keyboard(page: Any, tokens: pd.DataFrame) -> None:
    choose(page, 3, 0)
    rows, tip = values_of(tokens, "tiny", 3, 0), page.locator("#tip")
    tokens_shown = page.locator("#response .tokens li")

    def numbers() -> dict[str, str]:
        return dict(zip(tip.locator("dt").all_text_contents(), tip.locator("dd").all_text_contents(), strict=True))

    tokens_shown.nth(5).hover()
    assert tip.is_visible()
    row, found = rows.iloc[5], numbers()
    assert f"token 6 of {len(rows)}, {'kept' if row['kept'] else 'filtered out'}" in tip.text_content()

    def read(text: str) -> float:
        mantissa, _, power = text.partition(" \N{MULTIPLICATION SIGN} 10")
        return float(mantissa) * 10.0 ** int(power.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")) or 0)

    mean, error = found["exact KL"].split(" ± ")
    assert read(mean) == pytest.approx(row["kl"], rel=0.05)  # two digits at least
    assert read(error) == pytest.approx(row["dependency_se"], rel=0.05)
    for label, name in [
        ("reverse KL", "reverse_kl"),
        ("JSD", "jsd"),
        ("k3", "k3"),
        ("entropy", "entropy"),
        ("entropy, perturbed", "entropy_perturbed"),
        ("log-probability", "logprob"),
        ("log-probability, perturbed", "logprob_perturbed"),
    ]:
        assert read(found[label]) == pytest.approx(row[name], rel=0.05), label
    page.mouse.move(1, 1)
    assert not tip.is_visible()
    tokens_shown.first.focus()
    assert "token 1 of" in tip.text_content()
    page.keyboard.press("ArrowRight")
    assert "token 2 of" in tip.text_content() and tip.is_visible()
    assert page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "tip"
    page.keyboard.press("End")
    assert f"token {len(rows)} of" in tip.text_content()
    page.keyboard.press("Escape")
    assert not tip.is_visible()


def test_everything_is_reached_by_keyboard(page: Any) -> None:
    page.locator("#estimators input:checked").focus()
    stops = []
    for _ in range(8):
        stops.append(page.evaluate("(at => at.id || at.name || at.role || at.className)(document.activeElement)"))
        ring = "(at => getComputedStyle(at.closest('.choices label') ?? at).outlineStyle)(document.activeElement)"
        assert page.evaluate(ring) != "none", stops  # the focus is seen
        page.keyboard.press("Tab")
    assert stops[:-1] == ["estimator", "ratio", "sort", "model", "option", "next", "question"]
    assert stops[-1].startswith("token")
    page.locator("#responses li").first.focus()
    order = options(page)
    for key, place in [("ArrowDown", 1), ("ArrowDown", 2), ("ArrowUp", 1), ("End", len(order) - 1), ("Home", 0)]:
        page.keyboard.press(key)
        sample, response = order[place]
        assert (
            f"sample {sample}, response {response} ({place + 1} of {len(order)})"
            in page.locator("#which").text_content()
        )
        selected = page.locator("#responses li[aria-selected=true]")
        assert selected.count() == 1 and selected.evaluate("option => option === document.activeElement")
    page.locator("#estimators input:checked").focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.value") == "reverse_kl"


def test_previous_and_next(page: Any) -> None:
    assert page.locator("#previous").is_disabled()
    page.locator("#next").click()
    assert "(2 of 24)" in page.locator("#which").text_content()
    page.locator("#previous").click()
    assert "(1 of 24)" in page.locator("#which").text_content()
    page.locator("#responses li").last.click()
    assert page.locator("#next").is_disabled()


def test_quick_moves_end_at_the_last_response(page: Any, tokens: pd.DataFrame) -> None:
    """Unpacking takes its time; what was asked for before must not overwrite what was asked for last."""
    page.evaluate("for (let i = 0; i < 12; i++) showResponse(i)")
    page.wait_for_timeout(300)
    sample, response = options(page)[11]
    rows = values_of(tokens, "tiny", sample, response)
    assert page.locator("#response .tokens li").all_text_contents() == [t.replace("\n", "↵") for t in rows["text"]]


@pytest.mark.parametrize("width", [1280, 420])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_appearances_at_two_widths(folder: Path, open_page: Callable[..., Any], scheme: str, width: int) -> None:
    page = open_page(folder / "report.html", color_scheme=scheme, viewport={"width": width, "height": 800})
    page.wait_for_selector("#response .tokens li.kept")
    assert page.evaluate("document.documentElement.scrollWidth") == width  # nothing sticks out
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert colour == {"light": "rgb(247, 245, 241)", "dark": "rgb(18, 20, 23)"}[scheme]
    chart = page.locator(".chart img").first
    light = chart.get_attribute("src")
    assert (chart.evaluate("image => image.currentSrc") == light) == (scheme == "light")
    assert chart.evaluate("image => image.naturalWidth") == 1040


def test_no_script_but_the_pages_own_runs(folder: Path, tmp_path: Path, browser: Any) -> None:
    attacked = tmp_path / "attacked.html"
    html = (folder / "report.html").read_text(encoding="utf-8")
    attacked.write_text(html.replace("<main>", f"<main>{SCRIPT}"), encoding="utf-8")  # as if the escaping had failed
    page = browser.new_page()
    page.goto(attacked.as_uri())
    page.wait_for_selector("#response .tokens li.kept")
    assert page.evaluate("document.body.dataset.attacked") is None
    page.close()


def test_a_finished_folder_is_written_again_to_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    again = Path(shutil.copytree(folder, tmp_path / "again"))
    write_analysis_pages(again)
    for name in ("report.html", "figures/tokens.png"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.usefixtures("no_figures")
def test_missing_and_broken_images_are_said(tmp_path: Path, open_page: Callable[..., Any]) -> None:
    write_analysis(tmp_path, samples=2, length=20)
    (tmp_path / "images" / "0.png").unlink()
    (tmp_path / "images" / "0-perturbed.png").write_text("no image")
    page = open_page(write_analysis_pages(tmp_path))
    assert page.locator(".pictures .none").count() == 2
    page.locator("#next").click()
    assert page.locator(".pictures img").count() == 2


def test_photographs_are_reduced_until_they_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_analysis(tmp_path, samples=4, length=10, photograph=(616, 462))
    paths = sorted(str(path.relative_to(tmp_path)) for path in (tmp_path / "images").iterdir())

    def reduced(limit: float) -> tuple[set[int], float]:
        """The widths of the embedded images, and the bytes that they take."""
        monkeypatch.setattr("vppo.analysis.report.IMAGE_BYTES", limit)
        images = [image for image in _images(tmp_path, paths) if image]
        return {image["width"] for image in images}, sum(len(image["uri"]) for image in images) * 3 / 4

    widths, size = reduced(10**7)
    assert widths == {448}
    widths, smaller = reduced(0.99 * size)
    assert widths == {336} and smaller < size
    assert reduced(1)[0] == {128}


@pytest.mark.usefixtures("no_figures")
def test_five_hundred_long_responses_stay_below_25_megabytes(tmp_path: Path) -> None:
    """A token takes 40 bytes of the page: 20 MB, which leaves 5 for the images and the figures."""
    sizes = []
    for length in (100, 1000):
        write_analysis(tmp_path / str(length), samples=10, length=length)
        sizes.append(write_analysis_pages(tmp_path / str(length)).stat().st_size)
    tokens = [len(pd.read_parquet(tmp_path / str(length) / "tokens.parquet")) for length in (100, 1000)]
    assert (sizes[1] - sizes[0]) / (tokens[1] - tokens[0]) < 40


@pytest.mark.usefixtures("no_figures")
def test_one_run_has_a_headline_and_key_numbers(tmp_path: Path) -> None:
    write_analysis(tmp_path, samples=6, length=30)
    folder = read_analysis(tmp_path)
    numbers = summarise_run(folder.runs[0])
    text = headline(numbers, folder).replace("\u00a0", " ")
    assert f"Half of the {numbers['token_dependency']['count']:,} tokens" in text
    assert f"k3 would pick {100 * numbers['overlap']['kl, k3']:.1f} %" in text
    assert "Correct responses average" in text
    unjudged = {**numbers, "correct_against_wrong": None, "accuracy": None, "one_draw": None}
    assert "Correct" not in headline(unjudged, folder)
    table = dict(comparison_table({"": unjudged}))
    assert table["accuracy"] == table["kept by one draw as by the mean"] == ["–"]  # noqa: RUF001
    html = write_analysis_pages(tmp_path).read_text(encoding="utf-8")
    assert "images/missing.png: does not exist" in html  # what was skipped and why
    assert json.loads((tmp_path / "summary.json").read_text())["seed"] == 0  # is the engine's, and left alone
