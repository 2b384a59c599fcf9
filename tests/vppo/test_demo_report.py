"""The report page: one file, complete, safe against what a model writes, and alive in a browser."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.responses import SUMMARY, metrics, response, responses

from vppo.demo.report import _chosen, headline, pick, write_report
from vppo.pages.facts import facts
from vppo.pages.page import duration

ATTACK = "<script>document.body.dataset.attacked = 1</script>"


class Page(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str, css_class: str = "") -> list[dict[str, str | None]]:
        return [
            a for t, a in self.elements if t == tag and (not css_class or css_class in (a.get("class") or "").split())
        ]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with its report; one of the answers attacks the page."""
    out = tmp_path_factory.mktemp("run")
    attack = response(["3", ATTACK, '" onfocus="', "\n", " so", "<|im_end|>"], [1.2, 0.5, 0.1, 0.0, 1e-7, 0.01])
    path = write_report(out, summary=SUMMARY, metrics=metrics(20), responses=[attack, *responses(40)])
    assert path == out / "report.html"
    return out


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return (run / "report.html").read_text(encoding="utf-8")


def test_pictures_are_valid_in_both_appearances(run: Path) -> None:
    names = {path.name for path in (run / "figures").iterdir()}
    stems = (
        "accuracy",
        "reward",
        "dependency_tokens",
        "dependency_answers",
        "dependency_training",
        "shaping",
        "tokens",
    )
    assert names == {f"{stem}{suffix}.png" for stem in stems for suffix in ("", "-dark")}
    for path in (run / "figures").iterdir():
        with Image.open(path) as image:
            image.verify()
            assert image.format == "PNG"


def test_the_page_needs_nothing_but_itself(html: str) -> None:
    assert "http://" not in html
    assert "https://" not in html
    page = Page(html)
    sources = [a[key] or "" for _, a in page.elements for key in ("src", "srcset", "href") if key in a]
    assert len(sources) > 24
    assert all(source.startswith("data:") for source in sources)
    assert "@import" not in html
    assert "url(" not in html
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert (policy or "").startswith("default-src 'none'; img-src data:;")


def test_what_a_model_writes_is_text(html: str) -> None:
    page = Page(html)
    assert ATTACK not in html
    assert ATTACK.replace("<", "&lt;").replace(">", "&gt;") in html
    assert len(page.all("script")) == 1
    assert not any("onfocus" in attributes for _, attributes in page.elements)


def test_every_field_is_escaped(tmp_path: Path) -> None:
    bad = response([ATTACK], [1.0], question=ATTACK)
    object.__setattr__(bad, "answer", ATTACK)
    summary = {**SUMMARY, "note": ATTACK, "algorithm": ATTACK, "versions": {ATTACK: ATTACK}}
    html = write_report(tmp_path, summary=summary, metrics=[], responses=[bad]).read_text(encoding="utf-8")
    assert "<script>document" not in html.lower()
    assert len(Page(html).all("script")) == 1


def test_a_dozen_examples_with_a_chip_for_each_token(html: str) -> None:
    page = Page(html)
    assert len(page.all("article")) == 12
    chips = page.all("li", "token")
    assert len(chips) == 6 + 11 * 10
    assert [chip["title"] for chip in chips[:2]] == ["1.2 nats, kept", "0.5 nats, kept"]
    assert all(re.fullmatch(r"--d:\d+\.\d%", chip["style"] or "") for chip in chips)
    assert len(page.all("li", "special")) == 12
    assert len(page.all("li", "newline")) == 1
    assert all(image.get("alt") for image in page.all("img"))
    assert "✓ correct" in html
    assert "✗ wrong" in html


def test_headline_has_the_numbers() -> None:
    text = headline(SUMMARY).replace("\N{NO-BREAK SPACE}", " ")
    assert text == (
        "20 steps of VPPO with the exact KL took accuracy on 512 held-out questions from 25.0 % to 87.5 % "
        "in 1 min 15 s, after 31 s of warm-up (seed 0); tokens that name a digit read from the image depend on it "
        "120 times as much as all others: 1.5 against 0.0125 nats."
    )


PRODUCTS = {"scoring": 1000, "forward": 800, "backward": 1200, "tokens": 1000, "active": 400, "left_out": 2000}


