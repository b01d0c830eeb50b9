"""`samreg submit`: the command, as a function for the command line to mount."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

PATHS = ("cohort", "out", "pairs")
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


def submit(
    context: typer.Context,
    *,
    address: Annotated[str, typer.Option("--address", envvar="RAY_ADDRESS", help="Dashboard: http://head-node:8265.")],
    python: Annotated[
        str, typer.Option("--python", envvar="REMOTE_PYTHON", help="Python of the nodes that has the packages.")
    ] = "python",
    environment: Annotated[
        list[str] | None, typer.Option("--env", metavar="NAME=VALUE", help="Variable of the job; repeatable.")
    ] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Print the job's id and leave it running.")] = False,
) -> None:
    """Run or resume a study as a job of a Ray cluster; all other options are those of `run`.

    Exit codes are those of `run`, and 3 when the job was stopped, killed or lost.
    """
    from pipeline import submit as job
    from pipeline.config import load_config
    from pipeline.errors import exit_code

    asked = _parse_run(context)
    config: Path | None = asked["config"]
    words = list(context.args)
    if config is not None and not config.is_file():
        raise job.SubmitError(f"{config}: no such configuration file here; it is sent with the job")
    variables = job.check_environment(environment or [])
    if asked["executor"] is None and load_config(config, asked["overrides"] or []).execution.executor == "auto":
        words += ["--executor", "ray"]
    command = job.run_command(python, words, config)
    job.check_paths({f"--{name}": None if asked[name] is None else str(asked[name]) for name in PATHS})
    with tempfile.TemporaryDirectory() as folder:
        job.pack(Path(folder), config)
        client = job.connect(address)
        name = job.submit(client, command, Path(folder), variables)
    how_to_follow = job.how_to_follow(name, address, str(asked["out"]))
    typer.echo(f"{name}\n{how_to_follow}", err=not no_wait)
    if no_wait:
        return
    try:
        outcome = job.follow(client, name, lambda text: typer.echo(text, nl=False))
    except KeyboardInterrupt as stop:
        typer.echo(f"samreg: no longer following; the job goes on\n{how_to_follow}", err=True)
        raise typer.Exit(exit_code(stop)) from None
    if outcome.message:
        typer.echo(f"samreg: {outcome.message}", err=True)
    raise typer.Exit(outcome.code)


def _parse_run(context: typer.Context) -> dict[str, Any]:
    """The options of `run` as it will read them; wrong ones are refused here, before anything is sent."""
    root: Any = context.find_root().command
    parsed: dict[str, Any] = root.commands["run"].make_context("submit", list(context.args)).params
    return parsed
