"""The state in a scratch file as of one moment: where its bytes lie, and when all of them are there."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Extent:
    """Where a segment lies in the file, how often it was written, and the xxh3-64 of its bytes."""

    offset: int
    nbytes: int
    writes: int
    checksum: int


@dataclass(frozen=True)
class Frozen:
    """The state as of one moment. extents: by segment, None where it has no bytes yet.

    writes: those on their way; with the last of them all the bytes are there.
    """

    extents: list[Extent | None]
    writes: list[Future[None]]


class Written:
    """`Stored`: one byte, to be had when all the bytes of a frozen state are in the file.

    As a part of a snapshot it keeps that from being published earlier: whoever copies it waits, or gets the
    error of the write that failed.
    """

    dtype, shape, nbytes = torch.uint8, torch.Size([1]), 1

    def __init__(self, writes: list[Future[None]]) -> None:
        self._writes = writes

    def read(self, first: int, count: int) -> Tensor:
        """See Stored. OffloadError: the disk failed."""
        for write in self._writes:
            write.result()
        return torch.ones(count, dtype=torch.uint8)
