"""Reading frozen state from the scratch file of a dead process.

Nothing is believed before every segment has its two stamps, with the number of writes that the snapshot
gives, and its checksum. Bytes of an earlier or a later moment are refused, so weights and state of two steps
are never loaded together.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import OffloadError, end_of_file
from .scratch import Scratch, adopt
from .segments import STAMP
from .shadow import FORMAT, Part
from .stamps import checksum, wrong_stamp

_KEEP_SIZE_PUNCH_HOLE = 0x3


@dataclass(frozen=True)
class FrozenState:
    """tensors: by name, to be read until `close`. scratch: the folder, which stays until its `drop`."""

    tensors: dict[str, FrozenTensor]
    scratch: Scratch
    _fd: int

    def close(self) -> None:
        """Read no more."""
        os.close(self._fd)


def open_frozen(text: Mapping[str, Any]) -> FrozenState:
    """The state that `Shadow.freeze` described, verified; its folder is this process's from now on.

    Places that the snapshot does not name are given back to the disk. OffloadError, in one line: the file is
    gone or another one, or holds other bytes; then the folder is left as it is.
    """
    if text.get("format") != FORMAT:
        raise OffloadError(f"its state on disk has format {text.get('format')}, this version reads {FORMAT}")
    path = Path(text["file"])
    scratch = adopt(path.parent)
    try:
        fd = _open(path, tuple(text["identity"]))
        try:
            segments = [None if given is None else tuple(map(int, given)) for given in text["segments"]]
            _verify(fd, path, segments)
            tensors = {
                name: FrozenTensor(
                    fd,
                    path,
                    getattr(torch, entry["dtype"].removeprefix("torch.")),
                    torch.Size(entry["shape"]),
                    _parts(name, entry["parts"], segments),
                )
                for name, entry in text["tensors"].items()
            }
            _give_back_others(path, segments)
        except BaseException:
            os.close(fd)
            raise
    except BaseException:
        scratch.close()
        raise
    return FrozenState(tensors, scratch, fd)


class FrozenTensor:
    """`Stored`: a state tensor whose parts lie in frozen segments."""

    def __init__(self, fd: int, path: Path, dtype: torch.dtype, shape: torch.Size, parts: list[Part]) -> None:
        """parts: the first number of each is the offset of its segment in the file."""
        self.dtype, self.shape = dtype, shape
        self._fd, self._path, self._parts = fd, path, parts

    @property
    def nbytes(self) -> int:
        """See Stored."""
        return self.shape.numel() * self.dtype.itemsize

    def read(self, first: int, count: int) -> Tensor:
        """See Stored. OffloadError: the disk failed."""
        result = torch.empty(count, dtype=self.dtype)
        size = self.dtype.itemsize
        for segment, offset, start, numel in self._parts:
            low, high = max(first, start), min(first + count, start + numel)
            if low < high:
                target = result[low - first : high - first].view(torch.uint8)
                _read(self._fd, self._path, segment + offset + (low - start) * size, target)
        return result


Place = tuple[int, ...] | None
"""(offset in the file, bytes, writes, checksum) of a segment that was written."""


def _open(path: Path, identity: tuple[int, ...]) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise OffloadError(f"its state on disk, {path}, is gone: {error.strerror}") from None
    status = os.fstat(fd)
    if (status.st_dev, status.st_ino) != identity:
        os.close(fd)
        raise OffloadError(f"{path} is another file than the one its state is in")
    return fd


def _verify(fd: int, path: Path, segments: list[Place]) -> None:
    largest = max((place[1] for place in segments if place is not None), default=0)
    buffer = torch.empty(largest, dtype=torch.uint8)
    for index, place in enumerate(segments):
        if place is None:
            continue
        offset, nbytes, writes, wanted = place
        data = buffer[:nbytes]
        _read(fd, path, offset, data)
        found = wrong_stamp(data, index, writes)
        if found is not None:
            raise OffloadError(
                f"segment {index} of its state on disk is of another moment: (segment, write) {found}, not "
                f"{(index, writes)}"
            )
        if checksum(data) != wanted:
            raise OffloadError(f"segment {index} of its state on disk is damaged: its checksum differs")


def _parts(name: str, given: list[list[int]], segments: list[Place]) -> list[Part]:
    parts: list[Part] = []
    for index, offset, first, numel in given:
        place = segments[index]
        if place is None or offset < STAMP:
            raise OffloadError(
                f"{name} lies in segment {index} of its state on disk, which was never written"
            )
        parts.append((place[0], offset, first, numel))
    return parts


def _read(fd: int, path: Path, offset: int, into: Tensor) -> None:
    data, at = into.numpy().data.cast("B"), offset
    while data:
        try:
            count = os.preadv(fd, [data], at)
        except OSError as error:
            raise OffloadError(f"{path} cannot be read at {at:,}: {error.strerror}") from None
        if not count:
            raise end_of_file(path, at, len(data))
        data, at = data[count:], at + count
    os.posix_fadvise(fd, offset, at - offset, os.POSIX_FADV_DONTNEED)  # memory is short


def _give_back_others(path: Path, segments: list[Place]) -> None:
    """Punch holes where the snapshot names nothing, so that the next file has room beside this one.

    Where the file system cannot, the room is just not there.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "fallocate"):
        return
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        end = 0
        length = os.fstat(fd).st_size
        for offset, nbytes in [*sorted((place[0], place[1]) for place in segments if place), (length, 0)]:
            if offset > end:
                hole = ctypes.c_long(end), ctypes.c_long(offset - end)
                if libc.fallocate(fd, _KEEP_SIZE_PUNCH_HOLE, *hole) != 0:
                    return
            end = offset + nbytes
    finally:
        os.close(fd)
