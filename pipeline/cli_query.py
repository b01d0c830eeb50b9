"""`samreg query`: the command, as a function for the command line to mount."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipeline.dispatch import Failure
    from pipeline.query_region import Seed


def query(
    study: Annotated[Path, typer.Argument(help="Study folder, encoded at least (samreg run --until prototypes).")],
    *,
    subject: Annotated[str, typer.Option("--subject", help="Subject that the region is on.")],
    point: Annotated[str | None, typer.Option("--point", metavar="I,J,K", help="A voxel of its file, from 0.")] = None,
    point_mm: Annotated[
        str | None, typer.Option("--point-mm", metavar="X,Y,Z", help="A position, mm LPS (2D: pixels).")
    ] = None,
    box: Annotated[
        str | None, typer.Option("--box", metavar="I,J,K,I,J,K", help="Two opposite voxels of a box, both in it.")
    ] = None,
    label: Annotated[int | None, typer.Option("--label", help="A label of its label map.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Of the query; made of subject and region.")] = None,
    top: Annotated[int, typer.Option("--top", help="Subjects on the contact sheets; 0 draws none.")] = 23,
    masks: Annotated[bool, typer.Option("--masks", help="Also a label map for each subject.")] = False,
    min_confidence: Annotated[float, typer.Option("--min-confidence", help="Least confidence of a ROI, 0 to 1.")] = 0.3,
    relays: Annotated[
        int | None, typer.Option("--relays", help="Surest subjects that ask again; 0 to 6 by the size of the cohort.")
    ] = None,
    stored: Annotated[bool, typer.Option("--stored", help="Choose among the stored ROIs; do not prompt SAM.")] = False,
) -> None:
    """Find a region of one subject in all others, from the embeddings alone: the table STUDY/queries."""
    import time

    from pipeline.algorithms.query import QueryConfig
    from pipeline.cli_export import end_with
    from pipeline.errors import UsageError
    from pipeline.query import ask, open_study, write_answers
    from pipeline.query_sheet import write_masks, write_sheets

    if top < 0 or (relays or 0) < 0 or not 0 <= min_confidence < 1:
        raise UsageError("--top and --relays must be 0 or more, and --min-confidence at least 0 and below 1")
    seed, start = _seed(point, point_mm, box, label), time.perf_counter()
    opened = open_study(study)
    opening = time.perf_counter() - start
    settings = QueryConfig(min_confidence=min_confidence, relays=relays)
    result = ask(opened, subject, seed, settings, name=name, prompt=not stored)
    path = write_answers(result)
    found, others = int((result.found.total[result.ranked] > 0).sum()), len(result.ranked)
    times = " ".join(f"{what} {seconds:.2f} s," for what, seconds in {"opening": opening, **result.seconds}.items())
    typer.echo(f"{path}: found in {found} of {others} subjects ({times.rstrip(',')})")
    failures: list[Failure] = []
    if top:
        sheets, failures = write_sheets(result, top)
        for sheet in sheets:
            typer.echo(str(sheet))
    if masks:
        count, failed = write_masks(result)
        typer.echo(f"{path.parent / result.name / 'masks'}: {count} subjects")
        failures += failed
    end_with(failures)


def _seed(point: str | None, point_mm: str | None, box: str | None, label: int | None) -> Seed:
    from pipeline.errors import UsageError
    from pipeline.query_region import Seed

    seeds = []
    for kind, text, counts in (("point", point, (2, 3)), ("point-mm", point_mm, (2, 3)), ("box", box, (4, 6))):
        if text is None:
            continue
        try:
            values = tuple(float(word) for word in text.split(","))
        except ValueError:
            values = ()
        if len(values) not in counts:
            raise UsageError(f"--{kind} {text!r}: expected {counts[1]} numbers with commas between ({counts[0]} in 2D)")
        seeds.append(Seed(kind, values))  # type: ignore[arg-type]
    if label is not None:
        seeds.append(Seed("label", (float(label),)))
    if len(seeds) != 1:
        raise UsageError("give one of --point, --point-mm, --box and --label")
    return seeds[0]
