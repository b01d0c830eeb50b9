"""The figures of a report: each as a PNG beside the page, and light and dark inside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.report_figures import theme, to_webp
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

    def add(self, name: str, draw: Callable[[], bytes], alt: str, caption: str, photographic: bool = False) -> Html:
        """Draw a figure on light and on dark, write the light one to `name.png`, and give both for the page.

        Args:
            draw: the figure as PNG, in the colours of `report_figures.theme`.
            photographic: whether it shows images, for which the page takes less exact copies.
        """
        drawn = []
        for dark in (False, True):
            with theme(dark):
                drawn.append(draw())
        with replace_file(self.folder / f"{name}.png") as temporary:
            temporary.write_bytes(drawn[0])
        light, dark_one = (to_webp(png, photographic) for png in drawn)
        return picture(light, dark_one, alt, f"{caption} ({name}.png)" if caption else f"{name}.png")
