"""`samreg demo`: the command, as a function for the command line to mount."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the cohort and the study.")] = Path("demo"),
    subjects: Annotated[int, typer.Option("--subjects", min=2, help="Subjects to make.")] = 4,
    depth: Annotated[int, typer.Option("--depth", min=1, help="Slices of each; 1 makes 2D pictures.")] = 12,
    size: Annotated[int, typer.Option("--size", min=32, help="Rows and columns of a slice.")] = 96,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the cohort.")] = 0,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; repeatable.")
    ] = None,
) -> None:
    """Make a small cohort with known deformations, register all its pairs, and write a report."""
    from rich.console import Console

    from pipeline.demo import result_table, run_demo
    from pipeline.progress import Reporter

    console = Console()
    console.print(f"making {subjects} subjects with known deformations in {out / 'cohort'}")
    done = run_demo(out, subjects, (depth, size, size), seed, overrides or [], Reporter(Console(stderr=True)))
    console.print(result_table(done))
    console.print(f"{done.summary.seconds:.1f} s; report with pictures: {done.report.resolve()}", soft_wrap=True)
    if done.summary.n_failures:
        console.print(f"{done.summary.n_failures} failures, see samreg status {done.study}")
        raise typer.Exit(1)
