"""ITK's HDF5 layout of a transform: the composite, then its members, of which the last is applied first."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import h5py
import numpy as np
import numpy.typing as npt

from storage.places import place, read_bytes
from storage.sources import is_remote

if TYPE_CHECKING:
    from storage.transforms import Transform

Array: TypeAlias = npt.NDArray[np.float64]
Fields: TypeAlias = tuple[Array, npt.NDArray[np.float32], Array, Array, Array]
_CHUNK = 1 << 16
_SIGNATURE = "SamregSignature"


def encode(transform: Transform, signature: dict[str, Any]) -> bytes:
    """The bytes of the `.h5` file."""
    n = len(transform.origin)
    size = transform.vectors.shape[-2::-1]
    grid = [*size, *transform.origin, *transform.spacing, *transform.direction.ravel()]
    linear = [*transform.affine[:-1, :-1].ravel(), *transform.affine[:-1, -1]]
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver=("v108", "v108"), meta_block_size=512) as file:
        file[_SIGNATURE] = np.bytes_(json.dumps(signature, sort_keys=True))
        for key, text in (("HDFVersion", "1.8"), ("ITKVersion", "5.4"), ("OSName", ""), ("OSVersion", "")):
            file[key] = _text(text)  # ITK expects them
        members = [("CompositeTransform", None), ("AffineTransform", np.zeros(n)), ("DisplacementFieldTransform", grid)]
        for index, (kind, fixed) in enumerate(members):
            group = file.create_group(f"TransformGroup/{index}")
            group["TransformType"] = _text(f"{kind}_double_{n}_{n}")
            if fixed is not None:
                group["TransformFixedParameters"] = np.array(fixed, dtype=np.float64)
        file["TransformGroup/1/TransformParameters"] = np.array(linear, dtype=np.float64)
        flat = transform.vectors.ravel()
        file["TransformGroup/2"].create_dataset(
            "TransformParameters", data=flat, chunks=(min(len(flat), _CHUNK),), shuffle=True, compression=4
        )
    return buffer.getvalue()


def decode(path: str | Path) -> Fields:
    """The attributes of the Transform that `encode` was given, in their order.

    Raises:
        OSError, KeyError, ValueError: for any other file.
    """
    with _open(path) as file:
        return _fields(file)


def signature_of(path: str | Path) -> dict[str, Any]:
    """Signature that `encode` was given; the field is not read.

    Raises:
        OSError, KeyError: for any other file.
    """
    with _open(path) as file:
        signature: dict[str, Any] = json.loads(file[_SIGNATURE][()])
    return signature


def _open(path: str | Path) -> h5py.File:
    source = io.BytesIO(read_bytes(place(path))) if is_remote(path) else path
    return h5py.File(source, "r", locking=False)


def _text(value: str) -> npt.NDArray[np.object_]:
    return np.array([value.encode()], dtype=h5py.string_dtype("ascii"))


def _fields(file: h5py.File) -> Fields:
    linear, grid = file["TransformGroup/1"], file["TransformGroup/2"]
    fixed = grid["TransformFixedParameters"][()]
    n = 3 if len(fixed) == 18 else 2
    size, origin, spacing = fixed[:n].astype(int), fixed[n : 2 * n], fixed[2 * n : 3 * n]
    vectors = grid["TransformParameters"][()].astype(np.float32).reshape(*size[::-1], n)
    affine = np.eye(n + 1)
    parameters = linear["TransformParameters"][()]
    affine[:-1, :-1], affine[:-1, -1] = parameters[: n * n].reshape(n, n), parameters[n * n :]
    return affine, vectors, origin, spacing, fixed[3 * n :].reshape(n, n)
