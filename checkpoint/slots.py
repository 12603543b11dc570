"""How snapshots lie in memory: slots of bytes in one memory file, each believed only when all of it verifies.

    page 0            magic, format, number and size of the slots, checksum
    constant region   one slot for what never changes (0 bytes where there is nothing)
    slot 0, slot 1... snapshots

A slot is one page of header, then data, then a table. The data are files one after another, with exactly the
bytes that they have in a checkpoint directory. The table is a JSON text with name, offset and length of each
file, followed by the xxh3-128 of each 4 MiB chunk of the data. The header has a checksum of the table and one
of itself: so it vouches for every byte, and it is written last (slot_writer.py).

Pure bytes: nothing here knows a tensor, and reading goes through `pread` on the descriptor, so that a process
that only reads needs no mapping and one chunk of memory.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import xxhash

from .errors import BrokenCheckpoint
from .manifest import check_name

PAGE = 64 << 10  # bytes; the largest page that Linux has, so that a slot can be mapped alone
CHUNK = 4 << 20  # bytes under one checksum: large enough for memcpy's speed, small enough for a cache
ALIGN = 64  # of files, so that the tensors in them are aligned for any copy
CONSTANT = -1  # index of the constant region
FORMAT = 1
MOST_SLOTS = 16

_DIGEST = 16
_TEXT_LIMIT = 16 << 20
_FILES_LIMIT = 10_000
_GEOMETRY = struct.Struct("<8sIIIIQQ")
_GEOMETRY_MAGIC = b"SHOEMEM\n"
_HEADER = struct.Struct("<8sIiQQQQ16s")
_HEADER_MAGIC = b"SHOESLOT"
HEADER_BYTES = _HEADER.size + _DIGEST


@dataclass(frozen=True)
class Geometry:
    """Number of slots, bytes of each, bytes of the constant region; the last two are whole pages."""

    slots: int
    slot_bytes: int
    constant_bytes: int = 0

    @property
    def total(self) -> int:
        """Bytes of the memory file."""
        return PAGE + self.constant_bytes + self.slots * self.slot_bytes

    @property
    def indices(self) -> range:
        """The slots that hold snapshots."""
        return range(self.slots)

    def start(self, index: int) -> int:
        """Where slot `index` begins in the memory file."""
        return PAGE if index == CONSTANT else PAGE + self.constant_bytes + index * self.slot_bytes

    def size(self, index: int) -> int:
        """Bytes of slot `index`."""
        return self.constant_bytes if index == CONSTANT else self.slot_bytes


@dataclass(frozen=True)
class Extent:
    """Where a file's bytes are in the data of its slot. `xxh3_128` (hex) is kept of constant files only."""

    offset: int
    bytes: int
    xxh3_128: str = ""


@dataclass(frozen=True)
class Header:
    """First page of a slot. Generations grow by one with each snapshot; steps are the trainer's."""

    index: int
    generation: int
    step: int
    data_bytes: int
    text_bytes: int
    table_digest: bytes


@dataclass(frozen=True)
class Slot:
    """A slot whose header and table have been verified; `chunks` verifies the data."""

    geometry: Geometry
    header: Header
    files: Mapping[str, Extent]
    constant: str  # table checksum (hex) of the constant region that belongs to it; "" for none
    digests: bytes

    @property
    def identity(self) -> str:
        """The checksum, in hex, that stands for every byte of the data."""
        return self.header.table_digest.hex()


def digest(data: bytes | memoryview) -> bytes:
    """The xxh3-128 of `data`, 16 bytes."""
    return bytes(xxhash.xxh3_128(data).digest())


