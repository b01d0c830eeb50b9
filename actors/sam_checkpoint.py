"""Weights files to state dicts in the official key layout: read safely, unwrapped, renamed or refused."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from actors.sam_layouts import official_layout
from actors.sam_unpickle import InertObject, load_inert
from actors.sam_variants import CheckpointError
from actors.sam_weights import file_sha256

WRAPPERS = ("model", "state_dict", "model_state_dict")
PREFIXES = ("module.", "model.", "sam.", "_orig_mod.")
_SAFETENSORS_TYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
}
_SAFETENSORS_TYPES |= {"I64": torch.int64}
# What torch and pickle raise on damaged bytes; none of it can come from the weights' own content.
_DAMAGE = (RuntimeError, EOFError, ValueError, OSError, KeyError, TypeError, AttributeError, IndexError)
_NOT_WEIGHTS = {
    b"<!doc": "a web page (a download page saved instead of the file)",
    b"<html": "a web page (a download page saved instead of the file)",
    b"versi": "a Git LFS pointer; fetch the file itself with git lfs pull",
}


@dataclass(frozen=True)
class Checkpoint:
    """Weights ready for `actors.sam_model.build_from_state_dict`.

    Attributes:
        weights: official key layout, float32 (integer buffers as they are).
        sha256: hex digest of the file.
        notes: what had to be undone on the way, for the user.
    """

    weights: dict[str, torch.Tensor]
    sha256: str
    notes: tuple[str, ...]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a weights file of any SAM variant; nothing in it is executed.

    Accepts what the variants publish: plain state dicts, `{"model": ...}` training files, `module.` and
    similar prefixes, half precision, the Hugging Face key layout, and safetensors.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: empty, truncated, no checkpoint, a pickled module, mixed prefixes, NaN weights.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}; `samreg weights list` says where to get one")
    loaded = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    notes: list[str] = []
    weights = strip_prefixes(_unwrap(loaded, path, notes), notes)
    weights = official_layout(weights, notes)
    return Checkpoint(_as_float32(weights, path, notes), file_sha256(path), tuple(notes))


def _read_torch(path: Path) -> Any:
    """The object of a torch file: by weights_only, or inertly where that refuses what is beside the model."""
    with path.open("rb") as stream:
        head = stream.read(8)
    if not head:
        raise CheckpointError(f"{path} is empty; download it again")
    start = head[:5].lower()
    if start in _NOT_WEIGHTS:
        raise CheckpointError(f"{path} is {_NOT_WEIGHTS[start]}, not weights")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not zipfile.is_zipfile(path):
            raise CheckpointError(_why_not_zip(path, head)) from error
    except _DAMAGE as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is truncated or not a torch checkpoint "
            f"({_first_line(error)}); download it again"
        ) from error
    try:
        return load_inert(path)
    except (*_DAMAGE, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} holds no readable state dict: {_first_line(error)}") from error


def _why_not_zip(path: Path, head: bytes) -> str:
    """Message for a file that torch refuses and that is no complete zip archive."""
    if head.startswith(b"\x80"):
        return (
            f"{path} is a pickle in torch's old format that names code; not loaded, because that code would "
            "run. Use a file with a plain state dict (torch.save(model.state_dict(), path))"
        )
    kind = "truncated" if head.startswith(b"PK") else "not a torch checkpoint"
    return f"{path} ({path.stat().st_size} bytes) is {kind}; download it again"


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0][:160]


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file: 8-byte length, JSON header, raw little-endian data."""
    content = path.read_bytes()
    try:
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        data = memoryview(bytearray(content[8 + length :]))
        return {
            key: torch.frombuffer(data[slice(*entry["data_offsets"])], dtype=_SAFETENSORS_TYPES[entry["dtype"]])
            .reshape(entry["shape"])
            .clone()
            for key, entry in header.items()
            if key != "__metadata__"
        }
    except (struct.error, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path} is truncated or not safetensors: {_first_line(error)}") from error


def _unwrap(loaded: Any, path: Path, notes: list[str]) -> Mapping[str, torch.Tensor]:
    """The state dict inside what the file holds."""
    if isinstance(loaded, (InertObject, torch.Tensor)) or not isinstance(loaded, Mapping):
        kind = "pickled module" if isinstance(loaded, InertObject) else type(loaded).__name__
        raise CheckpointError(
            f"{path} holds a whole {kind}, not a state dict, and no code of a checkpoint is run. SlimSAM's "
            "globally pruned files are like that; use SlimSAM-50-uniform.pth or SlimSAM-77-uniform.pth, or "
            "save model.state_dict()"
        )
    for wrapper in WRAPPERS:
        inner = loaded.get(wrapper)
        if isinstance(inner, InertObject):
            raise CheckpointError(
                f'{path}: "{wrapper}" is a pickled module, not a state dict; save model.state_dict() instead'
            )
        if isinstance(inner, Mapping):
            notes.append(f'took "{wrapper}" out of a training file with {", ".join(map(str, loaded))}')
            return _unwrap(inner, path, notes)
    weights = {key: value for key, value in loaded.items() if isinstance(value, torch.Tensor)}
    others = [str(key) for key in loaded if key not in weights]
    if others or not weights or not all(isinstance(key, str) for key in weights):
        found = f"entries that are no tensors: {', '.join(others[:5])}" if others else "no tensors"
        raise CheckpointError(f"{path} is no state dict ({found})")
    return weights


def strip_prefixes(weights: Mapping[str, torch.Tensor], notes: list[str]) -> dict[str, torch.Tensor]:
    """Remove `module.`, `model.`, `sam.` and `_orig_mod.` in front of all keys, repeatedly.

    Raises:
        CheckpointError: some keys carry a prefix and others do not.
    """
    stripped = dict(weights)
    while True:
        found = {next((p for p in PREFIXES if key.startswith(p)), "") for key in stripped}
        if found == {""}:
            return stripped
        if len(found) > 1:
            examples = sorted({next((p for p in PREFIXES if k.startswith(p)), ""): k for k in stripped}.values())
            raise CheckpointError(f"keys with different prefixes: {', '.join(examples)}; save one model per file")
        prefix = found.pop()
        notes.append(f"removed the prefix {prefix!r}")
        stripped = {key.removeprefix(prefix): value for key, value in stripped.items()}


def _as_float32(weights: dict[str, torch.Tensor], path: Path, notes: list[str]) -> dict[str, torch.Tensor]:
    """Upcast half precision (exact); refuse what float32 cannot hold, and non-finite values."""
    single: dict[str, torch.Tensor] = {}
    widened: set[str] = set()
    for key, value in weights.items():
        if not value.is_floating_point():
            single[key] = value
            continue
        converted = value.detach().to(torch.float32).contiguous()
        if value.dtype == torch.float64 and not torch.equal(converted.double(), value):
            raise CheckpointError(f"{path}: {key} is float64 and does not fit float32 exactly")
        if not torch.isfinite(converted).all():
            raise CheckpointError(f"{path}: {key} holds NaN or infinite weights; the file is damaged")
        if value.dtype != torch.float32:
            widened.add(str(value.dtype).removeprefix("torch."))
        single[key] = converted
    if widened:
        notes.append(f"converted {', '.join(sorted(widened))} weights to float32 exactly")
    return single
