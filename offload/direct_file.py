"""One scratch file of a fixed size that is read and written past the page cache, at byte offsets.

Why past the cache: the state is on disk because memory is short, and the cache would take that memory back.
Where the file system refuses O_DIRECT (EINVAL at open or at the first transfer), transfers go through the
cache and are dropped from it afterwards; dirty pages leave it only once they are written.

Alignment: address, offset and length of a transfer are multiples of `alignment` (statx(2), STATX_DIOALIGN).
It is held on every file system, so that what runs on one runs on all.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from pathlib import Path

from .errors import OffloadError, disk_error, end_of_file

PAGE = 4096  # what arenas and segments are aligned to
_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000
_STATX_BYTES = 256
_DIO_MEM_ALIGN = 152  # offset in struct statx; stx_dio_offset_align follows it
_MEMORY_FILE_SYSTEMS = {0x01021994: "tmpfs", 0x858458F6: "ramfs"}


class DirectFile:
    """A new file of nbytes (rounded up to 4,096), its blocks allocated, its contents undefined.

    direct: transfers go past the page cache. lines: what a person should know about the file system.
    Several threads may transfer at once; ranges that overlap are the caller's to order.
    """

    def __init__(self, path: Path, nbytes: int) -> None:
        if nbytes < 1:
            raise ValueError(f"a scratch file needs at least one byte, not {nbytes}")
        self.path = path
        self.lines: list[str] = []
        self.direct = False
        self.alignment = PAGE
        self.nbytes = -(-nbytes // PAGE) * PAGE
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            self.fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise disk_error("create", path, 0, nbytes, error.errno or errno.EIO) from None
        try:
            # Before O_DIRECT, under which a C library that writes zeros instead would fail.
            self._allocate(self.fd, 0, self.nbytes)
            self._open_direct(flags)
            if self.direct:
                self._probe()
            self._warn_of_memory()
        except BaseException:
            self.close()
            raise

    def _open_direct(self, flags: int) -> None:
        try:
            direct = os.open(self.path, flags | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise disk_error("open", self.path, 0, self.nbytes, error.errno or errno.EIO) from None
            self._give_up_direct()
            return
        os.close(self.fd)
        self.fd = direct
        self.direct = True
        self.alignment = dio_alignment(self.fd) or PAGE
        if self.alignment > PAGE:
            line = f"its file system wants transfers aligned to {self.alignment:,} bytes, more than {PAGE:,}"
            self._give_up_direct(line)

    def _give_up_direct(self, why: str = "its file system refuses O_DIRECT") -> None:
        """Go through the page cache from now on, on a descriptor without O_DIRECT."""
        if self.direct:
            plain = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            os.close(self.fd)
            self.fd = plain
        self.direct, self.alignment = False, PAGE
        self.lines.append(
            f"{self.path.parent}: {why}, so transfers go through the page cache: slower, and the cache takes "
            "memory. A local ext4 or XFS disk is better: offload.disk_path=PATH"
        )

    def _allocate(self, fd: int, offset: int, nbytes: int) -> None:
        try:
            os.posix_fallocate(fd, offset, nbytes)
        except OSError as error:
            raise disk_error("allocate", self.path, offset, nbytes, error.errno or errno.EIO) from None

    def grow(self, nbytes: int) -> None:
        """Make it nbytes long (rounded up to 4,096), the further blocks allocated too.

        OffloadError: there is no room; then it is as it was.
        """
        longer = -(-nbytes // PAGE) * PAGE
        plain = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)  # see above
        try:
            self._allocate(plain, self.nbytes, longer - self.nbytes)
        except BaseException:
            os.ftruncate(plain, self.nbytes)
            raise
        finally:
            os.close(plain)
        self.nbytes = longer

    def _probe(self) -> None:
        """Write and read one block: some file systems take the flag and refuse the transfer."""
        block = memoryview(mmap.mmap(-1, PAGE))
        try:
            moved = os.pwritev(self.fd, [block], 0), os.preadv(self.fd, [block], 0)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise disk_error("try", self.path, 0, PAGE, error.errno or errno.EIO) from None
            self._give_up_direct()
            return
        if moved != (PAGE, PAGE):
            raise disk_error("try", self.path, 0, PAGE, errno.EIO)

    def _warn_of_memory(self) -> None:
        kind = _MEMORY_FILE_SYSTEMS.get(_file_system(self.fd))
        if kind is not None:
            self.lines.append(
                f"{self.path.parent} is on {kind}, which is memory: nothing is gained by storing state "
                "there. Choose a folder on a disk: offload.disk_path=PATH"
            )

    def check(self, offset: int, nbytes: int, address: int | None = None) -> None:
        """ValueError unless a transfer of nbytes at offset, from or to address, is allowed."""
        for name, value in (("offset", offset), ("length", nbytes), ("address", address or 0)):
            if value % self.alignment:
                raise ValueError(
                    f"{name} {value} of a transfer to {self.path} is no multiple of {self.alignment}, "
                    "the alignment of its file system"
                )
        if offset < 0 or offset + nbytes > self.nbytes:
            raise ValueError(
                f"bytes {offset} to {offset + nbytes} are outside {self.path} of {self.nbytes} bytes"
            )

    def read(self, offset: int, into: memoryview) -> None:
        """Fill `into` from offset on, whole.

        Raises OffloadError where the disk fails or the file ends early, ValueError for a misaligned transfer.
        """
        self._transfer("read", offset, into)

    def write(self, offset: int, data: memoryview) -> None:
        """Store `data` at offset, whole. Raises OffloadError and ValueError, see `read`."""
        self._transfer("write", offset, data)

    def _transfer(self, verb: str, offset: int, data: memoryview) -> None:
        self.check(offset, data.nbytes)
        call = os.preadv if verb == "read" else os.pwritev
        done = 0
        while done < data.nbytes:
            try:
                count = call(self.fd, [data[done:]], offset + done)
            except OSError as error:
                number = error.errno or errno.EIO
                raise disk_error(verb, self.path, offset + done, data.nbytes - done, number) from None
            done = self.advance(verb, offset, data.nbytes, done, count)
        self.forget(offset, data.nbytes)

    def advance(self, verb: str, offset: int, nbytes: int, done: int, count: int) -> int:
        """How far a transfer is after `count` more bytes: a short one goes on at the last aligned byte.

        Raises OffloadError where it cannot go on: the file ended, or the disk took nothing.
        """
        reached = done + count
        if reached < nbytes:
            reached -= reached % self.alignment
            if reached <= done:
                raise self._stuck(verb, offset + done + count, nbytes - done - count)
        return reached

    def _stuck(self, verb: str, offset: int, missing: int) -> OffloadError:
        if verb == "read":
            return end_of_file(self.path, offset, missing)
        return disk_error(verb, self.path, offset, missing, errno.EIO)

    def forget(self, offset: int, nbytes: int) -> None:
        """Drop a transferred range from the page cache; nothing to do where transfers go past it."""
        if not self.direct:
            os.posix_fadvise(self.fd, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def close(self, *, remove: bool = True) -> None:
        """Close the file and delete it; again does nothing."""
        if self.fd < 0:
            return
        os.close(self.fd)
        self.fd = -1
        if remove:
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def dio_alignment(fd: int) -> int | None:
    """Bytes that O_DIRECT on fd wants all three of address, offset and length aligned to; None: not told."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "statx"):
        return None
    answer = (ctypes.c_char * _STATX_BYTES)()
    if libc.statx(fd, b"", _AT_EMPTY_PATH, ctypes.c_uint(_STATX_DIOALIGN), answer) != 0:
        return None
    (mask,) = struct.unpack_from("=I", answer, 0)
    memory, offset = struct.unpack_from("=II", answer, _DIO_MEM_ALIGN)
    if not mask & _STATX_DIOALIGN or not memory or not offset:
        return None
    return max(int(memory), int(offset))


def _file_system(fd: int) -> int:
    """f_type of statfs(2), or 0 where it is not told."""
    libc = ctypes.CDLL(None, use_errno=True)
    answer = (ctypes.c_char * 256)()
    if not hasattr(libc, "fstatfs") or libc.fstatfs(fd, answer) != 0:
        return 0
    return int(struct.unpack_from("@l", answer, 0)[0]) & 0xFFFFFFFF
