"""Where weights come from: the published files, the cache folder, download and verification.

No author publishes a hash beside the file; the ones here were gathered from mirrors and file names. A
download must match them. A user's own file may differ: `verify` says so and leaves the decision to the user.
"""

from __future__ import annotations

import hashlib
import http.client
import importlib.util
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from actors.sam_variants import (
    NEEDS_TIMM,
    TINY_VARIANTS,
    Identification,
    PackageMissingError,
    check_variant,
    identify,
    variant_defaults,
)

CACHE_VARIABLE = "SAMREG_WEIGHTS"
_CHUNK = 1 << 20
_TIMEOUT_SECONDS = 30.0


class WeightsUnavailableError(OSError):
    """Weights that could not be downloaded; the message holds the URL and where to put the file."""


@dataclass(frozen=True)
class WeightsFile:
    """One published weights file.

    Attributes:
        variant: what it holds.
        file: its name in the cache folder.
        size: bytes, None where not known exactly.
        sha256: expected hex digest, None where nobody published one.
        licence: of the weights' repository.
        url: direct download, empty where there is none.
        page: where to get it by hand.
    """

    variant: str
    file: str
    size: int | None
    sha256: str | None
    licence: str
    url: str
    page: str


_SAM = "https://dl.fbaipublicfiles.com/segment_anything/"
_SAM_PAGE = "https://github.com/facebookresearch/segment-anything#model-checkpoints"
_HQ = "https://huggingface.co/lkeab/hq-sam/resolve/main/"
_HQ_PAGE = "https://github.com/SysCV/sam-hq#model-checkpoints"
_DRIVE = "https://drive.google.com/file/d/"
_APACHE = "Apache-2.0"


def _sam(size: str, digest: str, length: int, sha256: str) -> WeightsFile:
    file = f"sam_vit_{size}_{digest}.pth"
    return WeightsFile(f"sam_vit_{size}", file, length, sha256, _APACHE, _SAM + file, _SAM_PAGE)


def _hq(size: str, length: int | None, sha256: str) -> WeightsFile:
    file = "sam_hq_vit_tiny.pth" if size == "tiny" else f"sam_hq_vit_{size}.pth"
    return WeightsFile(f"hq_sam_{size}", file, length, sha256, _APACHE, _HQ + file, _HQ_PAGE)


def _drive(variant: str, file: str, page: str, size: int | None = None, sha256: str | None = None) -> WeightsFile:
    return WeightsFile(variant, file, size, sha256, _APACHE, "", page)


WEIGHTS: dict[str, WeightsFile] = {
    entry.variant: entry
    for entry in (
        _sam("b", "01ec64", 375042383, "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"),
        _sam("l", "0b3195", 1249524607, "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622"),
        _sam("h", "4b8939", 2564550879, "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e"),
        _drive(
            "medsam",
            "medsam_vit_b.pth",
            "https://drive.google.com/drive/folders/1ETWmi4AiniJeWOt6HAsYgTjYv_fkgzoN",
            375049145,
            "34b34b78c1d18cb8c6bf84cf9c00e135d6d6c965699f3c0e31ef1bc9dcb5be74",
        ),
        _drive("sam_med2d", "sam-med2d_b.pth", _DRIVE + "1ARiB5RkSsWmAB_8mqWnwDF8ZKTtFwsjl"),
        _drive("sam_med2d_ft", "ft-sam_b.pth", _DRIVE + "1J4qQt9MZZYdv1eoxMTJ4FL8Fz65iUFM8"),
        _drive("slimsam_50", "SlimSAM-50-uniform.pth", _DRIVE + "1Ld7Q2LY8H2nu4zB6VxwwA5npS5A9OHFq"),
        _drive("slimsam_77", "SlimSAM-77-uniform.pth", _DRIVE + "1OeWpfk5WhdlMz5VvYmb9gaE6suzHB0sp"),
        _hq("b", 379335069, "14a9d662cd6f5a9c2dba6d40ab0058d88d287e4a18fd6fdc6ad5fb1a3fdeaa57"),
        _hq("l", 1254865805, "e1a6c385d62bf005ded91a54d5ec55c985cfc4103ef89c08d90f39f04934c343"),
        _hq("h", 2570940653, "a7ac14a085326d9fa6199c8c698c4f0e7280afdbb974d2c4660ec60877b45e35"),
        _hq("tiny", None, "0f32c075ccdd870ae54db2f7630e7a0878ede5a2b06d05d6fe02c65a82fb7196"),
        WeightsFile(
            "mobile_sam",
            "mobile_sam.pt",
            40728226,
            "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
            _APACHE,
            "https://github.com/ChaoningZhang/MobileSAM/raw/master/weights/mobile_sam.pt",
            "https://github.com/ChaoningZhang/MobileSAM/tree/master/weights",
        ),
    )
}


@dataclass(frozen=True)
class Verification:
    """What a file's hash says.

    Attributes:
        sha256: of the file.
        variant: whose published file it is, None if the hash is unknown here.
        note: one sentence for the user.
    """

    sha256: str
    variant: str | None
    note: str


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def weights_folder() -> Path:
    """The cache folder: SAMREG_WEIGHTS, else samreg/weights in the user's cache."""
    override = os.environ.get(CACHE_VARIABLE)
    if override:
        return Path(override).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "samreg" / "weights"


def weights_table() -> list[dict[str, str | int | bool | None]]:
    """One row per variant: its file, size, hash, licence, sources, and whether it is in the cache folder."""
    folder = weights_folder()
    return [{**vars(entry), "present": (folder / entry.file).is_file()} for entry in WEIGHTS.values()]


