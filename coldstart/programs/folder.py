"""The folder in which a program is handed over: from the process that makes it to the capture, and to the proof.

::

    record.json      backend, platform, options, tolerance, entry points; where their constants are in arrays.bin
    cases.json       calls of the entry points, in order, with what the state's own code answered
    arrays.bin       all arrays, aligned to 64 bytes
    0.onnx, ...      a file an entry point

Only files of our own in a folder of our own: it is not a format that is kept.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

RECORD, CASES, ARRAYS = "record.json", "cases.json", "arrays.bin"
_ALIGNMENT_BYTES = 64


class Stored(NamedTuple):
    """An array in ``arrays.bin``: C order, ``dtype`` by torch's name."""

    offset_bytes: int
    length_bytes: int
    dtype: str
    shape: tuple[int, ...]


class ArrayWriter:
    """Appends arrays to ``arrays.bin``; equal bytes are stored once."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / ARRAYS).open("wb")
        self._places: dict[str, int] = {}

    def add(self, data: Any, dtype: str, shape: Sequence[int], *, identity: str = "") -> Stored:
        """Store an array, given as flat uint8 bytes. ``identity``: stored once for this name, whatever its bytes are."""
        from blake3 import blake3

        view = memoryview(data)
        digest = identity or blake3(view).hexdigest()
        if digest not in self._places:
            self._file.write(bytes(-self._file.tell() % _ALIGNMENT_BYTES))
            self._places[digest] = self._file.tell()
            self._file.write(view)
        return Stored(self._places[digest], view.nbytes, dtype, tuple(shape))

    def add_tensor(self, tensor: Any) -> Stored:
        """Store a tensor of torch."""
        import torch

        plain = tensor.detach().cpu().contiguous()
        data = plain.reshape(-1).view(torch.uint8).numpy() if plain.numel() else memoryview(b"")
        return self.add(data, str(plain.dtype).removeprefix("torch."), tuple(plain.shape))

    def close(self) -> None:
        """Let the file be complete."""
        self._file.close()


class ArrayReader:
    """Maps ``arrays.bin``. The arrays keep the mapping alive."""

    def __init__(self, folder: Path) -> None:
        import numpy as np

        path = folder / ARRAYS
        self._data: Any = np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)

    def data(self, stored: Stored) -> Any:
        """The bytes, flat."""
        return self._data[stored.offset_bytes : stored.offset_bytes + stored.length_bytes]

    def array(self, stored: Stored) -> Any:
        """The array: numpy's, or torch's where numpy does not have the dtype."""
        import numpy as np

        data = self.data(stored)
        if hasattr(np, stored.dtype) or stored.dtype == "bool":
            return data.view(np.dtype(stored.dtype)).reshape(stored.shape)
        import torch

        return torch.from_numpy(data.copy()).view(getattr(torch, stored.dtype)).reshape(stored.shape)


def write_document(folder: Path, name: str, document: Any) -> None:
    """Write one of the JSON files."""
    (folder / name).write_text(json.dumps(document), encoding="utf-8")


def read_document(folder: Path, name: str) -> Any:
    """Read one of the JSON files."""
    return json.loads((folder / name).read_text(encoding="utf-8"))


def stored_of(row: Sequence[Any]) -> Stored:
    """A place of an array as it is in the JSON files."""
    offset_bytes, length_bytes, dtype, shape = row
    return Stored(offset_bytes, length_bytes, dtype, tuple(shape))
