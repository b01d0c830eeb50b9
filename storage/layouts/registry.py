"""The layouts of public data sets by name."""

from __future__ import annotations

import difflib
from collections import Counter
from pathlib import Path

from storage.layouts import acdc, aerial, bids, fire, learn2reg, mnms, msd, promise12
from storage.layouts.found import Found, Layout, inside
from storage.manifest import CohortError

LAYOUTS: dict[str, Layout] = {
    module.LAYOUT.name: module.LAYOUT for module in (acdc, mnms, learn2reg, msd, promise12, fire, aerial, bids)
}


def read_layout(name: str, root: str | Path, files: Path, select: str = "") -> Found:
    """Read a public data set from the folder in which it comes.

    Args:
        name: key of LAYOUTS.
        files: folder for frames and landmarks that have to be written, see `Found`.
        select: what the layout lets one choose, "" for its default.

    Raises:
        FileNotFoundError: for a folder that does not exist.
        CohortError: for a name that is no layout, or a folder that has another; says what the layout looks like.
        OSError: when a file cannot be written.
    """
    if name not in LAYOUTS:
        near = difflib.get_close_matches(name, LAYOUTS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose {', '.join(LAYOUTS)}"
        raise CohortError(f"no layout {name!r}; {hint}")
    layout, folder = LAYOUTS[name], Path(root).resolve()
    if not folder.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    if select and not layout.select:
        raise CohortError(f"--select {select}: there is nothing to choose in the layout {name}")
    found = Found(folder, files.resolve())
    try:
        layout.read(found, select)
    except CohortError as error:
        raise CohortError(f"{error}\n{_expected(layout, folder)}") from None
    if not found.subjects:
        reason = "\n".join(found.problems) or f"{root}: nothing of the layout {name}; found {inside(folder)}"
        raise CohortError(f"{reason}\n{_expected(layout, folder)}")
    twice = [n for n, times in Counter(subject.subject for subject in found.subjects).items() if times > 1]
    if twice:
        raise CohortError(f"{root}: {', '.join(twice[:3])} found more than once; give the folder that holds one copy")
    return found


def _expected(layout: Layout, root: Path) -> str:
    others = [other.name for other in LAYOUTS.values() if other is not layout and other.fits(root)]
    hint = f"\nThis folder looks like: {', '.join(others)}" if others else ""
    if layout.select:
        hint = f"\n--select chooses {layout.select}{hint}"
    return f"{layout.name} looks like this (give the top folder, or the part of it that you want):\n{layout.tree}{hint}"