def resolve_weights(variant: str, checkpoint: str | Path | None = None) -> Path:
    """Path of the weights to use.

    Args:
        variant: its name.
        checkpoint: the user's own file or URI (read through fsspec into the cache folder); None looks for the
            published file in the cache folder.

    Raises:
        FileNotFoundError: not there; says where to get it and where to put it.
        ValueError: no such variant.
    """
    variant_defaults(variant)
    if checkpoint is not None and "://" in str(checkpoint):
        return _local_copy(str(checkpoint))
    path = weights_folder() / WEIGHTS[variant].file if checkpoint is None else Path(checkpoint).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no weights of {variant} at {path}. {how_to_get(variant)}")
    return path


def checked_sha256(variant: str, checkpoint: str | Path | None = None) -> str:
    """Digest of the weights to use, after reading them and making sure that they are the variant's.

    Raises:
        FileNotFoundError: as `resolve_weights`.
        CheckpointError: a file that cannot be read as weights, or weights of another variant.
        PackageMissingError: a variant on TinyViT without timm.
    """
    from actors.sam_checkpoint import read_checkpoint

    path = resolve_weights(variant, checkpoint)
    if variant in TINY_VARIANTS and importlib.util.find_spec("timm") is None:
        raise PackageMissingError(NEEDS_TIMM)
    found = read_checkpoint(path)
    check_variant(found.weights, variant)
    return found.sha256


def _local_copy(uri: str) -> Path:
    import fsspec

    cache = {"cache_storage": str(weights_folder() / "uri"), "check_files": True}
    return Path(fsspec.open_local(f"filecache::{uri}", filecache=cache))


def how_to_get(variant: str) -> str:
    """Where to download a variant's file and where to put it."""
    entry = WEIGHTS[variant]
    target = weights_folder() / entry.file
    command = f"Run `samreg weights fetch {variant}`, or download" if entry.url else "Download"
    return f"{command} {entry.url or entry.page} and put it at {target} (or name your file as checkpoint)."


def verify_file(path: str | Path) -> Verification:
    """Compare a file's hash with the published ones."""
    sha256 = file_sha256(Path(path))
    for entry in WEIGHTS.values():
        if sha256 == entry.sha256:
            return Verification(sha256, entry.variant, f"the published {entry.file} of {entry.variant}")
    named = [entry for entry in WEIGHTS.values() if entry.file == Path(path).name]
    if named and named[0].sha256:
        note = f"named like the published {named[0].file} but with another hash (expected {named[0].sha256})"
    else:
        note = "no published hash to compare with; note this one down to recognise the file later"
    return Verification(sha256, None, note)


def identify_file(path: str | Path) -> Identification:
    """Variant of a weights file from keys and shapes, and from its hash where those cannot tell.

    Raises:
        CheckpointError: a file that cannot be read as weights.
    """
    from actors.sam_checkpoint import read_checkpoint

    found = identify(read_checkpoint(path).weights)
    if len(found.variants) < 2:
        return found
    known = verify_file(path).variant
    return Identification((known,), f"{known}: by its sha256") if known in found.variants else found


def fetch_weights(
    entry: WeightsFile, folder: Path | None = None, progress: Callable[[int, int | None], None] | None = None
) -> Path:
    """Download a published file into the cache folder, resuming an interrupted download.

    Args:
        entry: of `WEIGHTS`.
        folder: instead of the cache folder.
        progress: called with bytes so far and bytes in all (None if the server does not say).

    Returns:
        The file, complete and with the expected size and hash where those are known.

    Raises:
        WeightsUnavailableError: no direct download, no connection, or a broken one (run again to resume),
            or a file that is not the published one (deleted).
    """
    target = (folder or weights_folder()) / entry.file
    if target.is_file():
        return target
    if not entry.url:
        raise WeightsUnavailableError(f"{entry.file} has no direct download. {how_to_get(entry.variant)}")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".part")
    try:
        _download(entry.url, partial, progress)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        kept = partial.stat().st_size if partial.is_file() else 0
        raise WeightsUnavailableError(
            f"could not download {entry.url} ({error}; {kept} bytes kept, the same command resumes). "
            f"Without a connection: copy the file to {target} from another machine."
        ) from error
    _check_download(entry, partial)
    os.replace(partial, target)
    return target


def _download(url: str, partial: Path, progress: Callable[[int, int | None], None] | None) -> None:
    """Append what is missing of `url` to `partial`."""
    done = partial.stat().st_size if partial.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416 and done:
            return
        raise
    with response:
        if response.status != 206:
            done = 0
        length = response.headers.get("Content-Length")
        total = done + int(length) if length else None
        with partial.open("ab" if done else "wb") as stream:
            while chunk := response.read(_CHUNK):
                stream.write(chunk)
                done += len(chunk)
                if progress:
                    progress(done, total)
    if total is not None and done < total:
        raise ConnectionError(f"the connection ended after {done} of {total} bytes")


def _check_download(entry: WeightsFile, partial: Path) -> None:
    """Delete and refuse a download that is not the published file."""
    size, sha256 = partial.stat().st_size, file_sha256(partial)
    expected = (entry.size or size, entry.sha256 or sha256)
    if (size, sha256) != expected:
        partial.unlink()
        raise WeightsUnavailableError(
            f"{entry.url} gave {size} bytes with sha256 {sha256}, expected {expected[0]} bytes with "
            f"{expected[1]}; deleted. Try again; if it stays so, the published file has changed"
        )
