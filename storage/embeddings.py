# mypy: disable-error-code="no-untyped-call"
"""The embedding store: one Zarr v3 group per subject, written by one process, visible only when whole.

    <root>/<subject key>/features    float16 [D, C, h, w], one slice per chunk
                         masks       uint8 [N, ceil(H * W / 8)], ROI masks packed along the row, 64 per chunk
                         roi_slice   int32 [N], quality float32 [N], stability float32 [N]
                         roi_class   int32 [N], only where the ROIs are classes
                         prototypes/ any arrays of the prototype stage, with a signature of their own

A writer works in a folder beside the store and renames it in at the end; the attribute `complete` is
written last. In an object store the folder is a local one, uploaded at the end: the group's `zarr.json` is the marker,
deleted before anything is replaced and written last. A prefix without it is absent, and written over.
"""

from __future__ import annotations

import errno
import fcntl
import json
import re
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from storage.atomic import clear_abandoned, is_abandoned, named_error, replace_file
from storage.cohort import subject_key
from storage.columns import create_column, open_array, read_column
from storage.geometry import Geometry
from storage.places import exists, names, place, put_folder, read_bytes, remove_tree
from storage.sources import is_remote
from storage.subject import SubjectEmbedding, SubjectWriter

__all__ = ["EmbeddingStore", "SubjectEmbedding", "SubjectWriter"]

LAYOUT_VERSION = 1


