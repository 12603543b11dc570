"""Frozen layers in a file in about 11 bits a weight (`ops.lossless`), decoded while the rest is read.

A layer keeps the room that it has in the file as it is. Its bytes are cut into parts of PART, the first of
them shorter; in the file the parts' codes follow each other, each padded to PAGE for direct transfers, and
what would not become shorter by a page (other types, random bits) is written as it is.

To read, all codes but the last part's go to the end of the buffer itself, and each is decoded, or copied,
towards the buffer's beginning as soon as it is there. No part overwrites what is still to be decoded: with f
bytes in the first of n parts, part i ends at f + i PART, and the codes from i to n - 2 need at most
(n - 1 - i) PART of the f + (n - 1) PART bytes. So one part of memory for each thread is all that it takes
more, and all of a layer is asked of the disk at once, as it is without a code.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import Tensor

from ..ops.lossless import decode, encode
from .arena import PAGE
from .errors import damaged
from .layer_store import Copier, DiskLayers
from .stamps import checksum
from .transfers import Transfer, Transfers

PART = 2 << 20
"""Bytes of a layer that are coded together: decoded in half a millisecond."""


@dataclass(frozen=True)
class _Part:
    """Bytes `start` to `end` of a layer, kept from `at` on after the layer's offset.

    length: of their code, which has a checksum in it; None where they are kept as they are, with the checksum
    here.
    """

    start: int
    end: int
    at: int
    length: int | None
    checksum: int = 0

    @property
    def room(self) -> int:
        """Bytes in the file."""
        return self.end - self.start if self.length is None else -(-self.length // PAGE) * PAGE


class CodedLayers(DiskLayers):
    """Layers in a file, the first contents of some of them coded.

    A layer that is written again (merged, say) is kept as it is from then on.

    path: of the file, for messages. coded: offsets of the layers to code. spare: host memory of PART bytes
    for each thread that may read or write. threads: that decode one part. Others: see DiskLayers.
    """

    def __init__(
        self,
        transfers: Transfers,
        staging: list[Tensor],
        copier: Copier,
        *,
        path: Path,
        coded: Iterable[int],
        spare: list[Tensor],
        threads: int = 1,
    ) -> None:
        super().__init__(transfers, staging, copier)
        self._path, self._threads = path, threads
        self._waiting = set(coded)  # for their first contents
        self._parts: dict[int, list[_Part]] = {}
        self._spare: SimpleQueue[Tensor] = SimpleQueue()
        for memory in spare:
            self._spare.put(memory)
        self._sizes: dict[int, tuple[int, int]] = {}

    @property
    def share(self) -> float:
        """Bytes in the file over bytes in memory, of the layers to code as they were first written."""
        sizes = self._sizes.values()
        return sum(coded for _, coded in sizes) / sum(plain for plain, _ in sizes)

    def is_coded(self, offset: int) -> bool:
        """Whether the layer there cannot be read from the file without decoding."""
        return offset in self._parts

    def read(self, offset: int, into: Tensor) -> None:
        """See LayerStore. OffloadError: what is there is not what was written."""
        parts = self._parts.get(offset)
        if parts is None:
            super().read(offset, into)
            return
        spare = self._spare.get()
        try:
            with self._in_host(into) as memory:
                self._read(offset, parts, memory, spare, into)
        finally:
            self._spare.put(spare)

    def write(self, offset: int, data: Tensor) -> None:
        """See LayerStore."""
        self._parts.pop(offset, None)
        if offset not in self._waiting:
            super().write(offset, data)
            return
        self._waiting.discard(offset)
        spare = self._spare.get()
        try:
            with self._in_host(data) as memory:
                if memory is not data:
                    self._copier.copy(memory, data)
                parts = self._write(offset, memory, spare)
        finally:
            self._spare.put(spare)
        self._sizes[offset] = len(data), sum(part.room for part in parts)
        if any(part.length is not None for part in parts):
            self._parts[offset] = parts

    def _write(self, offset: int, memory: Tensor, spare: Tensor) -> list[_Part]:
        parts, at = [], 0
        ends = range(len(memory) % PART or PART, len(memory) + 1, PART)
        for end in ends:
            start = max(0, end - PART)
            plain = memory[start:end]
            code = encode(plain.view(torch.bfloat16))
            part = _Part(start, end, at, len(code))
            if part.room < len(plain):
                spare[: len(code)] = code
                spare[len(code) : part.room] = 0
                plain = spare[: part.room]
            else:
                part = _Part(start, end, at, None, checksum(plain))
            self._transfers.write(offset + at, plain).wait()
            parts.append(part)
            at += part.room
        return parts

    def _read(self, offset: int, parts: list[_Part], memory: Tensor, spare: Tensor, into: Tensor) -> None:
        end = len(memory) - sum(part.room for part in parts[:-1])
        begun: list[tuple[_Part, Tensor, Transfer]] = []
        try:
            for part in parts:
                begin, end = end, end + part.room
                code = spare[: part.room] if part is parts[-1] else memory[begin:end]
                begun.append((part, code, self._transfers.read(offset + part.at, code)))
            for part, code, transfer in begun:
                transfer.wait()
                plain = memory[part.start : part.end]
                self._expand(offset, part, code, plain)
                if memory is not into:
                    self._copier.copy(into[part.start : part.end], plain)
        except BaseException:
            for _, _, transfer in begun:  # they must not write into memory that another layer has by then
                with suppress(Exception):  # the first one is raised
                    transfer.wait()
            raise

    def _expand(self, offset: int, part: _Part, code: Tensor, plain: Tensor) -> None:
        if part.length is None:
            if checksum(code) != part.checksum:
                raise damaged(self._path, offset + part.at, "their checksum differs")
            plain.copy_(code)
            return
        try:
            decode(code[: part.length], plain.view(torch.bfloat16), threads=self._threads)
        except ValueError as error:
            raise damaged(self._path, offset + part.at, str(error)) from None