def test_headline_says_what_the_head_did() -> None:
    text = headline({**SUMMARY, "head_products": PRODUCTS}).replace("\N{NO-BREAK SPACE}", " ")
    assert text.endswith(
        "40.0 % of the sampled tokens carried gradient: the head made 50.0 % of the products that training on all of "
        "them takes, and 25.0 % more to measure dependency."
    )
    counted = {**SUMMARY, "head_products": {**PRODUCTS, "scoring": 0}}
    assert headline(counted).replace("\N{NO-BREAK SPACE}", " ").endswith("that training on all of them takes.")


def test_headline_claims_nothing_that_did_not_happen() -> None:
    worse = {**SUMMARY, "algorithm": "dapo", "accuracy_after": 0.25, "dependency_digits": 0.0, "dependency_other": 0.0}
    text = headline(worse).replace("\N{NO-BREAK SPACE}", " ")
    assert "DAPO kept accuracy on 512 held-out questions at 25.0 %" in text
    assert "KL" not in text
    assert text.endswith("depend on it by 0 nats, all others by 0 nats.")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.724, "0.72 s"), (59.6, "1 min 0 s"), (75.0, "1 min 15 s"), (7500.0, "2 h 5 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds).replace("\N{NO-BREAK SPACE}", " ") == text


def test_the_table_shows_every_key_with_its_unit() -> None:
    summary = {**SUMMARY, "held_out": 1000, "a_new_key": [1, 2], "other": {"k": 1}}
    rows = {label: value.replace("\N{NO-BREAK SPACE}", " ") for label, value in facts(summary)}
    assert rows["accuracy before"] == "25.0 %"
    assert rows["held-out questions"] == "1,000"
    assert rows["dependency elsewhere"] == "0.0125 nats"
    assert rows["peak memory"] == "1,180 MiB"
    assert rows["training"] == "1 min 15 s"
    assert rows["a new key"] == "[1, 2]"
    assert rows["torch"] == "2.13.0"
    assert rows["other k"] == "1"
    assert len(rows) == len(summary)


def test_the_first_answers_are_picked_and_some_wrong_ones() -> None:
    right = [response(["t"], [1.0]) for _ in range(20)]
    wrong = [response(["t"], [1.0], correct=False) for _ in range(5)]
    assert pick(right, 12) == right[:12]
    assert [id(r) for r in pick([*right, *wrong], 12)] == [id(r) for r in [*right[:9], *wrong[:3]]]
    assert [id(r) for r in pick([*right[:5], *wrong], 12)] == [id(r) for r in [*right[:5], *wrong]]
    late = [*right[:15], wrong[0], *right[15:]]
    assert [id(r) for r in pick(late, 12)] == [id(r) for r in [*right[:11], wrong[0]]]
    many = [*right[:4], *wrong, *right[4:], wrong[0]]  # wrong enough as it is
    assert [id(r) for r in pick(many, 12)] == [id(r) for r in many[:12]]


def test_the_page_says_which_answers_it_shows(html: str) -> None:
    assert "The first 12 of 41 held-out answers." in html
    right = [response(["t"], [1.0]) for _ in range(20)]
    assert _chosen(right[:3]) == "All 3 held-out answers."
    late = [*right, response(["t"], [1.0], correct=False)]
    assert _chosen(late) == "The first 11 of 21 held-out answers, then the next 1 that is wrong."


def test_the_same_run_gives_the_same_bytes(run: Path, tmp_path: Path) -> None:
    paths = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        paths.append(write_report(folder, summary=SUMMARY, metrics=metrics(2), responses=responses(2)))
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("dependency", [True, False])
def test_a_run_without_answers_still_has_a_page(tmp_path: Path, dependency: bool) -> None:
    path = write_report(tmp_path, summary=SUMMARY, metrics=metrics(2, dependency=dependency), responses=[])
    page = Page(path.read_text(encoding="utf-8"))
    assert len(page.all("figure", "chart")) == (4 if dependency else 2)
    assert not page.all("article")
    assert not (tmp_path / "figures" / "tokens.png").exists()


def test_zeros_empty_answers_and_photographs_are_shown(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (700, 1000, 4), dtype=np.uint8)
    photograph = response(["a", "b"], [0.0, 0.0])
    object.__setattr__(photograph, "image", Image.fromarray(noise))
    path = write_report(tmp_path, summary=SUMMARY, metrics=[], responses=[photograph, response([], [])])
    page = Page(path.read_text(encoding="utf-8"))
    assert [chip["title"] for chip in page.all("li", "token")] == ["0 nats, filtered out"] * 2
    embedded = page.all("img")[-4]
    assert (embedded["src"] or "").startswith("data:image/webp")
    assert embedded["width"] == "448"
    assert path.stat().st_size < 1_500_000


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"summary": {"algorithm": "vppo"}}, r"summary: has no divergence, seed"),
    ({"metrics": [{"step": 1}, {"reward": 0.5}]}, r"metrics: row 1 has step None, takes a number"),
    ({"responses": [response(["a"], [1.0, 2.0])]}, r"responses: row 0 has 1 tokens, 2 dependencies and 2 kept flags"),
    ({"responses": [response(["a"], [float("nan")])]}, r"responses: row 0 has a dependency that is not finite"),
]


