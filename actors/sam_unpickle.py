"""Tensors out of a torch checkpoint without running any code the file names.

`torch.load(weights_only=True)` refuses a file as soon as it mentions a class it does not know, for example
the optimizer object that SAM-Med2D's training code saves beside the model. The reader here maps every such
name to an inert class that accepts and forgets anything, and rebuilds nothing but tensors.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any

import torch

_STORAGE_TYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class InertObject:
    """Stands in for any object a checkpoint names; keeps nothing, does nothing."""

    def __new__(cls, *_args: Any, **_kwargs: Any) -> InertObject:
        return super().__new__(cls)

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def __call__(self, *_args: Any, **_kwargs: Any) -> InertObject:
        return self

    def __setstate__(self, _state: Any) -> None:
        pass

    def __setitem__(self, _key: Any, _value: Any) -> None:
        pass

    def __hash__(self) -> int:
        return id(self)

    def append(self, _item: Any) -> None:
        """Forget an item."""

    def extend(self, _items: Any) -> None:
        """Forget items."""

    add = append


def _parameter(data: torch.Tensor, *_rest: Any) -> torch.Tensor:
    return data


class _TensorUnpickler(pickle.Unpickler):
    """Unpickler of a torch zip archive in which only containers, numbers, strings and tensors come alive."""

    def __init__(self, stream: IO[bytes], archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(stream, encoding="utf-8")
        self._archive = archive
        self._root = root
        self._storages: dict[str, torch.Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        """The few names a state dict needs; an inert class for all others."""
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _parameter
        if module == "torch" and name in _STORAGE_TYPES:
            return _STORAGE_TYPES[name]
        return InertObject

    def persistent_load(self, pid: Any) -> torch.Tensor:
        """Storage `("storage", dtype, key, location, number of elements)` as a flat tensor."""
        kind, dtype, key = pid[0], pid[1], str(pid[2])
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not key.isalnum():
            raise pickle.UnpicklingError(f"unknown storage {kind!r} of {dtype!r}")
        if key not in self._storages:
            content = bytearray(self._archive.read(f"{self._root}/data/{key}"))
            flat = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
            self._storages[key] = flat
        return self._storages[key]


def _rebuild_tensor(storage: Any, offset: int, size: Any, stride: Any, *_rest: Any) -> torch.Tensor:
    if not isinstance(storage, torch.Tensor):
        raise pickle.UnpicklingError("a tensor without storage")
    return storage.as_strided(tuple(size), tuple(stride), offset)


def load_inert(path: Path) -> Any:
    """Read a torch zip checkpoint, with every foreign object replaced by an `InertObject`.

    Raises:
        pickle.UnpicklingError: a file that does not hold what torch.save writes.
        zipfile.BadZipFile: not a zip archive, or a damaged one.
    """
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        records = [name for name in names if name.endswith("/data.pkl")]
        if len(records) != 1:
            raise pickle.UnpicklingError(f"{len(records)} data.pkl records in the archive, expected one")
        root = records[0].rsplit("/", 1)[0]
        if any(archive.getinfo(name).compress_type != zipfile.ZIP_STORED for name in names):
            raise pickle.UnpicklingError("compressed records, which torch.save never writes")
        order = f"{root}/byteorder"
        if order in names and archive.read(order) != b"little":
            raise pickle.UnpicklingError("weights of a big-endian machine")
        with archive.open(records[0]) as stream:
            return _TensorUnpickler(stream, archive, root).load()
