"""`samreg weights`: the commands, as functions for the command line to mount."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from pipeline.errors import StudyError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from actors.sam_variants import PreprocessRule

PROBED = (
    "input",
    "features",
    "logits_multi",
    "iou_multi",
    "logits_single",
    "iou_single",
    "logits_boxsingle",
    "iou_boxsingle",
)

WeightsPath = Annotated[Path, typer.Argument(help="Weights file.")]


def list_weights(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Every variant: its published file, size, licence, sha256 where known, where to get it, whether it is here."""
    from actors.sam_weights import weights_folder, weights_table

    rows = weights_table()
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    columns = ("name", "here", "file", "MB", "licence", "sha256", "from")
    lines = [columns, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    typer.echo(f"\nfolder: {weights_folder()} (SAMREG_WEIGHTS chooses another)")


def _cells(row: dict[str, str | int | bool | None]) -> tuple[str, ...]:
    size = f"{row['size'] / 1e6:.0f}" if isinstance(row["size"], int) else "?"
    here = "yes" if row["present"] else "no"
    source = row["url"] or row["page"]
    return (
        str(row["variant"]),
        here,
        str(row["file"]),
        size,
        str(row["licence"]),
        str(row["sha256"] or "?"),
        str(source),
    )


def fetch(name: Annotated[str, typer.Argument(help="Variant, see samreg weights list.")]) -> None:
    """Download a published file into the weights folder; run again, an interrupted download goes on."""
    from actors.sam_weights import WEIGHTS, WeightsUnavailableError, fetch_weights, verify_file

    _known(name)
    try:
        with _download_bar(WEIGHTS[name].file) as advance:
            path = fetch_weights(WEIGHTS[name], progress=advance)
    except WeightsUnavailableError as error:
        raise StudyError(str(error)) from None
    found = verify_file(path)
    typer.echo(f"{path}: {found.note}")
    expected = WEIGHTS[name].sha256
    if expected is not None and found.sha256 != expected:
        raise typer.Exit(1)


@contextmanager
def _download_bar(file: str) -> Iterator[Callable[[int, int | None], None] | None]:
    """A progress bar on a terminal, silence in a log."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress("{task.description}", *columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(file, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def identify(file: WeightsPath) -> None:
    """Tell the variant of a weights file from its keys and shapes; exit code 1 if it is none."""
    from actors.sam_weights import identify_file

    found = identify_file(file)
    typer.echo(f"{file}: {found.note}")
    if not found.variants:
        raise typer.Exit(1)


def verify(file: WeightsPath) -> None:
    """Compare a file's sha256 with the published ones and load it strictly; exit code 1 if it is no variant."""
    from actors.sam_checkpoint import read_checkpoint
    from actors.sam_model import build_from_state_dict
    from actors.sam_variants import identify as identify_weights
    from actors.sam_weights import verify_file

    checkpoint = read_checkpoint(file)
    found = verify_file(file)
    typer.echo(f"sha256  {found.sha256}")
    typer.echo(f"hash    {found.note}")
    for note in checkpoint.notes:
        typer.echo(f"note    {note}")
    identified = identify_weights(checkpoint.weights)
    if not identified.variants:
        typer.echo(f"loads   no: {identified.note}")
        raise typer.Exit(1)
    build_from_state_dict(checkpoint.weights, identified.variants[0])
    typer.echo(f"loads   strictly, as {' or '.join(identified.variants)}")


def probe(
    variant: Annotated[str, typer.Option("--variant", help="Variant, see samreg weights list.")],
    image: Annotated[Path, typer.Option("--image", help="Picture; 8-bit values are taken as they are.")],
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", help="Weights, path or URI; without it, from the weights folder.")
    ] = None,
    points: Annotated[
        str | None, typer.Option("--points", metavar="X,Y;X,Y", help="Points in pixels of the image, one prompt each.")
    ] = None,
    box: Annotated[str | None, typer.Option("--box", metavar="X0,Y0,X1,Y1", help="Box in pixels of the image.")] = None,
    preprocess: Annotated[
        str | None, typer.Option("--preprocess", help="sam, medsam or sam_med2d; the variant's own without it.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    out: Annotated[Path | None, typer.Option("--out", help="NumPy .npz file to write.")] = None,
    no_out: Annotated[bool, typer.Option("--no-out", help="Print a short health summary instead.")] = False,
) -> None:
    """Run one image and a few prompts through a checkpoint and keep every intermediate array."""
    if (out is None) is not no_out:
        raise UsageError("give either --out FILE.npz or --no-out")
    _known(variant)
    rule = _known_rule(preprocess)
    _check_device(device)
    at = None if points is None else [_numbers(point, 2, "--points") for point in points.strip(" ;").split(";")]
    corners = None if box is None else _numbers(box, 4, "--box")
    from actors.sam_probe import probe as run_probe
    from actors.sam_probe import summarise_probe
    from actors.sam_weights import resolve_weights

    weights = resolve_weights(variant, checkpoint)
    arrays = run_probe(variant, weights, _read_picture(image), at, corners, rule, device)
    if out is None:
        typer.echo("\n".join(summarise_probe(arrays)))
        return
    _write_arrays(out, {name: arrays[name] for name in PROBED if name in arrays})
    typer.echo(out)


def _known(variant: str) -> None:
    from actors.sam_variants import variant_defaults

    try:
        variant_defaults(variant)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _known_rule(preprocess: str | None) -> PreprocessRule | None:
    from actors.preprocess import PREPROCESS_RULES

    if preprocess is not None and preprocess not in PREPROCESS_RULES:
        raise UsageError(f"--preprocess {preprocess!r} is none of {', '.join(PREPROCESS_RULES)}")
    return cast("PreprocessRule | None", preprocess)


def _check_device(device: str) -> None:
    if device not in ("cpu", "cuda"):
        raise UsageError(f"--device {device!r} is neither cpu nor cuda")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UsageError("--device is cuda but there is no GPU here; set it to cpu")


def _numbers(text: str, count: int, option: str) -> list[float]:
    try:
        values = [float(value) for value in text.split(",")]
    except ValueError:
        values = []
    if len(values) != count:
        wanted = "x,y;x,y;…" if option == "--points" else "x0,y0,x1,y1"
        raise UsageError(f"{option}: {text!r} is not {wanted} in pixels of the image")
    return values


def _read_picture(path: Path) -> npt.NDArray[np.uint8]:
    """uint8 [H, W, 3]: an 8-bit picture as it is, anything else scaled as a study does, middle slice."""
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    from storage.images import read_image, to_uint8

    try:
        with Image.open(path) as picture:
            if picture.mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
                pixels: npt.NDArray[np.uint8] = np.array(picture.convert("RGB"))
                return pixels
    except UnidentifiedImageError:
        pass  # a volume, or no image at all, which read_image says
    slices = to_uint8(read_image(path))
    middle: npt.NDArray[np.uint8] = slices[len(slices) // 2]
    return middle


def _write_arrays(path: Path, arrays: dict[str, npt.NDArray[np.float32]]) -> None:
    import numpy as np

    from storage.atomic import replace_file

    with replace_file(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]
