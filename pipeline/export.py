# mypy: disable-error-code="no-untyped-call"
"""`samreg export`: the transforms of a study as files for other programs, with warped images and labels.

    OUT/sub-<fixed>/sub-<fixed>_from-<moving>_mode-image_xfm.h5       itk: the composite as it is stored, or dense
                    ..._desc-affine_mode-image_xfm.tfm                itk: the affine part alone
                    ..._mode-image_xfm.nii.gz                         nifti: displacement vectors
                    ..._0GenericAffine.mat ..._1Warp.nii.gz           ants: -t 1Warp.nii.gz -t 0GenericAffine.mat
                    ..._image.nii.gz ..._dseg.nii.gz                  moving image and labels on the fixed grid
    OUT/disp_<fixed>_<moving>.nii.gz                                  learn2reg

The formats of `pipeline.export_tables` are for the tables.

Names follow BIDS derivatives: `mode-image` is a transform that warps images of `from` onto the grid of `sub`, and
labels are the letters and digits of the subject's name.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import SimpleITK as sitk  # noqa: N813 (its own documentation's name)

from pipeline.dispatch import Failure, attempt
from pipeline.errors import StudyError, UsageError
from pipeline.export_tables import TABLE_FORMATS
from pipeline.pair_files import PairUnit, bids_labels, bids_stems, learn2reg_names, read_study_pairs
from storage import exports, warping
from storage.atomic import clear_abandoned, replace_file
from storage.cohort import Pair, Subject
from storage.geometry import Geometry
from storage.images import read_labels
from storage.itk_hdf5 import encode
from storage.transforms import read_transform, transform_signature

FORMATS = ("itk", "nifti", "ants", "learn2reg", *TABLE_FORMATS)


@dataclass(frozen=True)
class ExportRequest:
    """What to write.

    Attributes:
        formats: some of FORMATS.
        dense: give the ITK composite a vector for every voxel.
        images, labels: also warp the moving image, its labels, of the manifest.
        rule: how labels are warped, `nearest` or `linear`.
    """

    formats: tuple[str, ...] = ("itk",)
    dense: bool = False
    images: bool = False
    labels: bool = False
    rule: warping.LabelRule = "nearest"

    def __post_init__(self) -> None:
        unknown = sorted(set(self.formats) - set(FORMATS))
        if unknown:
            raise UsageError(f"--format {unknown[0]} is not one of {', '.join(FORMATS)}")
        if self.rule not in ("nearest", "linear"):
            raise UsageError(f"--label-rule {self.rule} is not one of nearest, linear")

    @property
    def table_formats(self) -> tuple[str, ...]:
        """Those of the formats that hold tables."""
        return tuple(name for name in self.formats if name in TABLE_FORMATS)

    @property
    def of_pairs(self) -> bool:
        """Whether anything is to be written for each pair."""
        return self.images or self.labels or len(self.table_formats) < len(self.formats)


@dataclass(frozen=True)
class ExportSummary:
    """Pairs that were written, and why others were not."""

    done: int
    failures: tuple[Failure, ...]


@dataclass(frozen=True)
class PairExport:
    """One pair: its transform, its grids and where it goes.

    Attributes:
        pair: the names.
        source: transform file of the study.
        fixed, moving: grids of the images.
        subject: manifest row of the moving subject.
        stem: what the files of the pair begin with; learn2reg: the one that is named otherwise.
    """

    pair: Pair
    source: Path
    fixed: Geometry
    moving: Geometry
    subject: Subject
    stem: Path
    learn2reg: Path

    def file(self, ending: str) -> Path:
        """A file of the pair."""
        return self.stem.with_name(self.stem.name + ending)


def export_study(study: Path, out: Path, request: ExportRequest, names: Collection[str] = ()) -> ExportSummary:
    """Export the pairs of these names, or all pairs of the latest run; a pair that fails costs only itself.

    Raises:
        UsageError: for a folder that holds no study, a pair that it does not have, labels of nobody.
        StudyError: when the disk is full.
    """
    known = read_study_pairs(study)
    wanted = [known.find(name) for name in names] or list(known.pairs.values())
    if request.labels and not any(subject.label for subject in known.subjects.values()):
        raise UsageError(f"{study}: no subject has labels; leave out --labels, or run with a manifest that names them")
    stems, listed = bids_stems(known.pairs.values(), bids_labels(known.subjects)), learn2reg_names(wanted)
    clear_abandoned({out, *(out / stem.partition("/")[0] for stem in stems.values())})

    def export_one(unit: PairUnit) -> None:
        pair = unit.pair
        moving = known.subjects[pair.moving]
        files = (known.transform(pair), *known.grids(pair), moving, out / stems[pair.pair], out / listed[pair.pair])
        export_pair(PairExport(pair, *files), request)

    failures = []
    for pair in wanted:
        failure = attempt(export_one, PairUnit(pair))
        if failure is not None:
            if failure.disk_full:
                raise StudyError(f"{failure.message}; what is written is kept. Free space and run the command again")
            failures.append(failure)
    return ExportSummary(len(wanted) - len(failures), tuple(failures))


def export_pair(files: PairExport, request: ExportRequest) -> None:
    """Write one pair in every form asked for.

    Raises:
        FileNotFoundError, TransformError: for a transform that is missing or damaged.
        ImageError: for an image or labels that cannot be used.
        OSError: naming the file, for example when the disk is full.
    """
    for name in request.formats:
        if name in _WRITERS:
            _WRITERS[name](files, request)
    if not (request.images or request.labels):
        return
    transform = warping.read_itk_transform(files.source)
    if request.images:
        image = warping.read_moving(files.subject.image, files.moving)
        _write_warped(warping.warp_intensities(image, transform, files.fixed), files, "image")
    if request.labels and files.subject.label:
        values = warping.compact(read_labels(files.subject.label, files.moving))
        image = warping.from_analysis(values, files.moving)
        _write_warped(warping.warp_labels(image, transform, files.fixed, request.rule), files, "dseg")


def _write_itk(files: PairExport, request: ExportRequest) -> None:
    transform, target = read_transform(files.source), files.file("_mode-image_xfm.h5")
    with replace_file(target) as temporary:
        if request.dense:
            temporary.write_bytes(encode(transform.dense(files.fixed), transform_signature(files.source) or {}))
        else:
            shutil.copyfile(files.source, temporary)
    affine = exports.affine_transform(transform)
    exports.write_affine(affine, files.file("_desc-affine_mode-image_xfm.tfm"))


def _write_nifti(files: PairExport, request: ExportRequest) -> None:
    image = exports.displacement_image(read_transform(files.source), files.fixed)
    warping.write_image(image, files.file("_mode-image_xfm.nii.gz"))


def _write_ants(files: PairExport, request: ExportRequest) -> None:
    transform = read_transform(files.source)
    exports.write_affine(exports.affine_transform(transform), files.file("_0GenericAffine.mat"))
    warping.write_image(exports.offset_image(transform, files.fixed), files.file("_1Warp.nii.gz"))


def _write_learn2reg(files: PairExport, request: ExportRequest) -> None:
    image = exports.voxel_displacement_image(read_transform(files.source), files.fixed, files.moving)
    warping.write_image(image, files.learn2reg)


_WRITERS: Mapping[str, Callable[[PairExport, ExportRequest], None]] = {
    "itk": _write_itk,
    "nifti": _write_nifti,
    "ants": _write_ants,
    "learn2reg": _write_learn2reg,
}


def _write_warped(image: sitk.Image, files: PairExport, name: str) -> None:
    """As a picture where the fixed image is one and the voxels are of a kind that pictures hold, else as NIfTI."""
    shown = image.GetPixelID() in (sitk.sitkUInt8, sitk.sitkUInt16, sitk.sitkVectorUInt8, sitk.sitkVectorUInt16)
    picture = shown and not files.fixed.has_spacing
    warping.write_image(image, files.file(f"_{name}.png" if picture else f"_{name}.nii.gz"))
