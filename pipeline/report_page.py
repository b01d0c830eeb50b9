"""Pieces of a self-contained HTML page: no network, no other file, and every text escaped.

A plain `str` is text and is escaped wherever it enters the page; only `Html` is taken as it is.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files


class Html(str):
    """Markup that was made here; everything else is text."""

    __slots__ = ()


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


def picture(light: bytes, dark: bytes | None, alt: str, caption: object) -> Html:
    """A figure inside the page, as WebP: for light pages and for paper, and perhaps another for dark screens."""
    media = "screen and (prefers-color-scheme: dark)"
    source = Html(f'<source media="{media}" srcset="{_data_uri(dark)}">' if dark else "")
    image = Html(f'<img src="{_data_uri(light)}" alt="{text(alt)}">')
    kind = None if dark else "images"
    return element("figure", element("picture", source, image), element("figcaption", caption), class_=kind)


def folded(summary: str, *children: object) -> Html:
    """Content behind a summary line."""
    return element("details", element("summary", summary), *children)


def glossary(entries: Iterable[tuple[str, object]]) -> Html:
    """Terms and what they mean."""
    items = (element(name, value) for entry in entries for name, value in zip(("dt", "dd"), entry, strict=True))
    return element("dl", *items)


def page(title: str, intro: Sequence[object], sections: Sequence[tuple[str, Html]]) -> str:
    """The whole page.

    Its content policy allows pictures from data URIs, and by their hashes the one style sheet and the one script:
    nothing is loaded, and no markup that slipped in could run.
    """
    style, script = (files("pipeline").joinpath(f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}"
    links = [element("li", element("a", name, href="#" + anchor(name))) for name, _ in sections]
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><link rel="icon" href="data:,">'
        f"{element('title', title)}<style>{style}</style>"
    )
    skip = element("a", "Skip to the report", href="#report", class_="skip")
    navigation = element("nav", element("ul", *links), aria_label="Sections")
    main = element("main", element("h1", title), *intro, *(body for _, body in sections), id="report")
    body = f"{skip}{navigation}{main}<script>{script}</script>"
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def _data_uri(webp: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(webp).decode('ascii')}"


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode('ascii')}'"
