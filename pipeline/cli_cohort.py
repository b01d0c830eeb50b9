"""`samreg cohort from` and `samreg cohort rois`: the commands, as functions for the command line to mount."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def rois(
    study: Annotated[Path, typer.Argument(help="Study folder.")],
    min_paths: Annotated[
        float,
        typer.Option("--min-paths", help="Matches or cycles that must confirm a join; 2: surer, finds less."),
    ] = 1.0,
) -> None:
    """Say which ROIs of all subjects are the same structure: the table STUDY/cohort_rois."""
    from pipeline.cohort_rois import write_cohort_rois

    found = write_cohort_rois(study, min_paths)
    typer.echo(
        f"{study / 'cohort_rois'}: {found.cohort_rois} cohort ROIs from {found.tracks} of {found.of_tracks} tracks, "
        f"{found.frequent} in half of the subjects or more; {found.agreement:.0%} of the matches agree"
    )


def from_layout(
    layout: Annotated[str, typer.Argument(help="acdc, mnms, learn2reg, msd, promise12, fire, aerial or bids.")],
    root: Annotated[Path, typer.Argument(help="Folder of the data set, as it was published.")],
    out: Annotated[Path, typer.Option("--out", help="Manifest to write, CSV or Parquet.")],
    pairs: Annotated[
        Path | None, typer.Option("--pairs", help="Write the pairs that the data set defines, CSV or Parquet.")
    ] = None,
    select: Annotated[
        str,
        typer.Option(
            "--select",
            help="learn2reg: pairs of val, training or test; msd: modality (T2, ADC); fire: categories (A, P, S); "
            "aerial: A, B, A2B or B2A; bids: suffix (T1w).",
        ),
    ] = "",
) -> None:
    """Write a cohort manifest for a public data set; exit code 1 if parts of it are missing and were left out."""
    from storage.cohort import Cohort, write_cohort, write_pairs
    from storage.layouts.registry import read_layout

    found = read_layout(layout, root, out.parent / f"{out.stem}_files", select)
    if pairs is not None and not found.pairs:
        found.problems.append(
            f"{layout} defines no pairs here, {pairs} was not written; use --pairs of run (all, star, ...)"
        )
    write_cohort(Cohort(tuple(found.subjects)), out, found.columns)
    counts = [sum(1 for subject in found.subjects if getattr(subject, kind)) for kind in ("label", "landmarks")]
    typer.echo(f"{out}: {len(found.subjects)} subjects, {counts[0]} with labels, {counts[1]} with landmarks")
    if pairs is not None and found.pairs:
        write_pairs(found.pairs, pairs)
        typer.echo(f"{pairs}: {len(found.pairs)} pairs")
    for problem in found.problems:
        typer.echo(f"samreg: {problem}", err=True)
    if found.problems:
        raise typer.Exit(1)
