"""Tables of a report, which sort, filter and, when long, turn pages: a hundred thousand rows open at once.

Up to `WHOLE` rows stand in the page as they are. Longer tables show their first rows, and carry all of them as columns
in JSON, gzipped and in base64, which pipeline/report.js unpacks; base64 has no character that could end the element.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.report_page import Html, element, text

WHOLE = 200
PAGE = 50  # rows, as in report.js
_FILTER_FROM = 12  # rows; shorter tables need no filter


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: its header.
        values: numbers, float64 [n] with NaN where empty, or texts (in whole tables also Html), "" where empty.
        digits: decimals of numbers.
        key: what the filter calls it, for conditions like `dice<0.7`.
        mark: from this value on a number is marked.
        wide: whether it holds sentences.
    """

    title: str
    values: npt.NDArray[np.float64] | Sequence[object]
    digits: int = 0
    key: str = ""
    mark: float | None = None
    wide: bool = False

    @property
    def numeric(self) -> bool:
        """Whether it holds numbers."""
        return isinstance(self.values, np.ndarray)


def data_table(name: str, caption: str, columns: Sequence[Column], presets: Iterable[tuple[str, str]] = ()) -> Html:
    """A table of any length.

    Args:
        name: id of the table, unique on the page.
        columns: equally long, at least one; the first names the row.
        presets: (title, filter) of buttons beside the filter.
    """
    rows = len(columns[0].values)
    packed = rows > WHOLE
    head = [
        element(
            "th",
            element("button", column.title, type="button"),
            scope="col",
            class_="n" if column.numeric else None,
            data_key=column.key or None,
        )
        for column in columns
    ]
    body = [
        element("tr", *(_cell(column, row, head=not i) for i, column in enumerate(columns)))
        for row in range(PAGE if packed else rows)
    ]
    whole = element(
        "table",
        element("caption", caption),
        element("thead", element("tr", *head)),
        element("tbody", *body),
        id=name,
    )
    parts = [_tools(columns, presets)] if rows >= _FILTER_FROM else []
    parts.append(element("div", whole, class_="scroll", tabindex=0, role="region", aria_label=caption))
    if packed:
        note = f"Paper holds the first 500 of {rows:,} rows at most, in the order and with the filter of the screen."
        parts += [_pager(rows), element("p", note, class_="printed soft")]
        parts.append(Html(f'<script type="text/plain" data-pack>{pack(columns)}</script>'))
    return element("div", *parts, data_grid="")


def table(
    name: str, caption: str, header: Sequence[str], rows: Sequence[Sequence[object]], wide: Sequence[str] = ()
) -> Html:
    """A table of rows: numbers are aligned and sorted as numbers; None is an empty cell.

    Args:
        wide: titles of the columns that hold sentences.
    """
    columns = []
    for i, title in enumerate(header):
        values = [row[i] for row in rows]
        kinds = {type(value) for value in values} - {type(None)}
        if kinds and kinds <= {int, float}:
            numbers = np.array([math.nan if value is None else value for value in values], dtype=np.float64)
            columns.append(Column(title, numbers, 0 if kinds == {int} else 3))
        else:
            texts = ["" if value is None else value for value in values]
            columns.append(Column(title, texts, wide=title in wide))
    return data_table(name, caption, columns)


def pack(columns: Sequence[Column]) -> str:
    """The columns as text: base64 of gzip of JSON, numbers rounded to what is shown, equal texts once."""
    packed = ",".join(_packed(column) for column in columns)
    content = f'{{"rows":{len(columns[0].values)},"columns":[{packed}]}}'
    return base64.b64encode(gzip.compress(content.encode("utf-8", "backslashreplace"), 6, mtime=0)).decode("ascii")


def _packed(column: Column) -> str:
    if not column.numeric:
        texts = [str(value) for value in column.values]
        words = {word: number for number, word in enumerate(dict.fromkeys(texts))}
        places = json.dumps([words[word] for word in texts], separators=(",", ":"))
        wide = json.dumps(column.wide)
        return f'{{"key":{json.dumps(column.key)},"wide":{wide},"words":{json.dumps(list(words))},"values":{places}}}'
    numbers = ",".join(_shortest(value, column.digits) for value in np.asarray(column.values).tolist())
    mark = json.dumps(column.mark)
    return f'{{"key":{json.dumps(column.key)},"digits":{column.digits},"mark":{mark},"values":[{numbers}]}}'


def _shortest(value: float, digits: int) -> str:
    if not math.isfinite(value):
        return "null"
    shown = f"{value:.{digits}f}"
    return shown.rstrip("0").rstrip(".") if digits else shown


def _cell(column: Column, row: int, head: bool) -> Html:
    name, scope, value = ("th", "row", column.values[row]) if head else ("td", None, column.values[row])
    if not column.numeric:
        return element(name, value, scope=scope, class_=None if head else "t w" if column.wide else "t")
    number = float(value)  # type: ignore[arg-type]
    if not math.isfinite(number):
        return element(name, "", scope=scope, class_="n")
    shown = f"{number:.{column.digits}f}"
    marked = column.mark is not None and float(shown) >= column.mark
    return element(name, shown, scope=scope, class_="n mark" if marked else "n", data_v=shown)


def _tools(columns: Sequence[Column], presets: Iterable[tuple[str, str]]) -> Html:
    keys = [column.key for column in columns if column.key and column.numeric]
    example = f"; or conditions such as {keys[0]}>1" if keys else ""
    search = Html('<input type="search" autocomplete="off" spellcheck="false">')
    chips = [
        element("button", title, type="button", data_query=query, aria_pressed="false") for title, query in presets
    ]
    hint = element("span", f"words{example}", class_="soft") if keys else ""
    count = element("output", class_="count", aria_live="polite")
    return element("div", element("label", "Filter ", search), hint, *chips, count, class_="tools")


def _pager(rows: int) -> Html:
    titles = {"first": "First", "previous": "Previous", "next": "Next", "last": "Last"}
    buttons = {
        to: Html(f'<button type="button" data-to="{to}"{" disabled" if to in ("first", "previous") else ""}>')
        + text(title)
        + Html("</button>")
        for to, title in titles.items()
    }
    place = element("span", f"1 to {PAGE} of {rows:,}", class_="place", aria_live="polite")
    inside = [Html(buttons["first"]), Html(buttons["previous"]), place, Html(buttons["next"]), Html(buttons["last"])]
    return element("div", *inside, class_="pager")
