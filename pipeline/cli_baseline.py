"""`samreg baseline`: the command, as a function for the command line to mount."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pipeline.baseline_methods import METHODS

LOG_WIDTH = 160


def baseline(
    study: Annotated[Path, typer.Argument(help="Study folder, which samreg run has written.")],
    *,
    methods: Annotated[
        list[str],
        typer.Option("--method", help=f"{', '.join(METHODS)}, or all that are here; repeatable.", show_default=False),
    ],
    network: Annotated[
        Path | None, typer.Option("--network", help="TorchScript file that predicts a field, for torchscript.")
    ] = None,
    executor: Annotated[str | None, typer.Option("--executor", help="auto, ray or serial.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", help="Worker processes.")] = None,
) -> None:
    """Register the pairs of a study with the usual tools: STUDY/baselines; exit code 1 if any failed."""
    from pipeline.baseline_methods import choose
    from pipeline.baseline_table import describe_baselines
    from pipeline.baselines import run_baselines
    from pipeline.progress import Reporter

    console = Console(stderr=True, width=None if sys.stderr.isatty() else LOG_WIDTH)
    if "all" in methods:
        for name, method in METHODS.items():
            if reason := method.missing():
                console.print(f"without {name}: {reason}", soft_wrap=True)
    given = {"executor": executor, "workers": workers}
    execution = {setting: value for setting, value in given.items() if value is not None}
    summary = run_baselines(study, choose(methods, network), execution=execution, reporter=Reporter(console))
    console.print(str(summary.root), soft_wrap=True)
    console.print(describe_baselines(study))
    note = f"; {summary.n_failures} failures, see {summary.root / 'failures'}" if summary.n_failures else ""
    done, reused = sum(summary.done.values()), sum(summary.reused.values())
    console.print(f"{done} pairs registered, {reused} reused; {summary.seconds:.1f} s{note}", soft_wrap=True)
    if summary.n_failures:
        raise typer.Exit(1)
