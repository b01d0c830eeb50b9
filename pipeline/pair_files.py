"""The pairs of a finished study by name: their rows, transforms and grids, and names for files made from them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from pipeline.errors import UsageError
from pipeline.folder import StudyFolder
from pipeline.record import planned_pairs, planned_subjects
from storage import tables
from storage.cohort import Pair, Subject, subject_key
from storage.geometry import Geometry
from storage.signature import digest
from storage.transforms import transform_signature

_LEARN2REG = re.compile(r".*?(\d{4})(_\d{4})?")


@dataclass(frozen=True)
class PairUnit:
    """A pair as a unit of work, named in failures by the pair."""

    pair: Pair

    @property
    def unit(self) -> str:
        """Name of the pair."""
        return self.pair.pair


@dataclass(frozen=True)
class StudyPairs:
    """Pairs and subjects of the latest run of a study.

    Attributes:
        folder: of the study.
        pairs: by name.
        subjects: manifest rows by name.
        keys: fit key of every pair; None where an input could not be read.
    """

    folder: StudyFolder
    pairs: Mapping[str, Pair]
    subjects: Mapping[str, Subject]
    keys: Mapping[str, str | None]

    def find(self, name: str) -> Pair:
        """The pair of a name.

        Raises:
            UsageError: naming the pairs most like it.
        """
        if name not in self.pairs:
            near = get_close_matches(name, self.pairs, n=3) or list(self.pairs)[:3]
            raise UsageError(f"{self.folder.root} has no pair {name!r}; it has {', '.join(near)} …")
        return self.pairs[name]

    def transform(self, pair: Pair) -> Path:
        """Its transform file.

        Raises:
            FileNotFoundError: when the pair has none, or one of an earlier run that the latest was to replace.
        """
        path = self.folder.transform(pair.pair)
        if not path.exists():
            raise FileNotFoundError(f"{path}: pair {pair.pair} has no transform; samreg status says why")
        key, signature = self.keys[pair.pair], transform_signature(path)
        if key and signature and signature.get("key") != key:
            raise FileNotFoundError(f"{path}: pair {pair.pair} was fitted otherwise; samreg run makes it again")
        return path

    def grids(self, pair: Pair) -> tuple[Geometry, Geometry]:
        """Grid of its fixed and of its moving image."""
        store = self.folder.store
        return store.geometry(pair.fixed), store.geometry(pair.moving)


def read_study_pairs(study: Path) -> StudyPairs:
    """Read what the latest run was asked for.

    Raises:
        UsageError: for a folder without pairs.
    """
    folder = StudyFolder(study)
    plan = folder.read_plan()
    pairs = planned_pairs(plan) if plan else None
    if not plan or not pairs:
        raise UsageError(f"{study} holds no registered pairs; make some with samreg run")
    keys = dict(zip(plan["pairs"]["pair"], plan["pairs"]["fit"], strict=True))
    return StudyPairs(folder, {p.pair: p for p in pairs}, {s.subject: s for s in planned_subjects(plan)}, keys)


def part_paths(root: Path, name: str) -> list[str]:
    """Files of a table; those that are being written are hidden beside them."""
    return [str(root / name / f"{part}.parquet") for part in tables.part_names(root, name)]


def dataset(root: Path, name: str) -> ds.Dataset:
    """A table as an Arrow dataset, of which nothing is read yet."""
    schema, paths = tables.SCHEMAS[name], part_paths(root, name)
    return (
        ds.dataset(paths, schema=schema, format="parquet") if paths else ds.dataset(pa.Table.from_batches([], schema))
    )


def pair_rows(root: Path, name: str, pair: str) -> pa.Table:
    """Rows of one pair; of the parts, only what may hold some is read."""
    return dataset(root, name).to_table(filter=pc.field("pair") == pair)


def bids_labels(subjects: Iterable[str]) -> dict[str, str]:
    """The letters and digits of each subject's name, which is all that BIDS allows; a hash more where two are equal."""
    plain = {name: "".join(re.findall("[A-Za-z0-9]", name)) for name in subjects}
    count = Counter(label.lower() for label in plain.values())
    return {
        name: label if label and count[label.lower()] == 1 else f"{label}{digest(name)[:8]}"
        for name, label in plain.items()
    }


def bids_stems(pairs: Iterable[Pair], labels: Mapping[str, str]) -> dict[str, str]:
    """`sub-<fixed>/sub-<fixed>_from-<moving>` by pair; `_run-2` and so on for other pairs of the same subjects."""
    stems, seen = {}, Counter[str]()
    for pair in pairs:
        stem = f"sub-{labels[pair.fixed]}/sub-{labels[pair.fixed]}_from-{labels[pair.moving]}"
        seen[stem] += 1
        stems[pair.pair] = stem if seen[stem] == 1 else f"{stem}_run-{seen[stem]}"
    return stems


def learn2reg_names(pairs: Collection[Pair]) -> dict[str, str]:
    """`disp_<fixed>_<moving>.nii.gz` by pair: four digits each where subjects are named as Learn2Reg's, else names.

    Where two pairs have the same subjects, `disp_<pair>.nii.gz`.
    """
    names: Sequence[str] = [name for pair in pairs for name in (pair.fixed, pair.moving)]
    found = [_LEARN2REG.fullmatch(name) for name in names]
    short = [match[1] if match else "" for match in found]
    for ids in (short, [subject_key(name) for name in names]):
        listed = [f"disp_{fixed}_{moving}.nii.gz" for fixed, moving in zip(ids[::2], ids[1::2], strict=True)]
        if all(ids) and len(set(listed)) == len(listed):
            return dict(zip((pair.pair for pair in pairs), listed, strict=True))
    return {pair.pair: f"disp_{subject_key(pair.pair)}.nii.gz" for pair in pairs}
