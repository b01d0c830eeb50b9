"""Pieces of a self-contained HTML page: no network, no other file, and every text escaped.

A plain `str` is text and is escaped wherever it enters the page; only `Html` is taken as it is.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape

Cell = object  # str, number, None or Html


class Html(str):
    """Markup that was made here; everything else is text."""

    __slots__ = ()


STYLE = """
:root{color-scheme:light dark;
--bg:#fff;--fg:#1b1b1b;--soft:#595959;--line:#c9c9c9;--card:#f4f4f4;--link:#004f80}
@media (prefers-color-scheme:dark){:root{
--bg:#14171a;--fg:#e8e8e8;--soft:#b3b3b3;--line:#4a4f55;--card:#1f2429;--link:#7cc4f5}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:75rem;padding:1rem 1.5rem 3rem;background:var(--bg);color:var(--fg);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.7rem;margin:.5rem 0 0}
h2{font-size:1.25rem;margin:2.2rem 0 .5rem;border-bottom:1px solid var(--line)}
h3{font-size:1.05rem;margin:1.5rem 0 .3rem}a{color:var(--link)}.soft{color:var(--soft)}
nav ul{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;list-style:none;padding:0}
.cards{display:flex;flex-wrap:wrap;gap:.8rem;margin:1rem 0;padding:0;list-style:none}
.cards li{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.6rem 1rem;
min-width:9rem}
.cards b{display:block;font-size:1.35rem}
.scroll{width:fit-content;max-width:100%;overflow-x:auto;
max-height:34rem;overflow-y:auto;border:1px solid var(--line)}
.scroll:focus-visible,button:focus-visible,input:focus-visible,summary:focus-visible,a:focus-visible{
outline:3px solid #56b4e9;outline-offset:1px}
table{border-collapse:collapse;min-width:40%;font-size:.875rem}
caption{text-align:left;padding:.3rem .6rem;color:var(--soft)}
th,td{padding:.25rem .6rem;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
td{overflow-wrap:anywhere;min-width:6rem;max-width:34rem}td:first-child{min-width:9rem}
.n{text-align:right;font-variant-numeric:tabular-nums}td.n{min-width:4rem;white-space:nowrap}
thead th{position:sticky;top:0;background:var(--card)}
th button{all:unset;cursor:pointer;font-weight:600}th button::after{content:" \\2195";color:var(--soft)}
th[aria-sort=ascending] button::after{content:" \\2191"}
th[aria-sort=descending] button::after{content:" \\2193"}
figure{margin:1rem 0}figure img{max-width:100%;height:auto;background:#fff;border-radius:.4rem;padding:.3rem;
border:1px solid var(--line)}
figcaption{font-size:.9rem;color:var(--soft)}pre{overflow-x:auto;background:var(--card);padding:.7rem;font-size:.8rem}
label.filter{display:block;margin:.4rem 0}
@media print{:root{color-scheme:light;--bg:#fff;--fg:#000;--soft:#333;--line:#999;--card:#fff;--link:#000}
nav,.filter{display:none!important}.scroll{max-height:none;overflow:visible;border:0}body{max-width:none;padding:0}
thead th{position:static}table{width:100%;font-size:.65rem}td,td.n,td:first-child{min-width:0}
th,td{padding:.15rem .3rem}figure,tr,.cards li{break-inside:avoid}h2,h3{break-after:avoid}
th button::after{content:""!important}}
"""

SCRIPT = """
"use strict";
for (const table of document.querySelectorAll("table[data-sort]")) {
  const body = table.tBodies[0];
  const heads = table.querySelectorAll("thead th");
  const key = (row, i) => {
    const cell = row.cells[i];
    return cell.dataset.v === undefined ? cell.textContent : +cell.dataset.v;
  };
  heads.forEach((head, i) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...body.rows].sort((a, b) => {
      const x = key(a, i), y = key(b, i);
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = typeof x === "number" && typeof y === "number" ? x - y
        : String(x).localeCompare(String(y), undefined, {numeric: true});
      return down ? -order : order;
    });
    body.append(...rows);
  }));
}
for (const input of document.querySelectorAll("input[data-for]")) {
  const body = document.getElementById(input.dataset.for).tBodies[0];
  input.addEventListener("input", () => {
    const wanted = input.value.toLowerCase();
    for (const row of body.rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });
}
"""

_FILTER_FROM = 12  # rows; shorter tables need no filter


def text(value: object) -> Html:
    """Escape text; Html passes."""
    return value if isinstance(value, Html) else Html(escape(str(value), quote=True))


def element(name: str, *children: object, **attributes: object) -> Html:
    """`<name attribute="…">children</name>`; a trailing underscore in an attribute name is dropped."""
    inside = "".join(text(child) for child in children)
    marks = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{marks}>{inside}</{name}>")


def section(title: str, *children: object) -> Html:
    """A section with an anchor for the navigation."""
    return element("section", element("h2", title), *children, id=anchor(title))


def anchor(title: str) -> str:
    """Fragment id of a section title."""
    return "".join(c if c.isalnum() else "-" for c in title.lower())


def cards(values: Iterable[tuple[str, object]]) -> Html:
    """Key numbers: (caption, value)."""
    items = [element("li", element("b", value), element("span", name, class_="soft")) for name, value in values]
    return element("ul", *items, class_="cards")


def table(name: str, caption: str, header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Html:
    """A table that sorts by a click or a key press on its header, with a filter when it is long.

    Args:
        name: id of the table, unique on the page.
        rows: numbers are aligned and sorted as numbers; None is an empty cell.
    """
    numeric = [any(isinstance(row[i], (int, float)) for row in rows) for i in range(len(header))]
    head = [
        element("th", element("button", title, type="button"), scope="col", class_="n" if number else None)
        for title, number in zip(header, numeric, strict=True)
    ]
    body = [element("tr", *(_cell(value) for value in row)) for row in rows]
    whole = element(
        "table",
        element("caption", caption),
        element("thead", element("tr", *head)),
        element("tbody", *body),
        id=name,
        data_sort="",
    )
    box = element("div", whole, class_="scroll", tabindex=0, role="region", aria_label=caption)
    if len(rows) < _FILTER_FROM:
        return box
    search = Html(f'<input type="search" data-for="{text(name)}">')
    return Html(element("label", "Filter rows: ", search, class_="filter") + box)


def picture(png: bytes, alt: str, caption: object) -> Html:
    """A PNG inside the page."""
    data = base64.b64encode(png).decode("ascii")
    image = Html(f'<img src="data:image/png;base64,{data}" alt="{text(alt)}">')
    return element("figure", image, element("figcaption", caption))


def folded(summary: str, *children: object) -> Html:
    """Content behind a summary line."""
    return element("details", element("summary", summary), *children)


def page(title: str, intro: Sequence[object], sections: Sequence[tuple[str, Html]]) -> str:
    """The whole page.

    Its content policy allows the inline style, pictures from data URIs and the one script below, by its hash:
    nothing is loaded, and no markup that slipped in could run.
    """
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode("ascii")
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    links = [element("li", element("a", name, href="#" + anchor(name))) for name, _ in sections]
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><link rel="icon" href="data:,">'
        f"{element('title', title)}<style>{STYLE}</style>"
    )
    main = element(
        "main",
        element("h1", title),
        *intro,
        element("nav", element("ul", *links), aria_label="Sections"),
        *(body for _, body in sections),
    )
    body = f"{main}<script>{SCRIPT}</script>"
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def _cell(value: Cell) -> Html:
    if value is None:
        return element("td", "")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return element("td", value)
    shown = str(value) if isinstance(value, int) else _number(value)
    return element("td", shown, class_="n", data_v=repr(float(value)))


def _number(value: float) -> str:
    """Four significant digits, without an exponent where that stays short."""
    return f"{value:.3f}" if 0.001 <= abs(value) < 1000 or value == 0 else f"{value:.4g}"
