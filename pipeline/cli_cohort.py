"""`samreg cohort rois`: the command, as a function for the command line to mount."""

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
