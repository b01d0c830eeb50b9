"""`samreg doctor`: the command, as a function for the command line to mount."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli_place import parse_place

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def doctor(
    config: Annotated[Path | None, typer.Argument(help="YAML configuration, whose weights and device count.")] = None,
    *,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; repeatable.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="PATH|URL", parser=parse_place, help="Study folder or URL to try writing to."),
    ] = None,
    address: Annotated[
        str | None, typer.Option("--address", envvar="RAY_ADDRESS", help="Ray cluster: dashboard, or host:port.")
    ] = None,
    uri: Annotated[list[str] | None, typer.Option("--uri", help="Object to try reaching; repeatable.")] = None,
) -> None:
    """Check machine, cluster, storage and weights, and say what to fix; exit code 1 if anything fails."""
    from rich.console import Console
    from rich.table import Table

    from pipeline.config import load_config
    from pipeline.doctor import examine

    shown = Table("check", "", "found", "what to do")
    failed = False
    settings = load_config(config, overrides or [])
    try:
        for check in examine(settings, out, address, uri or []):
            shown.add_row(check.name, f"[{STYLES[check.state]}]{check.state}", check.found, check.advice)
            failed |= check.state == "fail"
    finally:
        Console().print(shown)
    if failed:
        raise typer.Exit(1)
