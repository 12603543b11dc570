"""Tensors to and from the safetensors format, one tensor at a time.

Writing is our own because the library's writer first brings every tensor to the host and can neither hash nor
fsync what it writes; this one holds at most one tensor besides the caller's. Reading is the library's.
Format: 8 bytes little-endian header length, JSON header, data without gaps
(github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..offload.stored import Stored, chunks
from . import strict_json
from .errors import BrokenCheckpoint
from .files import open_inside

_HEADER_LIMIT = 100_000_000  # the library's own bound
_MOST_ELEMENTS = 2**59  # of eight bytes and more, their bytes still have a number
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def encode_header(tensors: Mapping[str, Tensor | Stored]) -> bytes:
    """Length and header of the file that holds `tensors`. TypeError names a tensor that cannot be stored."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in ordered_names(tensors):
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data start aligned
    if len(text) > _HEADER_LIMIT:
        raise ValueError(
            f"the names and shapes of {len(tensors):,} tensors take more than {_HEADER_LIMIT:,} bytes"
        )
    return len(text).to_bytes(8, "little") + text


def tensor_chunks(tensors: Mapping[str, Tensor | Stored]) -> Iterator[memoryview]:
    """The data after the header: one chunk a tensor; no copy of a contiguous tensor on the CPU.

    What lies on another tier comes in small chunks and is never whole in memory.
    """
    for name in ordered_names(tensors):
        given = tensors[name]
        if isinstance(given, Stored):
            yield from (chunk.view(torch.uint8).numpy().data for chunk in chunks(given))
            continue
        tensor = given.detach().resolve_conj().resolve_neg().cpu().contiguous()
        yield tensor.reshape(-1).view(torch.uint8).numpy().data


def check_header(checkpoint: Path, name: str) -> None:
    """BrokenCheckpoint unless checkpoint/name is well-formed safetensors, judged before memory is taken."""
    with open_inside(checkpoint, name) as fd:
        size = os.fstat(fd).st_size
        length = int.from_bytes(os.read(fd, 8), "little")
        if size < 8 or length > min(_HEADER_LIMIT, size - 8):
            raise BrokenCheckpoint(f"{name} claims a header of {length:,} bytes in a file of {size:,}")
        try:
            with safe_open(checkpoint / name, framework="pt") as file:
                file.keys()
        except SafetensorError as error:
            raise BrokenCheckpoint(f"{name} is not a safetensors file: {error}") from None
        header = strict_json.loads(os.read(fd, length), name=f"the header of {name}")
    # What the library lets pass: a tensor listed twice, types that we never write, and sizes beside a zero
    # that no tensor can have.
    for tensor, entry in header.items():
        if tensor == "__metadata__":
            continue
        if entry["dtype"] not in _CODES.values():
            raise BrokenCheckpoint(f"{name} holds {tensor[:80]!r} in an unknown type, {entry['dtype']}")
        if math.prod(max(1, size) for size in entry["shape"]) > _MOST_ELEMENTS:
            raise BrokenCheckpoint(f"{name} holds {tensor[:80]!r} in a shape that cannot be")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU, in memory of their own.

    Cloned one by one: the library's tensors are windows on the mapped file, and would keep a pruned
    checkpoint's space on the disk taken for as long as they live.
    """
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)


class FileTensor:
    """`Stored`: a tensor in a safetensors file, read by ranges of its elements."""

    def __init__(self, path: Path, dtype: torch.dtype, shape: torch.Size, offset: int) -> None:
        self.dtype, self.shape = dtype, shape
        self._path, self._offset = path, offset

    @property
    def nbytes(self) -> int:
        """See Stored."""
        return self.shape.numel() * self.dtype.itemsize

    def read(self, first: int, count: int) -> Tensor:
        """See Stored. Raises BrokenCheckpoint when the file ends early."""
        result = torch.empty(count, dtype=self.dtype)
        data = result.view(torch.uint8).numpy().data
        with open(self._path, "rb") as file:
            file.seek(self._offset + first * self.dtype.itemsize)
            if file.readinto(data) != len(data):
                raise BrokenCheckpoint(f"{self._path.name} ends before its last tensor")
        return result


def open_tensors(path: Path) -> dict[str, FileTensor]:
    """All tensors of a file whose header has been checked; nothing but the header is read."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        places = decode_header(file.read(length), 8 + length)
    return {name: FileTensor(path, *place) for name, place in places.items()}


def decode_header(text: bytes, data_start: int) -> dict[str, tuple[torch.dtype, torch.Size, int]]:
    """Dtype, shape and first byte in the file of each tensor. `text`: the JSON of a checked header."""
    dtypes = {code: dtype for dtype, code in _CODES.items()}
    return {
        name: (dtypes[entry["dtype"]], torch.Size(entry["shape"]), data_start + entry["data_offsets"][0])
        for name, entry in json.loads(text).items()
        if name != "__metadata__"
    }


def ordered_names(tensors: Mapping[str, Tensor | Stored]) -> list[str]:
    """Widest elements first, so that each tensor is aligned to its own size; then by name."""
    for name, tensor in tensors.items():
        if type(tensor) not in (Tensor, torch.nn.Parameter) and not isinstance(tensor, Stored):
            raise TypeError(f"{name} is a {type(tensor).__name__}: only plain tensors are stored")
        layout = tensor.layout if isinstance(tensor, Tensor) else torch.strided
        if layout is not torch.strided or tensor.dtype not in _CODES:
            raise TypeError(f"{name} ({tensor.dtype}, {layout}) has no form in a safetensors file")
        if name == "__metadata__":
            raise ValueError("a tensor must not be named __metadata__")
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
