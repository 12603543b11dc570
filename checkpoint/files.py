"""Files that are on the disk when we say so: created exclusively, hashed while written, fsynced.

Nothing here retries an fsync. When fsync fails, the kernel may already have dropped the dirty pages and will
report success the second time, so the first error is final for that file (Rebello et al., USENIX ATC 2020).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import xxhash

from .errors import BrokenCheckpoint

CHUNK = 16 << 20  # bytes moved at once: large enough for the disk, small enough not to matter in memory


@dataclass(frozen=True)
class FileFacts:
    """What a file must be: its size in bytes and the xxh3-128 of its content, in hex."""

    bytes: int
    xxh3_128: str


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> FileFacts:
    """Create `path` (it must not exist), write the chunks, fsync. OSError leaves a file to be thrown away."""
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        digest = xxhash.xxh3_128()
        size = 0
        for chunk in chunks:
            for piece in _pieces(chunk):
                digest.update(piece)
                size += len(piece)
                _write_all(fd, piece)
        os.fsync(fd)
    finally:
        os.close(fd)
    return FileFacts(size, digest.hexdigest())


def settle_file(path: Path) -> FileFacts:
    """Hash and fsync a file that another library has written, and make it private to its owner."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError(f"{path} is not a regular file: it cannot be part of a checkpoint")
        os.fchmod(fd, 0o600)
        facts = _hash(fd)
        os.fsync(fd)
    finally:
        os.close(fd)
    return facts


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def hash_inside(folder: Path, name: str, *, size: int) -> FileFacts:
    """Size and checksum of folder/name. BrokenCheckpoint when missing, no regular file, or behind a link.

    size: the bytes that it must have; of another size nothing is read, lest a hole of a terabyte be.
    """
    with open_inside(folder, name) as fd:
        found = os.fstat(fd).st_size
        if found != size:
            raise BrokenCheckpoint(f"{name} has {found:,} bytes, {size:,} were written")
        return _hash(fd)


def read_inside(folder: Path, name: str, *, limit: int) -> bytes:
    """The whole of folder/name. BrokenCheckpoint above `limit` bytes, and as for `hash_inside`."""
    with open_inside(folder, name) as fd:
        size = os.fstat(fd).st_size
        if size > limit:
            raise BrokenCheckpoint(f"{name} has {size:,} bytes; at most {limit:,} are read")
        data = bytearray()
        # One byte more than fits, so that a file growing under us is noticed and never read without bound.
        while len(data) <= limit and (piece := os.read(fd, min(CHUNK, limit + 1 - len(data)))):
            data += piece
    if len(data) > limit:
        raise BrokenCheckpoint(f"{name} grew while it was read")
    return bytes(data)


@contextmanager
def open_inside(folder: Path, name: str) -> Iterator[int]:
    """A descriptor of the regular file folder/name, with no symbolic link followed anywhere below `folder`.

    BrokenCheckpoint says what is wrong. `name` is a relative path with forward slashes, already checked.
    """
    parts = PurePosixPath(name).parts
    directory = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(folder, directory)
        try:
            for depth, part in enumerate(parts):
                last = depth == len(parts) - 1
                # O_NONBLOCK: opening a named pipe must not wait for its writer.
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC if last else directory
                inner = os.open(part, flags, dir_fd=fd)
                os.close(fd)
                fd = inner
        except BaseException:
            os.close(fd)
            raise
    except FileNotFoundError:
        raise BrokenCheckpoint(f"{name} is missing") from None
    except OSError as error:
        raise BrokenCheckpoint(f"{name} cannot be opened as a plain file: {error.strerror}") from None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise BrokenCheckpoint(f"{name} is not a regular file")
        yield fd
    finally:
        os.close(fd)


def _hash(fd: int) -> FileFacts:
    digest = xxhash.xxh3_128()
    size = 0
    buffer = memoryview(bytearray(1 << 20))
    while count := os.readv(fd, [buffer]):
        digest.update(buffer[:count])
        size += count
    return FileFacts(size, digest.hexdigest())


def _pieces(chunk: bytes | memoryview) -> Iterator[memoryview]:
    if not len(chunk):
        return  # a view with a zero in its shape cannot be cast
    view = memoryview(chunk).cast("B")
    for start in range(0, len(view), CHUNK):
        yield view[start : start + CHUNK]


def _write_all(fd: int, piece: memoryview) -> None:
    while piece:
        piece = piece[os.write(fd, piece) :]
