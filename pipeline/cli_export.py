"""`samreg export` and `samreg apply`: the commands, as functions for the command line to mount."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

if TYPE_CHECKING:
    from pipeline.dispatch import Failure
    from storage.warping import LabelRule

SHOWN = 20
OutOption = Annotated[Path, typer.Option("--out", help="Folder to write to.")]
RuleOption = Annotated[
    str, typer.Option("--label-rule", help="nearest, or linear: where the interpolated label is 0.5 or more.")
]


def export(
    study: Annotated[Path, typer.Argument(help="Study folder, which samreg run has written.")],
    *,
    out: OutOption,
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="Transforms: itk, nifti, ants, learn2reg; tables: csv, duckdb. Repeatable."),
    ] = None,
    pairs: Annotated[list[str] | None, typer.Option("--pairs", help="Name of a pair; repeatable. All.")] = None,
    images: Annotated[bool, typer.Option("--images", help="Also the warped moving images.")] = False,
    labels: Annotated[bool, typer.Option("--labels", help="Also the warped moving labels.")] = False,
    label_rule: RuleOption = "nearest",
    dense: Annotated[
        bool, typer.Option("--dense", help="itk: a vector for every voxel, not a coarse lattice.")
    ] = False,
    dataset: Annotated[
        Path | None, typer.Option("--dataset", help="learn2reg: dataset JSON that says which pairs a submission needs.")
    ] = None,
    part: Annotated[str, typer.Option("--part", help="Pairs of the dataset JSON: val, training or test.")] = "val",
    scores: Annotated[
        bool, typer.Option("--scores", help="learn2reg: check the files, and score them as its evaluator does.")
    ] = False,
) -> None:
    """Write the transforms of a study for other programs, warped images and labels, and its tables."""
    from pipeline.errors import UsageError
    from pipeline.export import ExportRequest, export_study
    from pipeline.export_tables import export_tables
    from pipeline.pair_files import read_study_pairs
    from pipeline.submission import score_submission, wanted_pairs

    if (scores or dataset) and "learn2reg" not in (formats or ()):
        raise UsageError("--dataset and --scores are for --format learn2reg")
    if dataset and pairs:
        raise UsageError("--dataset says which pairs there are; leave out --pairs")

    request = ExportRequest(tuple(formats or ("itk",)), dense, images, labels, cast("LabelRule", label_rule))
    for path in export_tables(study, out, request.table_formats) if request.table_formats else ():
        typer.echo(str(path))
    if not request.of_pairs:
        return
    known = read_study_pairs(study)
    names, absent = wanted_pairs(known, dataset, part) if dataset else (pairs or (), [])
    summary = export_study(study, out, request, names)
    typer.echo(f"{out}: {summary.done} pairs")
    failures = list(summary.failures)
    if scores:
        failed = {failure.unit for failure in failures}
        written = [known.find(name) for name in names or known.pairs if name not in failed]
        table, refused = score_submission(known, out, written)
        typer.echo(f"{table}: {len(written) - len(refused)} scores")
        failures += refused
    for pair in absent:
        typer.echo(f"{dataset} lists {pair}, which the study does not have", err=True)
    end_with(failures)
    if absent:
        raise typer.Exit(1)


def apply(
    transform: Annotated[Path, typer.Argument(help="Study folder, or a transform file.")],
    pair: Annotated[str | None, typer.Argument(help="Name of a pair of the study.")] = None,
    *,
    out: OutOption,
    image: Annotated[list[str] | None, typer.Option("--image", help="Moving image to warp; repeatable.")] = None,
    labels: Annotated[list[str] | None, typer.Option("--labels", help="Moving labels to warp; repeatable.")] = None,
    landmarks: Annotated[
        list[str] | None, typer.Option("--landmarks", help="CSV of points in the fixed image, taken to the moving.")
    ] = None,
    moving_landmarks: Annotated[
        list[str] | None,
        typer.Option("--moving-landmarks", help="CSV of points in the moving image, taken to the fixed."),
    ] = None,
    rois: Annotated[bool, typer.Option("--rois", help="Warp the moving subject's matched ROIs, a frame each.")] = False,
    fixed: Annotated[str | None, typer.Option("--fixed", help="Fixed image of a transform file.")] = None,
    moving: Annotated[str | None, typer.Option("--moving", help="Moving image of a transform file.")] = None,
    label_rule: RuleOption = "nearest",
    fill: Annotated[float, typer.Option("--fill", help="Intensity where the moving image does not reach.")] = 0.0,
) -> None:
    """Apply a transform to files: images and labels onto the fixed grid, landmarks either way."""
    from pipeline.apply import Job, Options, file_mapping, pair_mapping
    from pipeline.apply import apply as apply_to
    from pipeline.errors import UsageError

    if label_rule not in ("nearest", "linear"):
        raise UsageError(f"--label-rule {label_rule} is not one of nearest, linear")
    if pair is None and transform.is_dir():
        raise UsageError(f"{transform} is a folder: name a pair of the study too, or give a transform file")
    if pair is not None and (fixed or moving):
        raise UsageError("--fixed and --moving are for a transform file; a study knows its images")
    given = {"image": image, "labels": labels, "landmarks": landmarks, "moving_landmarks": moving_landmarks}
    jobs = [Job(kind, path) for kind, paths in given.items() for path in paths or ()]
    jobs += [Job("rois", "")] * rois
    mapping = file_mapping(transform, fixed, moving) if pair is None else pair_mapping(transform, pair)
    done, failures = apply_to(mapping, jobs, out, Options(cast("LabelRule", label_rule), fill))
    for path in done:
        typer.echo(str(path))
    end_with(failures)


def end_with(failures: Sequence[Failure]) -> None:
    """Say what failed; exit code 1 if anything did."""
    for failure in failures[:SHOWN]:
        typer.echo(f"failed {failure.unit}: {failure.message}", err=True)
    if len(failures) > SHOWN:
        typer.echo(f"and {len(failures) - SHOWN} more failures", err=True)
    if failures:
        raise typer.Exit(1)
