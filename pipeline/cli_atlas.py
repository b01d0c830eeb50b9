"""`samreg atlas`: the command, as a function for the command line to mount."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

LOG_WIDTH = 160


def atlas(
    study: Annotated[Path, typer.Argument(help="Study folder, whose subjects samreg run has encoded.")],
    *,
    reference: Annotated[
        str | None, typer.Option("--reference", help="Subject to start from; the one most like all others.")
    ] = None,
    iterations: Annotated[int | None, typer.Option("--iterations", help="At most so many.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of atlas, match or fit; repeatable."),
    ] = None,
    executor: Annotated[str | None, typer.Option("--executor", help="auto, ray or serial.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", help="Worker processes.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="For the template: auto, cpu or cuda.")] = None,
) -> None:
    """Make an unbiased population template of a study: STUDY/atlas; exit code 1 if subjects had to be left out."""
    from pipeline.atlas import run_atlas
    from pipeline.atlas_tables import describe
    from pipeline.progress import Reporter

    console = Console(stderr=True, width=None if sys.stderr.isatty() else LOG_WIDTH)
    name = None if reference is None else json.dumps(reference, ensure_ascii=False)  # 067 is a name, not a number
    flags = {"reference": name, "iterations": iterations}
    settings = [*(overrides or []), *(f"atlas.{name}={value}" for name, value in flags.items() if value is not None)]
    given = {"executor": executor, "workers": workers, "device": device}
    execution = {setting: value for setting, value in given.items() if value is not None}
    summary = run_atlas(study, settings, execution=execution, reporter=Reporter(console))
    console.print(str(summary.root), soft_wrap=True)
    console.print(describe([outcome.rows for outcome in summary.iterations]))
    end = "settled" if summary.settled else "not settled yet"
    note = f"; {summary.n_failures} failures, see {summary.root / 'failures'}" if summary.n_failures else ""
    console.print(f"from {summary.reference}, {end}; {summary.seconds:.1f} s{note}", soft_wrap=True)
    if summary.n_failures:
        raise typer.Exit(1)
