"""The report: complete without a network, safe against hostile names, and alive in a real browser."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest

from pipeline import report_figures, report_page
from pipeline.errors import UsageError
from pipeline.report import write_report
from pipeline.report_data import best_median_worst
from pipeline.report_pairs import choose_slices
from storage import tables
from storage.geometry import Geometry
from tests.sample_study import HOSTILE, write_study

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FIGURES = {"distributions.png", "dice_by_label.png", "pair_best.png", "pair_worst.png"}


class _Page(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("report"), hostile=True)


@pytest.fixture(scope="module")
def page(study: Path) -> _Page:
    return _Page(write_report(study).read_text(encoding="utf-8"))


def test_every_picture_is_inside_the_page_and_beside_it(study: Path, page: _Page) -> None:
    pictures = page.of("img")
    assert {path.name for path in (study / "report").glob("*.png")} == FIGURES
    inside = {base64.b64decode((p["src"] or "").removeprefix("data:image/png;base64,")) for p in pictures}
    assert inside == {(study / "report" / name).read_bytes() for name in FIGURES}
    assert all(len(p["alt"] or "") > 30 for p in pictures)


def test_nothing_outside_the_page_is_referred_to(page: _Page) -> None:
    references = [
        value or "" for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")
    ]
    assert references
    assert all(value.startswith(("data:", "#")) for value in references)
    anchors = {attributes.get("id") for _, attributes in page.tags}
    assert {value.removeprefix("#") for value in references if value.startswith("#")} <= anchors


def test_names_and_messages_are_shown_not_run(page: _Page) -> None:
    assert HOSTILE in page.text
    assert f"{HOSTILE}: labels are on another grid" in page.text
    assert not [p for p in page.of("img") if "onerror" in p]


def test_ids_are_unique_and_tables_have_headers(page: _Page) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert len(page.of("table")) == len(page.of("caption")) == 6
    assert all(head["scope"] == "col" for head in page.of("th"))


def test_numbers_of_the_tables_reach_the_page(page: _Page) -> None:
    assert "0.5 → 0.7 → 0.8" in page.text
    assert "2 of 3" in page.text
    assert "not complete" in page.text


def test_without_images_the_rest_is_still_reported(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    for image in tmp_path.glob("subject-01.nii.gz"):
        image.unlink()
    text = write_report(study).read_text(encoding="utf-8")
    assert "No picture:" in text
    assert "subject-01.nii.gz" in text
    plan = json.loads((study / "plan.json").read_text())
    del plan["manifest"]
    (study / "plan.json").write_text(json.dumps(plan))
    assert "give the manifest with --cohort" in write_report(study).read_text(encoding="utf-8")
    again = write_report(study, tmp_path / "cohort.csv").read_text(encoding="utf-8")
    assert "Worst: " in again


def test_a_study_without_labels_is_ranked_by_similarity(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    for part in tables.part_names(study, "metrics"):
        kept = [
            {c: v for c, v in row.items() if not c.startswith(("dice", "tre"))}
            for row in tables.read_part(study, "metrics", part).to_pylist()
            if row["label"] == 0
        ]
        tables.write_part(study, "metrics", part, tables.table_from_rows("metrics", kept))
    text = write_report(study).read_text(encoding="utf-8")
    assert "ranked by mean ROI similarity" in text


def test_a_study_that_was_only_matched_has_a_report_without_pairs(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    for part in tables.part_names(study, "metrics"):
        tables.remove_part(study, "metrics", part)
    page = _Page(write_report(study).read_text(encoding="utf-8"))
    assert "Best: " not in page.text
    assert str(tables.read_table(study, "correspondences").num_rows) in page.text


def test_pictures_of_a_2d_study(tmp_path: Path) -> None:
    study = write_study(tmp_path, shape=(1, 96, 96))
    write_report(study)
    assert (study / "report" / "pair_best.png").stat().st_size > 10_000


def test_a_folder_that_is_no_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a study folder"):
        write_report(tmp_path)


def test_roles_are_different_pairs() -> None:
    assert best_median_worst([]) == []
    assert best_median_worst(["a"]) == [("best", "a")]
    assert best_median_worst(["a", "b"]) == [("best", "a"), ("worst", "b")]
    assert best_median_worst(["a", "b", "c"]) == [("best", "a"), ("median", "b"), ("worst", "c")]


def test_the_slices_that_share_most_matches_are_shown() -> None:
    grid = Geometry((9, 8, 8), (1.0, 1.0, 1.0))
    matches = [
        {"fixed_slice": z, "moving_slice": w, "rank": rank} for rank, (z, w) in enumerate([(1, 2), (3, 3), (3, 3)])
    ]
    assert choose_slices(matches, grid, grid)[:2] == (3, 3)
    assert [m["rank"] for m in choose_slices(matches[::-1], grid, grid)[2]] == [1, 2]
    assert choose_slices([], grid, grid) == (4, 4, [])


def test_overlay_is_grey_where_images_agree() -> None:
    image = np.array([[0.0, 1.0, 0.5]], dtype=np.float32)
    overlay = report_figures.composite(image, np.array([[0.0, 1.0, 0.0]], dtype=np.float32))
    np.testing.assert_array_equal(overlay, [[[0, 0, 0], [1, 1, 1], [0, 0.5, 0]]])


def test_text_is_escaped_and_markup_is_not() -> None:
    cell = report_page.element("td", "<b>", report_page.element("i", 'a"&'), title='"x"')
    assert cell == '<td title="&quot;x&quot;">&lt;b&gt;<i>a&quot;&amp;</i></td>'


def test_a_long_table_has_a_filter() -> None:
    short, long = (report_page.table("t", "c", ["n"], [[i] for i in range(n)]) for n in (3, 30))
    assert "search" not in short
    assert 'data-for="t"' in long


async def _drive(page: Path, commands: list[str], profile: Path) -> tuple[list[Any], list[str]]:
    """Results of JavaScript expressions on the page in headless Chromium, and what it complained about."""
    assert CHROMIUM is not None
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "about:blank"]
    browser = subprocess.Popen([CHROMIUM, f"--user-data-dir={profile}", *arguments], stderr=subprocess.DEVNULL)
    try:
        port_file = profile / "DevToolsActivePort"
        for _ in range(300):
            if port_file.exists() and "\n" in port_file.read_text():
                break
            time.sleep(0.1)
        port = port_file.read_text().split("\n")[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json") as answer:
                targets = await answer.json()
            socket = next(t["webSocketDebuggerUrl"] for t in targets if t["type"] == "page")
            async with session.ws_connect(socket, max_msg_size=0) as connection:
                return await _talk(connection, page, commands)
    finally:
        browser.kill()
        browser.wait()


async def _talk(connection: Any, page: Path, commands: list[str]) -> tuple[list[Any], list[str]]:
    complaints: list[str] = []
    requests = [
        ("Runtime.enable", {}),
        ("Log.enable", {}),
        ("Page.enable", {}),
        ("Page.navigate", {"url": page.as_uri()}),
    ]
    wanted = [*requests, *(("Runtime.evaluate", {"expression": c, "returnByValue": True}) for c in commands)]
    results: list[Any] = []
    for number, (method, parameters) in enumerate(wanted):
        await connection.send_json({"id": number, "method": method, "params": parameters})
        answered = loaded = False
        while not (answered and (loaded or method != "Page.navigate")):
            message = json.loads((await connection.receive(timeout=30)).data)
            answered = answered or message.get("id") == number
            loaded = loaded or message.get("method") == "Page.loadEventFired"
            if message.get("method") in (
                "Runtime.exceptionThrown",
                "Log.entryAdded",
                "Runtime.consoleAPICalled",
            ):
                complaints.append(json.dumps(message["params"]))
            if message.get("id") == number and method == "Runtime.evaluate":
                results.append(message["result"]["result"].get("value"))
    return results, complaints


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_the_page_works_in_a_browser(study: Path, tmp_path: Path) -> None:
    path = write_report(study)
    column = "[...document.querySelectorAll('#pairs-table tbody tr')].map(r => r.cells[6].textContent)"
    click = "document.querySelectorAll('#pairs-table th button')[6].click()"
    commands = [
        "document.title",
        "[...document.images].every(i => i.complete && i.naturalWidth > 100)",
        column,
        click,
        column,
        "document.querySelectorAll('#pairs-table th')[6].getAttribute('aria-sort')",
        click,
        column,
        "[...document.querySelectorAll('th button')].every(b => b.tabIndex === 0)",
        "getComputedStyle(document.querySelector('thead th')).position",
    ]
    found, complaints = asyncio.run(_drive(path, commands, tmp_path / "profile"))
    assert complaints == []
    assert re.fullmatch("Registration report: study", found[0])
    assert found[1] is True
    assert found[2] == found[4] == ["0.700", "0.900"]
    assert found[5] == "ascending"
    assert found[7] == ["0.900", "0.700"]
    assert found[8] is True
    assert found[9] == "sticky"
