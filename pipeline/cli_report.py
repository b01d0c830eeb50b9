"""`samreg report`: the command, as a function for the command line to mount."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    study: Annotated[Path, typer.Argument(help="Study folder.")],
    cohort: Annotated[
        Path | None, typer.Option("--cohort", help="Its manifest, if it has moved since the run.")
    ] = None,
) -> None:
    """Write a self-contained HTML report with pictures into STUDY/report."""
    from pipeline.report import write_report

    typer.echo(write_report(study, cohort))