def pages(count: int) -> int:
    """`count` bytes rounded up to whole pages."""
    return -(-count // PAGE) * PAGE


def chunk_count(data_bytes: int) -> int:
    """Checksums that so many bytes of data have."""
    return -(-data_bytes // CHUNK)


def slot_bytes(file_bytes: Mapping[str, int]) -> int:
    """Bytes of a slot that can hold files of these lengths, in whole pages."""
    data = sum(-(-count // ALIGN) * ALIGN for count in file_bytes.values())
    names = {name: Extent(1 << 60, 1 << 60, "0" * 32) for name in file_bytes}
    return pages(PAGE + data + len(encode_table(names, "0" * 32)) + _DIGEST * chunk_count(data))


def encode_geometry(geometry: Geometry) -> bytes:
    """Content of page 0."""
    body = _GEOMETRY.pack(
        _GEOMETRY_MAGIC, FORMAT, CHUNK, geometry.slots, 0, geometry.slot_bytes, geometry.constant_bytes
    )
    return body + digest(body)


def read_geometry(fd: int) -> Geometry:
    """Page 0 of a memory file. BrokenCheckpoint unless it is whole and describes exactly this file."""
    data = _read(fd, 0, _GEOMETRY.size + _DIGEST)
    body, checksum = data[: _GEOMETRY.size], data[_GEOMETRY.size :]
    magic, version, chunk, slots, _, size, constant = _GEOMETRY.unpack(body)
    if magic != _GEOMETRY_MAGIC or digest(body) != checksum:
        raise BrokenCheckpoint("the memory's first page does not match its own checksum")
    if version != FORMAT or chunk != CHUNK:
        raise BrokenCheckpoint(f"the memory has format {version}, this version reads {FORMAT}")
    geometry = Geometry(slots, size, constant)
    aligned = size % PAGE == 0 and constant % PAGE == 0 and size > PAGE
    if not 2 <= slots <= MOST_SLOTS or not aligned or geometry.total != os.fstat(fd).st_size:
        raise BrokenCheckpoint("the memory's first page does not describe a file of its size")
    return geometry


def encode_header(header: Header) -> bytes:
    """HEADER_BYTES bytes, with their own checksum."""
    body = _HEADER.pack(
        _HEADER_MAGIC,
        FORMAT,
        header.index,
        header.generation,
        header.step,
        header.data_bytes,
        header.text_bytes,
        header.table_digest,
    )
    return body + digest(body)


def read_header(fd: int, geometry: Geometry, index: int) -> Header | None:
    """The header of a slot; None where there is no whole one: never written, marked invalid, or torn."""
    if geometry.size(index) < PAGE:
        return None
    data = _read(fd, geometry.start(index), HEADER_BYTES)
    body, checksum = data[: _HEADER.size], data[_HEADER.size :]
    magic, version, *fields = _HEADER.unpack(body)
    if magic != _HEADER_MAGIC or version != FORMAT or digest(body) != checksum:
        return None
    header = Header(*fields)
    table = header.text_bytes + _DIGEST * chunk_count(header.data_bytes)
    fits = header.text_bytes <= _TEXT_LIMIT and PAGE + header.data_bytes + table <= geometry.size(index)
    # The index, because a whole slot copied over another one would verify otherwise.
    return header if header.index == index and fits else None


def encode_table(files: Mapping[str, Extent], constant: str) -> bytes:
    """The text before the chunks' checksums."""
    rows = {name: [extent.offset, extent.bytes, extent.xxh3_128] for name, extent in files.items()}
    return json.dumps({"constant": constant, "files": rows}, separators=(",", ":")).encode()


def read_slot(fd: int, geometry: Geometry, index: int) -> Slot:
    """Header and table of a slot. BrokenCheckpoint says what does not hold."""
    header = read_header(fd, geometry, index)
    if header is None:
        raise BrokenCheckpoint("has no whole header")
    where = geometry.start(index) + PAGE + header.data_bytes
    table = _read(fd, where, header.text_bytes + _DIGEST * chunk_count(header.data_bytes))
    if digest(table) != header.table_digest:
        raise BrokenCheckpoint("its table does not match its checksum")
    content = json.loads(table[: header.text_bytes])
    files = {name: _extent(name, row, header) for name, row in content["files"].items()}
    if len(files) > _FILES_LIMIT:
        raise BrokenCheckpoint(f"its table lists more than {_FILES_LIMIT:,} files")
    return Slot(geometry, header, files, str(content["constant"]), table[header.text_bytes :])


def chunks(fd: int, slot: Slot, start: int = 0, stop: int | None = None) -> Iterator[memoryview]:
    """The bytes [start, stop) of a slot's data, in pieces, each handed out after its chunk has verified.

    The pieces are windows on one buffer of CHUNK bytes: use each before asking for the next. Raises
    BrokenCheckpoint.
    """
    end = slot.header.data_bytes
    stop = end if stop is None else stop
    base = slot.geometry.start(slot.header.index) + PAGE
    buffer = memoryview(bytearray(min(CHUNK, max(end, 1))))
    for number in range(start // CHUNK, chunk_count(stop)):
        first = number * CHUNK
        chunk = buffer[: min(CHUNK, end - first)]
        _read_into(fd, base + first, chunk)
        if digest(chunk) != slot.digests[number * _DIGEST : (number + 1) * _DIGEST]:
            raise BrokenCheckpoint(f"chunk {number} of its data does not match its checksum")
        yield chunk[max(0, start - first) : stop - first]


def _extent(name: str, row: Any, header: Header) -> Extent:
    try:
        check_name(name)
    except ValueError as error:
        raise BrokenCheckpoint(str(error)) from None
    match row:
        case [int(offset), int(count), str(checksum)] if 0 <= offset <= offset + count <= header.data_bytes:
            return Extent(offset, count, checksum)
    raise BrokenCheckpoint(f"its table has no place inside the slot for {name}")


def _read(fd: int, offset: int, count: int) -> bytes:
    data = bytearray(count)
    _read_into(fd, offset, memoryview(data))
    return bytes(data)


def _read_into(fd: int, offset: int, buffer: memoryview) -> None:
    while buffer:
        count = os.preadv(fd, [buffer], offset)
        if count == 0:
            raise BrokenCheckpoint("the memory ends before its data")
        buffer, offset = buffer[count:], offset + count
