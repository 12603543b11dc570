"""What a segment carries at both ends: which one it is, and how often it was written."""

from __future__ import annotations

import torch
import xxhash
from torch import Tensor

from .segments import STAMP

_USED = 16  # bytes of a stamp: two int64


def stamp(data: Tensor, index: int, writes: int) -> None:
    """Mark `data` (uint8, a whole segment) as write number `writes` of segment `index`."""
    mark = torch.tensor([index, writes], dtype=torch.int64)
    for place in _places(data):
        place.view(torch.int64).copy_(mark)


def wrong_stamp(data: Tensor, index: int, writes: int) -> tuple[int, int] | None:
    """The first (segment, write) found in `data` that is not the one given; None where both are."""
    for place in _places(data):
        segment, number = place.view(torch.int64).tolist()
        if (segment, number) != (index, writes):
            return segment, number
    return None


def checksum(data: Tensor) -> int:
    """xxh3-64 of a whole segment, stamps and all; the interpreter's lock is not held meanwhile."""
    return xxhash.xxh3_64_intdigest(data.numpy().data)


def _places(data: Tensor) -> tuple[Tensor, Tensor]:
    return data[:_USED], data[-STAMP : _USED - STAMP]
