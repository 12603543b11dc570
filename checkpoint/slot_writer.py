"""Writing one slot, so that a kill at any moment leaves it whole, or plainly not.

    1  the header is overwritten with zeros           from here on the slot is invalid
    2  files are copied in, chunk by chunk, each checksummed when it is full
    3  the table is written
    4  the header, last: with it the slot is the newest

The name of each point is told to `at`, which tests use to kill the process there.
"""

from __future__ import annotations

from collections.abc import Callable

import xxhash

from .slots import (
    ALIGN,
    CHUNK,
    HEADER_BYTES,
    PAGE,
    Extent,
    Geometry,
    Header,
    digest,
    encode_header,
    encode_table,
)

PIECE = 512 << 10  # bytes copied at once: what a core has for itself in its cache, measured best
POINTS = ("claimed", "invalid", "file", "chunk", "data", "table", "published")


def nothing(point: str) -> None:
    """The `at` of every run that is not a test."""


class SlotWriter:
    """Fills slot `index` of a writable mapping of the whole memory. One use: files, then `publish`."""

    def __init__(
        self, memory: memoryview, geometry: Geometry, index: int, at: Callable[[str], None] = nothing
    ) -> None:
        start = geometry.start(index)
        self._slot = memory[start : start + geometry.size(index)]
        self._index, self._at = index, at
        self._files: dict[str, Extent] = {}
        self._digests = bytearray()
        self._state = xxhash.xxh3_128()  # of the chunk that is being filled
        self._position = 0  # in the data
        at("claimed")
        self._slot[:HEADER_BYTES] = bytes(HEADER_BYTES)
        at("invalid")

    def begin_file(self, name: str, length: int, xxh3_128: str = "") -> None:
        """What is written from here on is the file `name`, `length` bytes. ValueError when it cannot fit."""
        gap = -self._position % ALIGN
        if PAGE + self._position + gap + length > len(self._slot):
            raise ValueError(
                f"{name} ({length:,} bytes) does not fit into a slot of {len(self._slot):,} bytes"
            )
        self.write(bytes(gap))
        self._files[name] = Extent(self._position, length, xxh3_128)
        self._at("file")

    @property
    def files(self) -> dict[str, Extent]:
        """Where each file is that was begun."""
        return dict(self._files)

    @property
    def data(self) -> memoryview:
        """What was written so far."""
        return self._slot[PAGE : PAGE + self._position]

    @property
    def digests(self) -> bytes:
        """Checksums of what was written so far, of each chunk; of the last one as far as it goes."""
        rest = self._state.digest() if self._position % CHUNK else b""
        return bytes(self._digests) + rest

    @property
    def until_piece(self) -> int:
        """Bytes to copy at once, so that they are in the cache when they are checksummed; then PIECE each."""
        return PIECE - self._position % PIECE

    def room(self, count: int) -> memoryview:
        """The next `count` bytes, to be written; then `advance`."""
        begin = PAGE + self._position
        if begin + count > len(self._slot):
            raise ValueError(f"{count:,} bytes more do not fit into a slot of {len(self._slot):,} bytes")
        return self._slot[begin : begin + count]

    def advance(self, count: int) -> None:
        """The next `count` bytes are written: they are checksummed."""
        end = self._position + count
        while self._position < end:
            stop = min(end, (self._position // CHUNK + 1) * CHUNK)
            self._state.update(self._slot[PAGE + self._position : PAGE + stop])
            self._position = stop
            if stop % CHUNK == 0:
                self._end_chunk()

    def write(self, data: bytes | memoryview) -> None:
        """Copy `data`, bytes, to the next place."""
        view = memoryview(data).cast("B")
        while view:
            count = min(len(view), self.until_piece)
            self.room(count)[:] = view[:count]
            self.advance(count)
            view = view[count:]

    def publish(self, *, generation: int, step: int, constant: str = "") -> Header:
        """Table, then header: the slot is the newest when this returns. ValueError when it cannot fit."""
        if self._position % CHUNK:
            self._end_chunk()
        self._at("data")
        text = encode_table(self._files, constant)
        table = text + bytes(self._digests)
        self.room(len(table))[:] = table
        self._at("table")
        header = Header(self._index, generation, step, self._position, len(text), digest(table))
        self._slot[:HEADER_BYTES] = encode_header(header)
        self._at("published")
        return header

    def _end_chunk(self) -> None:
        self._digests += self._state.digest()
        self._state = xxhash.xxh3_128()
        self._at("chunk")
