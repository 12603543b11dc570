"""Whole tensors from the pieces that several processes saved, and the cut of what all of them hold alike.

A piece is a run of elements of a tensor, in the order of its rows: what every way of sharding leaves in one
process (FSDP cuts the first dimension, ZeRO a flat buffer). So a state is read back without knowing how it
was cut, by any number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..offload.stored import Stored
from .errors import BrokenCheckpoint

UNCUT = 64 << 10
"""Bytes up to which a tensor is not worth cutting."""


@dataclass(frozen=True)
class Piece:
    """Elements [first, first + len(data)) of a tensor of `shape`; `data` is flat."""

    data: Tensor
    first: int
    shape: tuple[int, ...]


Pieces = Mapping[str, Mapping[str, Piece]]
"""By file and name."""


def whole_piece(tensor: Tensor) -> Piece:
    """All of a tensor."""
    return Piece(tensor.detach().reshape(-1), 0, tuple(tensor.shape))


def share_of(files: Mapping[str, Mapping[str, Tensor]], rank: int, ranks: int) -> dict[str, dict[str, Piece]]:
    """What process `rank` saves of tensors that all of `ranks` hold alike: an equal share of the bytes.

    No copies, but of a tensor that is not contiguous, which one process saves whole.
    """
    total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    low, high = rank * total // ranks, (rank + 1) * total // ranks
    mine: dict[str, dict[str, Piece]] = {file: {} for file in files}
    at = 0
    for file in sorted(files):
        for name in sorted(files[file]):
            tensor = files[file][name]
            size = tensor.element_size()
            first, last = ((bound - at) // size for bound in (low, high))
            if tensor.nbytes <= UNCUT or not tensor.is_contiguous():
                # Whole, to the one in whose share it begins.
                first, last = (0, tensor.numel()) if low <= at < high else (0, 0)
                empty = tensor.numel() == 0 and rank == 0
            else:
                first, last, empty = max(0, first), min(tensor.numel(), last), False
            if first < last or empty:
                flat = tensor.detach().reshape(-1)
                mine[file][name] = Piece(flat[first:last], first, tuple(tensor.shape))
            at += tensor.nbytes
    return mine


def describe(pieces: Pieces) -> dict[str, Any]:
    """JSON: where each piece belongs."""
    return {
        file: {name: [piece.first, list(piece.shape)] for name, piece in named.items()}
        for file, named in pieces.items()
    }


@dataclass(frozen=True)
class Part:
    """A piece as it is read back."""

    data: Tensor | Stored
    first: int


class JoinedTensor:
    """`Stored`: a tensor in pieces."""

    def __init__(self, name: str, shape: Sequence[int], parts: Sequence[Part]) -> None:
        """BrokenCheckpoint unless the parts are of one dtype and make the whole, each element once."""
        self.shape = torch.Size(shape)
        self._parts = sorted(parts, key=lambda part: part.first)
        self.dtype = self._parts[0].data.dtype
        at = 0
        for part in self._parts:
            if part.first != at or part.data.dtype != self.dtype:
                raise BrokenCheckpoint(f"the pieces of {name} do not fit together at element {at}")
            at += part.data.shape.numel()
        if at != self.shape.numel():
            raise BrokenCheckpoint(f"{name} has {self.shape.numel()} elements, its pieces {at}")

    @property
    def nbytes(self) -> int:
        """See Stored."""
        return self.shape.numel() * self.dtype.itemsize

    def read(self, first: int, count: int) -> Tensor:
        """See Stored."""
        result = torch.empty(count, dtype=self.dtype)
        for part in self._parts:
            low = max(first, part.first)
            high = min(first + count, part.first + part.data.shape.numel())
            if low < high:
                result[low - first : high - first] = _elements(part.data, low - part.first, high - low)
        return result


def _elements(data: Tensor | Stored, first: int, count: int) -> Tensor:
    return data[first : first + count] if isinstance(data, Tensor) else data.read(first, count)
