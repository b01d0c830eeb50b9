# mypy: disable-error-code="no-untyped-call"
"""A study in a notebook: handles that read nothing until they are asked, see `samreg.open_study`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds
import SimpleITK as sitk  # noqa: N813 (its own documentation's name)
from dask.delayed import delayed

from pipeline.errors import UsageError
from pipeline.folder import StudyFolder
from pipeline.pair_files import dataset, pair_rows, part_paths
from pipeline.record import planned_pairs, planned_subjects
from pipeline.slice_drawing import grey_of, read_encoded
from storage import tables, warping
from storage.cohort import Pair, Subject, subject_key
from storage.geometry import Geometry, from_file_axes
from storage.images import read_labels, read_on_grid
from storage.sources import is_remote
from storage.transforms import read_ddf

if TYPE_CHECKING:
    from dask.dataframe import DataFrame
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class OpenSubject:
    """One subject of a study; arrays are in analysis orientation (`storage.geometry`), slice axis first.

    Attributes:
        row: its row of the manifest.
    """

    folder: StudyFolder
    row: Subject

    @property
    def name(self) -> str:
        """As in the manifest."""
        return self.row.subject

    @cached_property
    def geometry(self) -> Geometry:
        """Grid of the image."""
        return self.folder.store.geometry(self.name)

    @property
    def image(self) -> da.Array:
        """Intensities float32 [D, H, W], 0..1, one chunk."""
        return self._lazy(lambda: grey_of(read_encoded(self.folder.store, self.row)), np.float32)

    @property
    def labels(self) -> da.Array | None:
        """Label map int32 [D, H, W], one chunk; None for a subject without."""
        path = self.row.label
        return self._lazy(lambda: read_labels(path, self.geometry), np.int32) if path else None

    @property
    def features(self) -> da.Array | None:
        """Feature maps float16 [D, C, h, w], a slice to a chunk; None where they were dropped."""
        stored = self.folder.store.read(self.name).features
        return None if stored is None else da.from_array(stored, chunks=stored.chunks)

    @property
    def rois(self) -> pa.Table:
        """Its rows of the table `rois`."""
        return tables.read_part(self.folder.root, "rois", subject_key(self.name))

    def masks(self, rois: list[int]) -> npt.NDArray[np.bool_]:
        """Masks bool [n, H, W] of ROIs, by their numbers in the column `roi`."""
        return self.folder.store.read(self.name).masks(rois)

    def _lazy(self, read: Callable[[], npt.NDArray[Any]], kind: type) -> da.Array:
        return _lazy(read, self.geometry.shape, kind)


@dataclass(frozen=True)
class OpenPair:
    """One pair of a study.

    Attributes:
        name: of the pair.
        fixed, moving: its subjects.
    """

    folder: StudyFolder
    name: str
    fixed: OpenSubject
    moving: OpenSubject

    @property
    def transform(self) -> sitk.Transform:
        """Takes positions of the fixed image to the moving one, mm LPS, on the original files.

        Raises:
            UsageError: for a pair without a transform.
        """
        return warping.read_itk_transform(self._output("transforms"))

    @property
    def ddf(self) -> da.Array:
        """Displacement float32 [3, D, H, W], mm along fixed (z, y, x), pull-back (`pipeline.algorithms.warp`)."""
        path, fixed, moving = self._output("transforms"), self.fixed.geometry, self.moving.geometry
        return _lazy(lambda: read_ddf(path, fixed, moving), (3, *fixed.shape), np.float32)

    @property
    def log_jacobian(self) -> da.Array:
        """Natural logarithm of det J, float32 [D, H, W] on the fixed grid; of a run with `output.jacobian=true`."""
        path, fixed = self._output("jacobians"), self.fixed.geometry

        def read() -> npt.NDArray[np.float32]:
            array, own = read_on_grid(path, fixed)
            return np.ascontiguousarray(from_file_axes(array.astype(np.float32), own))

        return _lazy(read, fixed.shape, np.float32)

    @property
    def matches(self) -> pa.Table:
        """Its rows of the table `correspondences`, best first."""
        return pair_rows(self.folder.root, "correspondences", self.name).sort_by("rank")

    @property
    def metrics(self) -> pa.Table:
        """Its rows of the table `metrics`, by label."""
        return pair_rows(self.folder.root, "metrics", self.name).sort_by("label")

    def _output(self, kind: str) -> Path:
        path = self.folder.output(kind, self.name)
        if not path.exists():
            hint = "run with output.jacobian=true" if kind == "jacobians" else "samreg status says why"
            raise UsageError(f"pair {self.name!r} has no file in {kind}/: {hint}")
        return path


class OpenStudy:
    """A study folder, opened: tables, subjects, pairs, and plots of a pair.

    Args:
        root: the folder.

    Raises:
        UsageError: for a folder that is no study.
    """

    def __init__(self, root: str | Path) -> None:
        if is_remote(root):
            raise UsageError(f"{root}: open_study needs a folder; copy the study first, as by aws s3 sync {root} study")
        self.folder = StudyFolder(Path(root))
        plan = self.folder.latest_plan()
        self._subjects = {subject.subject: subject for subject in planned_subjects(plan)}
        self._pairs = {pair.pair: pair for pair in planned_pairs(plan) or ()}

    def __repr__(self) -> str:
        shown = f"{len(self.subjects)} subjects, {len(self.pairs)} pairs, tables {', '.join(self.tables)}"
        return f"OpenStudy({str(self.folder.root)!r}: {shown})"

    @property
    def tables(self) -> list[str]:
        """Names of the tables that have rows."""
        return [name for name in tables.SCHEMAS if tables.part_names(self.folder.root, name)]

    @property
    def subjects(self) -> list[str]:
        """Names of the subjects, in the order of the manifest."""
        return list(self._subjects)

    @property
    def pairs(self) -> list[str]:
        """Names of the pairs."""
        return list(self._pairs)

    def table(self, name: str) -> ds.Dataset:
        """A table as an Arrow dataset: `.to_table(columns=..., filter=...)` reads what is asked for.

        Raises:
            UsageError: for a name that is none, with the most like it.
        """
        _find(name, dict.fromkeys(tables.SCHEMAS), "table", self.folder.root)
        return dataset(self.folder.root, name)

    def frame(self, name: str) -> DataFrame:
        """A table as a Dask dataframe, a part to a partition; raises as `table`, and for one without rows."""
        import dask.dataframe as dd

        if name not in self.tables:
            self.table(name)
            raise UsageError(f"{self.folder.root}: table {name!r} has no rows yet; it has {', '.join(self.tables)}")
        frame: DataFrame = dd.read_parquet(part_paths(self.folder.root, name))
        return frame

    def subject(self, name: str) -> OpenSubject:
        """A subject; raises UsageError for one that is not in the study, with the names most like it."""
        return OpenSubject(self.folder, _find(name, self._subjects, "subject", self.folder.root))

    def pair(self, name: str) -> OpenPair:
        """A pair; raises UsageError for one that is not in the study, with the names most like it."""
        found: Pair = _find(name, self._pairs, "pair", self.folder.root)
        return OpenPair(self.folder, found.pair, self.subject(found.fixed), self.subject(found.moving))

    def overlay(self, pair: str, slice_index: int | None = None) -> Figure:
        """Fixed in green and moving in magenta, before and after; of the middle fixed slice if none is given."""
        from pipeline.notebook_plots import draw_overlay

        return draw_overlay(self.pair(pair), slice_index)

    def matches(self, pair: str, slice_index: int | None = None, most: int = 7) -> Figure:
        """The best matched ROIs of a fixed slice in matching colours; of the slice with most if none is given."""
        from pipeline.notebook_plots import draw_matches

        return draw_matches(self.pair(pair), slice_index, most)

    def grid(self, pair: str, slice_index: int | None = None) -> Figure:
        """Where a regular grid on a fixed slice is taken from, over the length of the displacement."""
        from pipeline.notebook_plots import draw_grid

        return draw_grid(self.pair(pair), slice_index)


def _lazy(read: Callable[[], npt.NDArray[Any]], shape: tuple[int, ...], kind: type) -> da.Array:
    array: da.Array = da.from_delayed(delayed(read)(), shape, np.dtype(kind))
    return array


def _find(name: str, known: Mapping[str, Any], what: str, root: Path) -> Any:
    if name in known:
        return known[name]
    near = get_close_matches(name, known, n=3) or list(known)[:3]
    raise UsageError(f"{root} has no {what} {name!r}; did you mean {', '.join(near) or 'another study'}?")
