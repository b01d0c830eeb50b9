"""`samreg sweep`: the command, as a function for the command line to mount."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

LOG_WIDTH = 160


def sweep(
    study: Annotated[Path, typer.Argument(help="Study folder, which samreg run has written.")],
    grid: Annotated[Path | None, typer.Argument(help="YAML file: dotted settings, each with a list of values.")] = None,
    *,
    axes: Annotated[
        list[str] | None, typer.Option("--grid", metavar="KEY=VALUE,VALUE", help="Values of a setting; repeatable.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting for all; repeatable.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Folder under STUDY/sweeps.")] = None,
    pairs: Annotated[
        str | None, typer.Option("--pairs", help="Other pairs than those of the run: a file or a mode.")
    ] = None,
    executor: Annotated[str | None, typer.Option("--executor", help="auto, ray or serial.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", help="Worker processes.")] = None,
    keep_transforms: Annotated[
        bool, typer.Option("--keep-transforms", help="Keep the displacement fields of every combination.")
    ] = False,
) -> None:
    """Match and fit an encoded study again for every combination of some settings; nothing is encoded."""
    import pyarrow.parquet as pq

    from pipeline.progress import Reporter
    from pipeline.sweep import run_sweep
    from pipeline.sweep_grid import read_grid
    from pipeline.sweep_tables import describe_sweep

    console = Console(stderr=True, width=None if sys.stderr.isatty() else LOG_WIDTH)
    asked = read_grid(grid, axes or (), overrides or ())
    given = {"executor": executor, "workers": workers}
    execution = {setting: value for setting, value in given.items() if value is not None}
    summary = run_sweep(
        study,
        asked,
        name=name,
        pairs=pairs,
        execution=execution,
        keep_transforms=keep_transforms,
        reporter=Reporter(console),
    )
    console.print(str(summary.root), soft_wrap=True)
    console.print(describe_sweep(pq.read_table(summary.root / "sweep.parquet"), list(asked.axes)))
    note = f"; {summary.n_failures} failures, see the failures tables of its combinations" if summary.n_failures else ""
    console.print(f"{summary.seconds:.1f} s{note}")
    if summary.n_failures:
        raise typer.Exit(1)
