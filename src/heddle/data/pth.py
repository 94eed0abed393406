"""Files of ``torch.save``, read without torch and without running what a pickle may name.

Such a file is a zip of stored, aligned entries: ``data.pkl``, a pickle of a dict whose tensors say which storage they
are a view of, and the bytes of each storage, ``data/0`` and so on. A pickle can call whatever it names; the reader here
knows the few names that weights need, as its own inert stand-ins, and refuses all others.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

#: torch's classes of storages, and what they hold.
STORAGES = {
    "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16", "DoubleStorage": "float64",
}  # fmt: skip


class Pth:
    """A dict of tensors that ``torch.save`` wrote, memory-mapped.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a whole file of ``torch.save``; one that holds anything but tensors of floating point.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        try:
            self._entries, pickled = self._open()
            tensors = _Unpickler(io.BytesIO(pickled)).load()
        except _RefusedError as error:
            raise ValueError(f"{path}: {error}") from None
        except Exception as error:  # a broken file can fail anywhere in zipfile and pickle
            raise ValueError(f"{path}: not a whole file of torch.save: {error}") from None
        if not isinstance(tensors, dict) or not all(
            isinstance(name, str) and isinstance(tensor, _Tensor) for name, tensor in tensors.items()
        ):
            raise ValueError(f"{path}: must hold a dict of tensors by name")
        for name, tensor in tensors.items():
            self._check(name, tensor)
        self._tensors: dict[str, _Tensor] = dict(tensors)
        self._bytes = np.memmap(self.path, np.uint8, mode="r")
        self.shapes: dict[str, tuple[int, ...]] = {name: tensor.shape for name, tensor in self._tensors.items()}
        self.dtypes: dict[str, str] = {name: tensor.storage.dtype for name, tensor in self._tensors.items()}

    def tensor(self, name: str) -> np.ndarray:
        """A tensor, as a view of the file."""
        storage, offset, shape, stride = self._tensors[name]
        begin, size = self._entries[storage.key]
        values = self._bytes[begin : begin + size].view(_dtype(storage.dtype))[offset:]
        strides = [n * values.itemsize for n in stride]
        return np.lib.stride_tricks.as_strided(values, shape, strides, writeable=False)

    def _open(self) -> tuple[dict[str, tuple[int, int]], bytes]:
        """Where each storage's bytes lie, ``(begin, size)``, and the pickle."""
        entries, pickled = {}, None
        with zipfile.ZipFile(self.path) as archive, self.path.open("rb") as file:
            for entry in archive.infolist():
                _, _, name = entry.filename.partition("/")  # below one folder, named as the file was
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"{name} is compressed")
                if name == "data.pkl":
                    pickled = archive.read(entry)
                elif name == "byteorder" and archive.read(entry) != b"little":
                    raise ValueError("its numbers aren't little-endian")
                elif name.startswith("data/"):
                    # The lengths of name and padding stand in the entry's own header too, and may differ there.
                    file.seek(entry.header_offset + 26)
                    begin = entry.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
                    entries[name.removeprefix("data/")] = begin, entry.file_size
        if pickled is None:
            raise ValueError("it holds no data.pkl")
        return entries, pickled

    def _check(self, name: str, tensor: _Tensor) -> None:
        """A tensor must lie within its storage, and that in the file."""
        storage, offset, shape, stride = tensor
        numbers = (offset, *shape, *stride)
        fits = len(shape) == len(stride) and all(type(n) is int and n >= 0 for n in numbers)
        if fits and storage.key in self._entries:
            begin, size = self._entries[storage.key]
            end = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) + 1
            itemsize = 8 if storage.dtype == "float64" else 4 if storage.dtype == "float32" else 2
            fits = begin + size <= self.path.stat().st_size and size % itemsize == 0
            fits &= (end if math.prod(shape) else offset) * itemsize <= size
        else:
            fits = False
        if not fits:
            raise ValueError(f"{self.path}: not a whole file of torch.save: tensor {name} doesn't lie within it")


class _Storage(NamedTuple):
    key: str
    dtype: str


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _StorageType(NamedTuple):
    dtype: str


class _RefusedError(Exception):
    """The pickle names what weights don't need."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # New functions each time: a pickle can set attributes of what it is given.
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, stride, *_: _Tensor(storage, offset, tuple(shape), tuple(stride))
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name in STORAGES:
            return _StorageType(STORAGES[name])
        raise _RefusedError(f"names {module}.{name}, which weights don't need, so it isn't loaded")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, *_ = pid
        if kind != "storage" or not isinstance(storage, _StorageType) or not isinstance(key, str):
            raise _RefusedError("refers to what isn't a storage, so it isn't loaded")
        return _Storage(key, storage.dtype)


def _dtype(name: str) -> np.dtype:
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes  # not of NumPy, and needed by those who meet such a file alone

    return np.dtype(ml_dtypes.bfloat16)
