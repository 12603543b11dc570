"""What the disk under a folder does: reading, writing, and both together, past the page cache.

Both together is the rate that counts: state is read and written in one pass, and a drive does then far less
than the sum of both (docs/offload.md).
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, cycle
from pathlib import Path

import torch

from .arena import Arena
from .direct_file import DirectFile
from .scratch import open_scratch
from .transfers import BlockTransfers, ThreadTransfers, Transfer, Transfers, Verb

_PIECE = 4 << 20
_PIECES = 6  # in flight
_RACE_SECONDS = 0.1
_ROUNDS = 2


@dataclass(frozen=True)
class DiskRates:
    """Bytes a second: reading alone, writing alone, and the sum of both while both go on."""

    read: float
    write: float
    mixed: float


def measure_disk(
    folder: Path, *, nbytes: int = 256 << 20, seconds: float = 2.0, threads: int = 4
) -> DiskRates:
    """Measure the disk of `folder`, or of its nearest existing parent, with a file that is deleted again.

    seconds: for all three, a quarter for each of the first two; what is in flight at the end is waited for.
    Raises UserError where the folder cannot be written, OffloadError where the disk fails or is full.
    """
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    pieces = max(_PIECES, nbytes // _PIECE)
    with (
        open_scratch(there.resolve()) as scratch,
        DirectFile(scratch.path / "probe", pieces * _PIECE) as file,
    ):
        transfers = ThreadTransfers(file, threads)
        try:
            written, write = _stream(transfers, cycle(_each("write", 0, pieces)), seconds / 4)
            if not file.direct:  # else the next figure is the page cache's
                os.fdatasync(file.fd)
                file.forget(0, file.nbytes)
            filled = min(pieces, written // _PIECE)
            _, read = _stream(transfers, cycle(_each("read", 0, filled)), seconds / 4)
            mixed = mixed_rate(transfers, filled * _PIECE, seconds / 2)
        finally:
            transfers.close()
    return DiskRates(read, write, mixed)


def race(file: DirectFile, engines: Sequence[Callable[[], BlockTransfers]]) -> list[float]:
    """The best mixed rate of each engine, in turns on one part of `file`, whose bytes are overwritten."""
    best = [0.0] * len(engines)
    region = min(file.nbytes, 128 << 20) // _PIECE * _PIECE
    for lap in range(_ROUNDS):
        for index, engine in enumerate(engines):
            transfers = engine()
            try:
                if lap == index == 0:  # blocks that were never written are slower to write, and read as zeros
                    region, _ = _stream(transfers, _each("write", 0, region // _PIECE), _RACE_SECONDS)
                best[index] = max(best[index], mixed_rate(transfers, region, _RACE_SECONDS))
            finally:
                transfers.close()
    return best


def mixed_rate(transfers: Transfers, nbytes: int, seconds: float) -> float:
    """Bytes a second, read and written in turns: the second half of a file's first nbytes is read while the
    first half is overwritten, again and again for so many seconds.
    """
    half = nbytes // _PIECE // 2
    if half < 1:
        raise ValueError(f"{nbytes} bytes are too few to measure with; take {2 * _PIECE} or more")
    pairs = zip(_each("read", half, 2 * half), _each("write", 0, half), strict=True)
    return _stream(transfers, cycle(chain.from_iterable(pairs)), seconds)[1]


def _each(verb: Verb, first: int, end: int) -> Iterator[tuple[Verb, int]]:
    return ((verb, piece * _PIECE) for piece in range(first, end))


def _stream(transfers: Transfers, jobs: Iterable[tuple[Verb, int]], seconds: float) -> tuple[int, float]:
    """Do jobs (verb, offset) of a piece each, _PIECES in flight, until they or the seconds end.

    Returns bytes moved and bytes a second; what is in flight at the end counts, with its time.
    """
    with Arena(_PIECE * _PIECES) as arena:
        free = deque(arena.take(_PIECE) for _ in range(_PIECES))
        noise = torch.frombuffer(bytearray(os.urandom(_PIECE)), dtype=torch.uint8)
        for buffer in free:
            buffer.copy_(noise)  # a drive may store zeros without writing
        flying: deque[tuple[Transfer, torch.Tensor]] = deque()
        count = 0
        started = time.perf_counter()
        for verb, offset in jobs:
            if not free:
                transfer, buffer = flying.popleft()
                transfer.wait()
                free.append(buffer)
            if time.perf_counter() - started >= seconds:
                break
            begin = transfers.read if verb == "read" else transfers.write
            buffer = free.popleft()
            flying.append((begin(offset, buffer), buffer))
            count += 1
        for transfer, _ in flying:
            transfer.wait()
        return count * _PIECE, count * _PIECE / (time.perf_counter() - started)
