"""The memory file that holds the slots: reserved in full, its size sealed, shared by passing its descriptor.

A memfd is in no file system: no limit of /dev/shm applies, nobody else can open it by name, and it is gone
when its last holder is. It is reserved with posix_fallocate, because a page that cannot be had later would be
a SIGBUS; sealed, because a mapping of a file that shrinks would be one too.

Which slot is in use is told by the kernel: the keeper holds a lock (fcntl, on the slot's range) while it
reads one for the disk, the trainer while it writes one, and both locks end with their process.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .errors import BrokenCheckpoint
from .slots import (
    CONSTANT,
    Geometry,
    Header,
    Slot,
    chunks,
    encode_geometry,
    read_geometry,
    read_header,
    read_slot,
)

MEMORY_NAME = "shoestring-snapshots"
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Memory:
    """One memory file. `fd` is the only descriptor of it that this process may have: locks end with any."""

    def __init__(self, fd: int, geometry: Geometry) -> None:
        self.fd, self.geometry = fd, geometry
        self._pins: Counter[int] = Counter()
        self._guard = threading.RLock()  # `unpin` may come from the garbage collector, at any point
        self._mapping: mmap.mmap | None = None

    @classmethod
    def create(cls, geometry: Geometry) -> Memory:
        """A new, empty one. OSError (ENOMEM, ENOSPC, EFBIG) when the system does not give so much."""
        fd = os.memfd_create(MEMORY_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(fd, 0, geometry.total)
            os.pwrite(fd, encode_geometry(geometry), 0)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, geometry)

    @classmethod
    def adopt(cls, fd: int) -> Memory:
        """The one behind a descriptor that another process sent. BrokenCheckpoint when it is not such a file.

        Takes the descriptor over, also when it fails.
        """
        try:
            try:
                seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            except OSError:
                raise BrokenCheckpoint("what was passed is not a memory file") from None
            if seals & _SEALS != _SEALS or not stat.S_ISREG(os.fstat(fd).st_mode):
                raise BrokenCheckpoint("the memory's size is not sealed")
            return cls(fd, read_geometry(fd))
        except BaseException:
            os.close(fd)
            raise

    def view(self) -> memoryview:
        """All bytes, writable."""
        if self._mapping is None:
            self._mapping = mmap.mmap(self.fd, self.geometry.total)
            self._mapping.madvise(mmap.MADV_DONTFORK)  # workers that the trainer forks have no use for it
        return memoryview(self._mapping)

    def headers(self) -> list[Header]:
        """Whole headers, newest first. Their data are not verified."""
        found = (read_header(self.fd, self.geometry, index) for index in self.geometry.indices)
        return sorted((header for header in found if header), key=lambda header: -header.generation)

    def constant(self) -> Slot | None:
        """The constant region's table, None where nothing whole is there. Its data are not verified."""
        try:
            return read_slot(self.fd, self.geometry, CONSTANT)
        except BrokenCheckpoint:
            return None

    def read(self, index: int) -> tuple[Slot, Slot | None]:
        """The slot and the constant region it belongs with. BrokenCheckpoint unless every byte verifies."""
        slot = read_slot(self.fd, self.geometry, index)
        constant = self._constant_of(slot)
        for part in (slot, constant):
            if part is not None:
                for _ in chunks(self.fd, part):
                    pass
        return slot, constant

    def tables(self, index: int) -> tuple[Slot, Slot | None]:
        """As `read`, for one who verifies the data on the way (`chunks`)."""
        slot = read_slot(self.fd, self.geometry, index)
        return slot, self._constant_of(slot)

    def newest(self, on_broken: Callable[[str], None]) -> tuple[Slot, Slot | None] | None:
        """The newest slot that verifies; `on_broken` gets a line for each that claims to be and is not."""
        for header in self.headers():
            try:
                return self.read(header.index)
            except BrokenCheckpoint as error:
                on_broken(f"the snapshot of step {header.step} in memory is skipped: {error}")
        return None

    def discard(self, index: int) -> None:
        """Mark a slot invalid: one that does not verify, or is to be forgotten."""
        os.pwrite(self.fd, bytes(64), self.geometry.start(index))

    @contextmanager
    def claim(self) -> Iterator[int | None]:
        """A slot to write: an invalid one, or the oldest. None when all others than the newest are in use.

        Never the newest, which is all there is if the writer dies, nor one that is being read.
        """
        order = self.headers()
        valid = [header.index for header in order]
        free = [index for index in self.geometry.indices if index not in valid] + valid[:0:-1]
        for index in free:
            with self._guard:
                taken = self._pins[index] > 0 or not self.lock(index, exclusive=True)
            if not taken:
                try:
                    yield index
                finally:
                    self.unlock(index)
                return
        yield None

    def pin(self, index: int) -> None:
        """This process reads slot `index` in place: it is not written until `unpin`."""
        with self._guard:
            self._pins[index] += 1

    def unpin(self, index: int) -> None:
        """See `pin`."""
        with self._guard:
            self._pins[index] -= 1

    def lock(self, index: int, *, exclusive: bool) -> bool:
        """Take slot `index` against other processes; False when one has it."""
        kind = (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB
        try:
            fcntl.lockf(self.fd, kind, self.geometry.size(index), self.geometry.start(index))
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise
        return True

    def unlock(self, index: int) -> None:
        """See `lock`."""
        fcntl.lockf(self.fd, fcntl.LOCK_UN, self.geometry.size(index), self.geometry.start(index))

    def close(self) -> None:
        """Give the descriptor back. The mapping stays for as long as a view of it does."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd, self._mapping = -1, None

    def _constant_of(self, slot: Slot) -> Slot | None:
        if not slot.constant:
            return None
        constant = read_slot(self.fd, self.geometry, CONSTANT)
        if constant.identity != slot.constant:
            raise BrokenCheckpoint("the constant part in memory is not the one that it was taken with")
        return constant
