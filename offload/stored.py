"""A tensor that lies elsewhere, in a scratch file or a checkpoint, and is read by ranges."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

CHUNK_BYTES = 8 << 20
"""Bytes that are in memory at a time while a whole one is copied."""


@runtime_checkable
class Stored(Protocol):
    """What stands for a tensor without holding it: its facts, and its elements by range."""

    dtype: torch.dtype
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        ...

    def read(self, first: int, count: int) -> Tensor:
        """[count] elements of the flattened tensor from `first` on, on the CPU, in memory of their own."""
        ...


def chunks(stored: Stored) -> Iterator[Tensor]:
    """All elements in order, flat, CHUNK_BYTES at a time."""
    numel, size = stored.shape.numel(), max(1, CHUNK_BYTES // stored.dtype.itemsize)
    for first in range(0, numel, size):
        yield stored.read(first, min(size, numel - first))


def in_memory(value: Tensor | Stored) -> Tensor:
    """The tensor itself, or the stored one read whole."""
    return value if isinstance(value, Tensor) else whole(value)


def whole(stored: Stored) -> Tensor:
    """The tensor in memory."""
    tensor = torch.empty(stored.shape, dtype=stored.dtype)
    flat, first = tensor.view(-1), 0
    for chunk in chunks(stored):
        flat[first : first + len(chunk)] = chunk
        first += len(chunk)
    return tensor
