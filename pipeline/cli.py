"""The `samreg` command.

Exit codes: 0 all done, 1 something failed or is missing, 2 wrong usage, 130 interrupted, 143 ended by SIGTERM;
of `submit` also 3: the job was stopped, killed or lost.
"""

from __future__ import annotations

import functools
import io
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from pipeline import (
    cli_atlas,
    cli_baseline,
    cli_cohort,
    cli_demo,
    cli_doctor,
    cli_export,
    cli_query,
    cli_report,
    cli_submit,
    cli_sweep,
    cli_weights,
)
from pipeline.cli_place import parse_place, refuse_urls
from pipeline.errors import Terminated
from storage.redaction import RedactingFormatter, redact

if TYPE_CHECKING:
    from pipeline.config import StudyConfig

FAILED, USAGE = 1, 2
LOG_WIDTH = 120

app = typer.Typer(
    help="Registers the images of a cohort by pairs of regions found with the Segment Anything Model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
cohort_app = typer.Typer(help="Make cohort manifests; find what subjects share.", no_args_is_help=True)
config_app = typer.Typer(help="Look at configurations.", no_args_is_help=True)
app.add_typer(cohort_app, name="cohort")
app.add_typer(config_app, name="config")
weights_app = typer.Typer(help="Get, check and probe the weights of the SAM variants.", no_args_is_help=True)
app.add_typer(weights_app, name="weights")

ConfigPath = Annotated[Path | None, typer.Argument(help="YAML configuration; defaults without one.")]
CohortOption = Annotated[Path, typer.Option("--cohort", help="Cohort manifest, CSV or Parquet.")]
PairsOption = Annotated[
    str | None,
    typer.Option("--pairs", help="Pairs file, CSV or Parquet; or one of all, star, intra, knn, tree."),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; repeatable.")
]
OutOption = Annotated[
    Path, typer.Option("--out", metavar="PATH|URL", parser=parse_place, help="Study folder, or s3://bucket/study.")
]
ExecutorOption = Annotated[str | None, typer.Option("--executor", help="auto, ray or serial.")]
WorkersOption = Annotated[int | None, typer.Option("--workers", help="Worker processes.")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="auto, cpu or cuda.")]


@app.command()
def run(
    config: ConfigPath = None,
    *,
    cohort: CohortOption,
    out: OutOption,
    pairs: PairsOption = None,
    overrides: SetOption = None,
    executor: ExecutorOption = None,
    workers: WorkersOption = None,
    device: DeviceOption = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Encode again if made otherwise; remove fits not made again.")
    ] = False,
    until: Annotated[str, typer.Option("--until", help="Last stage to run: encode, prototypes, match or fit.")] = "fit",
) -> None:
    """Run or resume a study."""
    from pipeline.summary import print_summary

    console = Console(stderr=True, width=None if sys.stderr.isatty() else LOG_WIDTH)
    with _errors_as_exit_codes(out):
        from pipeline.progress import Reporter
        from pipeline.request import read_request
        from pipeline.study import run_study

        request = read_request(config, cohort, pairs, _with_flags(overrides, executor, workers, device))
        summary = run_study(
            request.config,
            request.cohort,
            out,
            request.pairs,
            request.unknown,
            overwrite=overwrite,
            until=until,
            reporter=Reporter(console),
        )
        print_summary(console, out, summary)
        code = FAILED if summary.n_failures else 0
    raise typer.Exit(code)


@app.command()
def plan(
    config: ConfigPath = None,
    *,
    cohort: CohortOption,
    out: OutOption = Path("study"),
    pairs: PairsOption = None,
    overrides: SetOption = None,
    executor: ExecutorOption = None,
    workers: WorkersOption = None,
    device: DeviceOption = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Run a few subjects in a temporary folder first, and scale that.")
    ] = False,
) -> None:
    """Say what `run` would do: subjects, slices, pairs, store size, memory and time, without doing it."""
    with _errors_as_exit_codes(out):
        from pipeline.plan import describe_plan, make_plan
        from pipeline.request import read_request

        request = read_request(config, cohort, pairs, _with_flags(overrides, executor, workers, device))
        typer.echo(redact(describe_plan(make_plan(request, out, probe))))


