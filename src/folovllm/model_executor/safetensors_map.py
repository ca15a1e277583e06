"""A safetensors file as tensors over a memory map.

    file = header length (8 bytes, little-endian) | header (JSON) | data
    header = {"__metadata__": {...}, name: {"dtype": "BF16", "shape": [...], "data_offsets": [begin, end]}, ...}

The `safetensors` library maps files too, but keeps every page that was read resident for as long as the file is open.
Here the reader says when it is done with a tensor, so that loading a model never holds much more than its result.
Source: the format's description, https://github.com/huggingface/safetensors#format
"""

import json
import mmap
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch

from folovllm.errors import ModelLoadError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_HEADER_BYTES = 100_000_000


class SafetensorsMap:
    """One mapped file. Tensors stay valid after the object is gone; they hold the map."""

    def __init__(self, file: Path) -> None:
        """Map a file and check its header.

        Raises:
            ModelLoadError: it is not a whole safetensors file.
        """
        self.file = file
        try:
            with file.open("rb") as opened:
                # A private map: torch wants memory it could write to, and nothing is ever written to it.
                self._map = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise self._broken(str(error)) from error
        self._data_start, self._entries = self._read_header()

    def __iter__(self) -> Iterator[str]:
        """The names of the tensors, in the order of the header."""
        return iter(self._entries)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor over the map. REQUIRES: nobody writes to it.

        Raises:
            ModelLoadError: its entry in the header is malformed or points outside the file.
        """
        entry = self._entries[name]
        try:
            dtype, shape = _DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
            begin, end = (int(n) for n in entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise self._broken(f"the entry of tensor {name} is malformed: {error!r}") from error
        num_bytes = prod(shape) * dtype.itemsize
        if not 0 <= begin <= end <= len(self._map) - self._data_start or end - begin != num_bytes:
            raise self._broken(f"tensor {name} of {num_bytes} bytes lies at [{begin}, {end}) of the data")
        if num_bytes == 0:
            return torch.empty(shape, dtype=dtype)
        start = self._data_start + begin
        if start % dtype.itemsize:  # torch reads elements where they are; old writers did not align them
            return torch.frombuffer(bytearray(self._map[start : start + num_bytes]), dtype=dtype).view(shape)
        return torch.frombuffer(self._map, dtype=dtype, count=prod(shape), offset=start).view(shape)

    def release(self, name: str) -> None:
        """Let go of the tensor's pages: they are read again from the file if it is used again."""
        begin, end = self._entries[name]["data_offsets"]
        page = mmap.PAGESIZE
        first = -(-(self._data_start + begin) // page) * page
        last = (self._data_start + end) // page * page
        if last > first:
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)

    def release_all(self) -> None:
        """Let go of the whole file's pages, as `release` of those of one tensor."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def _read_header(self) -> tuple[int, dict[str, Any]]:
        if len(self._map) < 8:
            raise self._broken("it is shorter than a header")
        size = int.from_bytes(self._map[:8], "little")
        if size > min(_MAX_HEADER_BYTES, len(self._map) - 8):
            raise self._broken(f"its header claims {size} bytes of a file of {len(self._map)}")
        try:
            header = json.loads(self._map[8 : 8 + size])
            header.pop("__metadata__", None)
            if not all(isinstance(entry, dict) for entry in header.values()):
                raise TypeError("an entry is not an object")
        except (ValueError, AttributeError, TypeError) as error:
            raise self._broken(f"its header is not valid: {error!r}") from error
        return 8 + size, header

    def _broken(self, why: str) -> ModelLoadError:
        return ModelLoadError(f"{self.file} is not a readable safetensors file: {why}")
