"""The figures of a report: each as a PNG beside the page, and as WebP inside it."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.report_figures import theme
from pipeline.report_page import Html, picture
from storage.atomic import replace_file


@dataclass(frozen=True)
class Album:
    """The folder that the figures of a report go to."""

    folder: Path

    def clear(self) -> None:
        """Remove the figures of an earlier report."""
        for old in self.folder.glob("*.png"):
            old.unlink()

    def add_chart(self, name: str, draw: Callable[[], bytes], alt: str, caption: str) -> Html:
        """Draw a chart on light and on dark ground, write the light one to `name.png`, and give both for the page.

        Args:
            draw: the chart as PNG, in the colours of `report_figures.theme`.
        """
        drawn = []
        for dark in (False, True):
            with theme(dark):
                drawn.append(draw())
        self._write(name, drawn[0])
        light, dark_one = (_to_webp(png, lossless=True, quality=60) for png in drawn)
        return picture(light, dark_one, alt, f"{caption} ({name}.png)")

    def add_picture(self, name: str, png: bytes, alt: str, caption: str) -> Html:
        """Write images, which suit any ground, to `name.png`, and give them for the page with hardly any loss."""
        self._write(name, png)
        return picture(_to_webp(png, quality=86), None, alt, f"{caption} ({name}.png)")

    def _write(self, name: str, png: bytes) -> None:
        with replace_file(self.folder / f"{name}.png") as temporary:
            temporary.write_bytes(png)


def _to_webp(png: bytes, **options: Any) -> bytes:
    """A PNG as WebP, which takes a third to a tenth of the space."""
    stream = io.BytesIO()
    with Image.open(io.BytesIO(png)) as image:
        image.save(stream, format="WEBP", method=4, **options)
    return stream.getvalue()