@pytest.mark.parametrize(("broken", "message"), BROKEN)
def test_broken_input_is_named(tmp_path: Path, broken: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path, **{"summary": SUMMARY, "metrics": [], "responses": [], **broken})
    assert not list(tmp_path.iterdir())


def test_the_page_works_in_a_browser(run: Path, open_page: Callable[..., Any]) -> None:
    page = open_page(run / "report.html")
    chips, tip = page.locator(".tokens").first.locator("li"), page.locator("#tip")
    assert page.evaluate("document.body.dataset.attacked") is None
    assert chips.nth(1).text_content() == ATTACK
    attributes = chips.evaluate_all("all => all.map(token => [token.tabIndex, token.hasAttribute('title')])")
    assert attributes == [[0, False], *[[-1, False]] * 5]  # one tab stop an answer; the page's own tooltip
    chips.first.focus()
    assert tip.text_content() == "1.2 nats, kept"
    for key, token, said in [
        ("ArrowRight", ATTACK, "0.5 nats, kept"),
        ("End", "<|im_end|>", "0.01 nats, filtered out"),
        ("ArrowRight", "<|im_end|>", "0.01 nats, filtered out"),
        ("Home", "3", "1.2 nats, kept"),
    ]:
        page.keyboard.press(key)
        assert (page.evaluate("document.activeElement.textContent"), tip.text_content()) == (token, said)
    page.keyboard.press("Escape")
    assert not tip.is_visible()
    colours = chips.evaluate_all("all => all.map(token => getComputedStyle(token).backgroundColor)")
    assert len(set(colours)) == 5  # of 0 and 1e-7 nats it is the same


@pytest.mark.parametrize("width", [1280, 420])
def test_the_facts_fold_away_on_a_phone(run: Path, open_page: Callable[..., Any], width: int) -> None:
    page = open_page(run / "report.html", viewport={"width": width, "height": 800})
    facts, title = page.locator(".folds dt").first, page.locator(".folds summary")
    phone = width == 420
    assert (facts.is_visible(), title.is_visible()) == (not phone, phone)
    if phone:
        title.click()
        assert facts.is_visible()


def test_the_page_says_why_tokens_that_do_not_look_are_kept(html: str) -> None:
    text = " ".join("".join(Page(html).text).replace("\N{NO-BREAK SPACE}", " ").split())
    assert "of every answer the same share, 40 %, rounded up" in text and "such as a “+” or the end" in text


@pytest.mark.parametrize(
    ("algorithm", "marked"),
    [("vppo", "those that gradient filtering keeps:"), ("tgf", "those that gradient filtering keeps:"),
     *((name, "would keep, by which this run was not trained:") for name in ("dapo", "tas", "random", "pgpo", "own"))],
)  # fmt: skip
def test_the_page_says_whether_the_marked_tokens_were_trained_on(tmp_path: Path, algorithm: str, marked: str) -> None:
    html = write_report(tmp_path, summary={**SUMMARY, "algorithm": algorithm}, metrics=[], responses=responses(2))
    assert marked in " ".join(html.read_text(encoding="utf-8").split())


def test_no_script_but_the_pages_own_runs(run: Path, tmp_path: Path, browser: Any) -> None:
    attacked = tmp_path / "attacked.html"
    html = (run / "report.html").read_text(encoding="utf-8")
    attacked.write_text(html.replace("<main>", f"<main>{ATTACK}"), encoding="utf-8")  # as if the escaping had failed
    page = browser.new_page()
    page.goto(attacked.as_uri())
    assert page.evaluate("document.body.dataset.attacked") is None
    page.close()