@app.command()
def status(
    study: Annotated[Path, typer.Argument(metavar="STUDY", parser=parse_place, help="Study folder or URL.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count what is done, failed and missing; exit code 1 if anything failed or is missing."""
    with _errors_as_exit_codes(study):
        from pipeline.status import describe_status, read_status

        found = read_status(study)
        typer.echo(json.dumps(found.to_dict()) if as_json else describe_status(found))
        code = 0 if found.complete else FAILED
    raise typer.Exit(code)


@cohort_app.command("scan")
def cohort_scan(
    folder: Annotated[Path, typer.Argument(help="Folder of images, BIDS or Learn2Reg dataset JSON.")],
    out: Annotated[Path, typer.Option("--out", help="Manifest to write, CSV or Parquet.")],
) -> None:
    """Write a cohort manifest for a folder, a BIDS dataset or a Learn2Reg dataset JSON."""
    with _errors_as_exit_codes(out):
        from storage.cohort import write_cohort
        from storage.layouts.scan import scan

        found = scan(folder)
        write_cohort(found, out)
        with_label = sum(1 for subject in found.subjects if subject.label)
        typer.echo(f"{out}: {len(found.subjects)} subjects, {with_label} with labels")


@config_app.command("show")
def config_show(config: ConfigPath = None, *, overrides: SetOption = None) -> None:
    """Print the resolved configuration, every default filled in."""
    import yaml

    typer.echo(yaml.safe_dump(_load(config, overrides).resolved(), sort_keys=False), nl=False)


@config_app.command("validate")
def config_validate(config: ConfigPath = None, *, overrides: SetOption = None) -> None:
    """Check a configuration; exit code 2 if it cannot be used."""
    _load(config, overrides)
    typer.echo(f"{config or 'defaults'}: valid")


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of the configuration."""
    from pipeline.config import StudyConfig

    typer.echo(json.dumps(StudyConfig.model_json_schema(), indent=2))


def _load(config: Path | None, overrides: list[str] | None) -> StudyConfig:
    with _errors_as_exit_codes(None):
        from pipeline.config import load_config

        found = load_config(config, overrides or [])
    return found


def _with_flags(
    overrides: list[str] | None, executor: str | None, workers: int | None, device: str | None
) -> list[str]:
    """`--executor`, `--workers` and `--device` are short for three settings."""
    given = {"executor": executor, "workers": workers, "device": device}
    return [*(overrides or []), *(f"execution.{name}={value}" for name, value in given.items() if value is not None)]


@contextmanager
def _errors_as_exit_codes(out: Path | None) -> Iterator[None]:
    """Expected errors become one clear line and an exit code; anything else is a bug and keeps its traceback."""
    from actors.sam_variants import CheckpointError, PackageMissingError
    from pipeline.dispatch import DISK_FULL
    from pipeline.errors import StudyError, UsageError, exit_code
    from pipeline.folder import study_root
    from storage.manifest import CohortError
    from storage.places import ObjectStoreError
    from storage.sources import ImageError
    from storage.tables import TableError
    from storage.transforms import TransformError

    try:
        if out is not None:
            study_root(out)
        yield
    except KeyboardInterrupt as stop:
        there = "" if out is None else f" in {out}"
        _stop(f"interrupted; what is finished is kept. Run the same command again to go on{there}", exit_code(stop))
    except (StudyError, ObjectStoreError) as error:
        _stop(str(error), FAILED)
    except (UsageError, CohortError, ImageError, TableError, TransformError) as error:
        _stop(str(error), USAGE)
    except (CheckpointError, PackageMissingError, FileNotFoundError, PermissionError) as error:
        _stop(str(error), USAGE)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        _stop(f"no space left: {error}; what is written is kept. Free space and run it again", FAILED)


def _mount(
    command: Callable[..., None],
    to: typer.Typer = app,
    name: str | None = None,
    settings: dict[str, Any] | None = None,
) -> None:
    """Add a command whose function lies in another module, with the same treatment of errors."""

    @functools.wraps(command)
    def guarded(*arguments: Any, **options: Any) -> None:
        with _errors_as_exit_codes(options.get("out") or options.get("study")):
            refuse_urls(command.__name__, options)
            command(*arguments, **options)

    to.command(name, context_settings=settings)(guarded)


def _stop(message: str, code: int) -> NoReturn:
    typer.echo(f"samreg: {redact(message)}", err=True)
    raise typer.Exit(code)


def _terminate(signum: int, frame: object) -> NoReturn:
    raise Terminated


_mount(cli_report.report)
_mount(cli_submit.submit, settings=cli_submit.PASS_ON)
_mount(cli_atlas.atlas)
_mount(cli_baseline.baseline)
_mount(cli_sweep.sweep)
_mount(cli_export.export)
_mount(cli_export.apply)
_mount(cli_query.query)
_mount(cli_demo.demo)
_mount(cli_doctor.doctor)
_mount(cli_cohort.rois, cohort_app)
_mount(cli_cohort.from_layout, cohort_app, "from")
_mount(cli_weights.list_weights, weights_app, "list")
for _command in (cli_weights.fetch, cli_weights.identify, cli_weights.verify, cli_weights.probe):
    _mount(_command, weights_app)


def main() -> None:
    """Entry point of the command."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a name that the terminal cannot show ends no study
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("samreg").setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, _terminate)
    app(prog_name="samreg")


if __name__ == "__main__":
    main()
