"""A scratch file seen as one tensor."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .direct_file import DirectFile


@contextmanager
def mapped_file(file: DirectFile, *, writable: bool) -> Iterator[Tensor]:
    """Inside, the bytes of `file` (uint8), which no transfer may write meanwhile.

    The system reads what is touched. writable: changes go into the file; otherwise they are lost.
    """
    flags = mmap.MAP_SHARED if writable else mmap.MAP_PRIVATE
    space = mmap.mmap(file.fd, file.nbytes, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    whole = torch.frombuffer(memoryview(space), dtype=torch.uint8)
    yield whole
    if writable:
        space.flush()  # before transfers go past the page cache again
    del whole, space
    os.posix_fadvise(file.fd, 0, file.nbytes, os.POSIX_FADV_DONTNEED)
