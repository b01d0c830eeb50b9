"""The report in headless Chromium: quiet, and usable by mouse and keyboard, in the dark, on paper, on a telephone."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.report import write_report
from pipeline.report_page import page as make_page
from pipeline.report_page import section
from pipeline.report_tables import PAGE, Column, data_table
from tests.sample_study import HOSTILE, write_study

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
PAPER = {"width": 1032, "height": 703}  # A4 across without its margins, in pixels of 1/96 inch
ROWS = 100_000

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH; install Debian's package chromium")
sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright; pip install '.[test]'")

# Text that can be seen, with the contrast (WCAG 2) of its colour to what lies behind it.
CONTRASTS = """() => {
  const parse = text => { const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = node => {
    for (let at = node; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour[3] === 1) return colour;
    }
    return [255, 255, 255, 1];
  };
  return [...document.querySelectorAll("body *")]
    .filter(n => [...n.childNodes].some(c => c.nodeType === 3 && c.data.trim()))
    .filter(n => n.checkVisibility() && !["SCRIPT", "STYLE"].includes(n.tagName) && !n.disabled)
    .map(n => {
      const [a, b] = [light(parse(getComputedStyle(n).color)), light(behind(n))].sort((x, y) => y - x);
      return [(a + 0.05) / (b + 0.05), n.tagName + " " + n.textContent.trim().slice(0, 40)];
    });
}"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(write_study(tmp_path_factory.mktemp("browser"), hostile=True))


@pytest.fixture(scope="module")
def long_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with one table of 100,000 rows: names in order, numbers in none."""
    names = [f"pair {i}" for i in range(ROWS - 1)] + [HOSTILE]
    numbers = np.random.default_rng(0).permutation(ROWS).astype(np.float64)
    numbers[5] = np.nan
    columns = [Column("pair", names), Column("number", numbers, 0, "number", mark=ROWS - 2.0)]
    path = tmp_path_factory.mktemp("long") / "index.html"
    table = data_table("long", "long", columns, [("High", "number>=99990")])
    path.write_text(make_page("long", [], [("Table", section("Table", table))]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield opened
        opened.close()


class View:
    """An open page, and what it asked for and complained about."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.tab = browser.new_page(**options)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.tab.on("console", lambda message: self.complaints.append(message.text))
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.goto(path.as_uri())
        self.tab.wait_for_selector("html[data-ready]")

    def column(self, table: str, number: int) -> list[str]:
        cells = f"#{table} tbody tr > :nth-child({number})"
        return list(self.tab.eval_on_selector_all(cells, "nodes => nodes.map(n => n.textContent)"))

    def head(self, table: str, title: str) -> Any:
        return self.tab.locator(f"#{table} th button", has_text=title)


@pytest.fixture
def view(browser: Any, report: Path) -> Iterator[View]:
    opened = View(browser, report)
    yield opened
    opened.tab.close()


@pytest.fixture
def long_view(browser: Any, long_page: Path) -> Iterator[View]:
    opened = View(browser, long_page)
    yield opened
    opened.tab.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_without_a_word_or_a_request_and_shows_every_picture(browser: Any, report: Path, scheme: str) -> None:
    view = View(browser, report, color_scheme=scheme)
    assert view.complaints == []
    assert [url for url in view.requests if not url.startswith("data:")] == [report.as_uri()]
    assert view.tab.title() == "Registration report: study"
    sizes = view.tab.eval_on_selector_all("img", "nodes => nodes.map(n => n.complete && n.naturalWidth)")
    assert len(sizes) == 5
    assert min(sizes) > 300
    view.tab.close()


def test_names_and_messages_are_shown_as_they_are(view: View, long_view: View) -> None:
    assert HOSTILE in view.column("cohort-table", 1)
    assert any(HOSTILE in message for message in view.column("failures-table", 5))
    assert view.tab.locator("img[onerror]").count() == 0
    long_view.tab.get_by_role("button", name="Last").click()
    assert long_view.column("long", 1)[-1] == HOSTILE
    assert (view.tab.title(), long_view.tab.title()) == ("Registration report: study", "long")
    assert view.complaints == long_view.complaints == []


def test_columns_and_measures_are_explained(view: View) -> None:
    view.tab.get_by_text("What the columns mean").click()
    assert view.tab.locator("dt", has_text="SD log J (sdlogj)").is_visible()
    assert view.tab.locator("dd", has_text="roughness of the field").is_visible()
    view.tab.get_by_text("How the scores are made").click()
    assert view.tab.locator("dt", has_text="matches disagree in space").is_visible()


def test_a_click_on_a_header_sorts_and_a_second_turns_round(view: View) -> None:
    head = view.head("pairs-table", "Dice after")
    number = 1 + view.tab.eval_on_selector_all("#pairs-table th button", "n => n.map(b => b.textContent)").index(
        "Dice after"
    )
    assert view.column("pairs-table", number) == ["0.700", "0.900"]
    head.click()
    assert head.locator("..").get_attribute("aria-sort") == "ascending"
    head.click()
    assert head.locator("..").get_attribute("aria-sort") == "descending"
    assert view.column("pairs-table", number) == ["0.900", "0.700"]
    view.head("pairs-table", "pair").first.click()
    assert head.locator("..").get_attribute("aria-sort") is None