class EmbeddingStore:
    """The store at a folder or URL, say `study/embeddings.zarr`; opening creates nothing.

    Args:
        root: the store.
        pooled: another folder that holds the prototypes, on the same file system: the store's own stay untouched.
    """

    def __init__(self, root: str | Path, pooled: str | Path | None = None) -> None:
        self.root = place(root)
        self._pooled = place(pooled or root)
        self._aside = self.root.parent / f".{self.root.name}.wip"

    @contextmanager
    def writer(
        self,
        subject: str,
        signature: dict[str, Any],
        geometry: Geometry,
        layout: dict[str, Any],
        extent: tuple[float, float],
        mask_shape: tuple[int, int],
    ) -> Iterator[SubjectWriter]:
        """Write a subject anew; it replaces the old one on a clean exit and leaves it untouched on any other.

        Raises:
            ValueError: on exit, when slices are missing.
            OSError: naming the store, for example when the disk is full.
        """
        self._ensure_root()
        with self._folder_aside(subject) as folder:
            group = zarr.create_group(folder, zarr_format=3)
            writer = SubjectWriter(group, self._folder(subject), geometry.shape[0], mask_shape)
            yield writer
            writer.finish()
            group.attrs.update(
                {
                    "subject": subject,
                    "layout_version": LAYOUT_VERSION,
                    "signature": signature,
                    "geometry": geometry.to_dict(),
                    "layout": layout,
                    "extent": list(extent),
                    "mask_shape": list(mask_shape),
                    "features": "kept",
                    "complete": True,
                }
            )
            self._move_in(folder, self._folder(subject))

    def signature(self, subject: str) -> dict[str, Any] | None:
        """Signature of a whole subject, None when it is absent or incomplete."""
        record = _complete_attributes(self._folder(subject))
        return None if record is None else dict(record["signature"])

    def geometry(self, subject: str) -> Geometry:
        """Grid of a whole subject; reads no array.

        Raises:
            FileNotFoundError: when it is absent or incomplete.
        """
        return Geometry.from_dict(self._require(subject)["geometry"])

    def subjects(self) -> list[str]:
        """Names of the whole subjects, sorted."""
        found = (self.root / name for name in names(self.root) if name != "zarr.json")
        records = (_complete_attributes(folder) for folder in found)
        return sorted(str(record["subject"]) for record in records if record is not None)

    def read(self, subject: str) -> SubjectEmbedding:
        """Open a subject: columns are read, features and masks stay on disk until asked for.

        Raises:
            FileNotFoundError: when it is absent or incomplete.
        """
        folder = self._folder(subject)
        record = self._require(subject)
        kept = record["features"] == "kept"
        roi_slice = read_column(folder / "roi_slice")
        classes = exists(folder / "roi_class" / "zarr.json")
        return SubjectEmbedding(
            geometry=Geometry.from_dict(record["geometry"]),
            signature=record["signature"],
            layout=record["layout"],
            extent=(float(record["extent"][0]), float(record["extent"][1])),
            features=open_array(folder / "features") if kept else None,
            roi_slice=roi_slice,
            quality=read_column(folder / "quality"),
            stability=read_column(folder / "stability"),
            roi_class=read_column(folder / "roi_class") if classes else np.zeros_like(roi_slice),
            mask_shape=(int(record["mask_shape"][0]), int(record["mask_shape"][1])),
            packed=open_array(folder / "masks"),
        )

    def write_prototypes(self, subject: str, signature: dict[str, Any], arrays: dict[str, npt.NDArray[Any]]) -> None:
        """Replace the prototype arrays of a subject (names are identifiers; numbers and booleans, any shape).

        Raises:
            FileNotFoundError: when the subject is absent or incomplete.
            ValueError: for a name that is no identifier.
        """
        self._require(subject)
        bad = [name for name in arrays if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name)]
        if bad:
            raise ValueError(f"array names must be identifiers, got {bad}")
        with self._folder_aside(subject) as folder:
            group = zarr.create_group(folder, zarr_format=3)
            for name, values in arrays.items():
                create_column(group, name, values)
            group.attrs.update({"signature": signature, "arrays": list(arrays), "complete": True})
            target = self._prototypes(subject)
            self._move_in(folder, target)

    def has_features(self, subject: str) -> bool:
        """Whether a subject is whole and its feature maps were not dropped."""
        record = _complete_attributes(self._folder(subject))
        return record is not None and record["features"] == "kept"

    def prototypes_signature(self, subject: str) -> dict[str, Any] | None:
        """Signature of the prototype stage, None when the subject or its prototypes are absent; reads no array."""
        record = _complete_attributes(self._prototypes(subject))
        if record is None or _complete_attributes(self._folder(subject)) is None:
            return None
        return dict(record["signature"])

    def read_prototypes(self, subject: str) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]] | None:
        """Signature and arrays of the prototype stage, None when the subject or its prototypes are absent."""
        folder = self._prototypes(subject)
        record = _complete_attributes(folder)
        if record is None or _complete_attributes(self._folder(subject)) is None:
            return None
        arrays = {name: read_column(folder / name) for name in record["arrays"]}
        return record["signature"], arrays

    def prototype_shape(self, subject: str) -> tuple[int, ...]:
        """[N, C] of the prototypes of a subject that has them; reads no array."""
        metadata = json.loads(read_bytes(self._prototypes(subject) / "prototypes" / "zarr.json"))
        return tuple(metadata["shape"])

    def drop_features(self, subject: str) -> None:
        """Delete the feature maps of a subject; masks, columns and prototypes stay.

        Raises:
            FileNotFoundError: when the subject is absent or incomplete.
        """
        self._require(subject)
        folder = self._folder(subject)
        metadata = json.loads(read_bytes(folder / "zarr.json"))
        if metadata["attributes"]["features"] != "dropped":
            metadata["attributes"]["features"] = "dropped"
            with replace_file(folder / "zarr.json") as temporary:
                temporary.write_text(json.dumps(metadata), encoding="utf-8")
        remove_tree(folder / "features")

    def clear_abandoned(self) -> None:
        """Delete what killed writers left in the store and beside it; on their machine where that is local."""
        if is_remote(self.root):
            return
        if self.root.is_dir():
            clear_abandoned([self.root, *(path for path in self.root.iterdir() if path.is_dir())])
        for lock in self._aside.glob("*.lock"):
            if is_abandoned(lock):
                _remove_aside(lock)

    def _folder(self, subject: str) -> Path:
        return self.root / subject_key(subject)

    def _prototypes(self, subject: str) -> Path:
        return self._pooled / subject_key(subject) / "prototypes"

    def _require(self, subject: str) -> dict[str, Any]:
        record = _complete_attributes(self._folder(subject))
        if record is None:
            raise FileNotFoundError(
                errno.ENOENT, f"no whole embedding of subject {subject!r}; encode it first", str(self.root)
            )
        return record

    def _ensure_root(self) -> None:
        if not exists(self.root / "zarr.json"):
            with replace_file(self.root / "zarr.json") as temporary:
                temporary.write_text(
                    json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {}}), encoding="utf-8"
                )

    @contextmanager
    def _folder_aside(self, subject: str) -> Iterator[Path]:
        """A folder of its own to write in, locked while this process lives, gone afterwards in any case."""
        if is_remote(self.root):
            with tempfile.TemporaryDirectory(prefix="samreg-") as temporary:
                yield Path(temporary) / "subject"
            return
        key = subject_key(subject)
        name = f"{key}-{secrets.token_hex(4)}"
        try:
            self._aside.mkdir(parents=True, exist_ok=True)
            with (self._aside / f"{name}.lock").open("wb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield self._aside / name
        except OSError as error:
            raise named_error(error, self.root / key) from error.__cause__
        finally:
            _remove_aside(self._aside / f"{name}.lock")

    def _move_in(self, folder: Path, target: Path) -> None:
        if is_remote(target):
            put_folder(folder, target, last="zarr.json")
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        old = folder.with_name(f"{folder.name}.old")
        for _ in range(8):
            if target.exists():
                target.rename(old)
            try:
                folder.rename(target)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                remove_tree(old)  # another process moved in between; its work is replaced
            else:
                return
        raise OSError(errno.EBUSY, "other processes keep writing the same subject", str(target))


def _remove_aside(lock: Path) -> None:
    folder = lock.with_suffix("")
    remove_tree(folder)
    remove_tree(folder.with_name(f"{folder.name}.old"))
    lock.unlink(missing_ok=True)


def _complete_attributes(folder: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(read_bytes(folder / "zarr.json"))["attributes"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        return None
    return record if record.get("complete") is True else None