def test_the_keyboard_reaches_sorts_and_filters(long_view: View) -> None:
    tab = long_view.tab
    reached = []
    for _ in range(12):
        tab.keyboard.press("Tab")
        reached.append(tab.evaluate("document.activeElement.textContent || document.activeElement.tagName"))
        assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none", reached
        assert tab.evaluate("parseFloat(getComputedStyle(document.activeElement).outlineWidth)") >= 2, reached
        if reached[-1] == "number":
            break
    assert reached[-1] == "number"
    assert {"Skip to the report", "INPUT", "High", "pair"} <= set(reached)
    tab.keyboard.press("Enter")
    assert long_view.column("long", 2)[:3] == ["0", "1", "2"]
    tab.keyboard.press("Space")
    assert long_view.column("long", 2)[0] == str(ROWS - 1)
    tab.get_by_role("searchbox").focus()
    tab.keyboard.type("pair 99999")
    assert long_view.column("long", 1) == []
    assert tab.locator(".count").text_content() == "0 of 100,000 rows"


def test_words_and_conditions_filter_all_rows(long_view: View) -> None:
    tab, search = long_view.tab, long_view.tab.get_by_role("searchbox")
    search.fill("PAIR 9999")
    holding = [f"pair {n}" for n in range(ROWS - 1) if "9999" in str(n)]
    assert long_view.column("long", 1) == holding
    search.fill("number<3")
    assert sorted(long_view.column("long", 2)) == ["0", "1", "2"]
    high = tab.get_by_role("button", name="High")
    high.click()
    assert high.get_attribute("aria-pressed") == "true"
    assert sorted(long_view.column("long", 2)) == [str(n) for n in range(99990, ROWS)]
    assert tab.locator("#long .mark").count() == 2
    high.click()
    assert len(long_view.column("long", 1)) == PAGE


def test_pages_turn_and_end(long_view: View) -> None:
    tab = long_view.tab
    forward, back = tab.get_by_role("button", name="Next"), tab.get_by_role("button", name="Previous")
    assert back.is_disabled()
    forward.click()
    assert long_view.column("long", 1)[0] == f"pair {PAGE}"
    assert tab.locator(".place").text_content() == "51 to 100 of 100,000"
    tab.get_by_role("button", name="Last").click()
    assert forward.is_disabled()
    assert len(long_view.column("long", 1)) == PAGE
    tab.get_by_role("button", name="First").click()
    assert long_view.column("long", 1)[0] == "pair 0"


def test_numbers_in_names_sort_by_their_value(long_view: View) -> None:
    long_view.head("long", "number").click()
    long_view.head("long", "pair").click()
    assert long_view.column("long", 1)[:13] == [HOSTILE, *(f"pair {n}" for n in range(12))]


def test_empty_cells_come_last_either_way(long_view: View) -> None:
    head = long_view.head("long", "number")
    for _ in range(2):
        head.click()
        long_view.tab.get_by_role("button", name="Last").click()
        assert long_view.column("long", 2)[-1] == ""


@pytest.mark.parametrize(
    "look", [{"color_scheme": "light"}, {"color_scheme": "dark"}, {"media": "print", "color_scheme": "dark"}], ids=str
)
def test_text_stands_out_from_its_ground(view: View, look: dict[str, str]) -> None:
    view.tab.emulate_media(**look)
    view.tab.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    found = view.tab.evaluate(CONTRASTS)
    assert len(found) > 100
    assert [text for contrast, text in found if contrast < 4.5] == []
    ground = view.tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (look != {"color_scheme": "dark"})


def _until(tab: Any, condition: str) -> None:
    """Wait until an expression is true; the page's own policy forbids the browser's way, which evaluates strings."""
    end = time.monotonic() + 20
    while not tab.evaluate(condition):
        assert time.monotonic() < end, f"still not true after 20 s: {condition}"
        time.sleep(0.05)


def test_paper_holds_all_of_it(browser: Any, report: Path) -> None:
    view = View(browser, report, viewport=PAPER)
    view.tab.emulate_media(media="print")
    _until(view.tab, "[...document.querySelectorAll('section > details')].every(d => d.open)")
    assert view.tab.evaluate("document.documentElement.scrollWidth") <= PAPER["width"]
    cut = "nodes => nodes.filter(n => n.scrollHeight > n.clientHeight + 1 || n.scrollWidth > n.clientWidth + 1)"
    assert view.tab.eval_on_selector_all(".scroll", f"nodes => ({cut})(nodes).length") == 0
    assert len(view.column("pairs-table", 1)) == 2
    assert not view.tab.locator("nav").is_visible()
    assert len(view.tab.pdf(prefer_css_page_size=True)) > 50_000
    view.tab.emulate_media(media="screen")
    _until(view.tab, "![...document.querySelectorAll('section > details')].some(d => d.open)")
    view.tab.close()


def test_paper_holds_the_first_rows_of_a_long_table_and_says_so(long_view: View) -> None:
    long_view.tab.get_by_role("searchbox").fill("number>=50")
    shown = "document.querySelector('#long').tBodies[0].rows.length"
    long_view.tab.emulate_media(media="print")
    _until(long_view.tab, f"{shown} === 500")
    assert long_view.tab.locator(".printed").is_visible()
    long_view.tab.emulate_media(media="screen")
    _until(long_view.tab, f"{shown} === {PAGE}")
    assert not long_view.tab.locator(".printed").is_visible()


def test_a_narrow_screen_scrolls_tables_and_not_the_page(browser: Any, report: Path) -> None:
    view = View(browser, report, viewport={"width": 360, "height": 700})
    assert view.tab.evaluate("document.documentElement.scrollWidth") <= 360
    assert (
        view.tab.evaluate("getComputedStyle(document.querySelector('#pairs-table').parentElement).overflowX") == "auto"
    )
    view.tab.close()
