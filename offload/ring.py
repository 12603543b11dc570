"""Buffers through which segments pass: read ahead of their use, written back behind it.

The order of the next uses is known, so the buffer that is given up is the one whose segment is needed last
(Belady's rule). Where each pass goes the other way round, as `OffloadedOptimizer` lets it, those are the
segments of the last pass's end that begin the next one: they stay in memory, and are neither written nor read
in between. Where all passes go the same way (steps inside the backward pass), some segments stay for good and
the others stream through the rest of the buffers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from torch import Tensor

from .errors import OffloadError
from .frozen import Extent, Frozen
from .places import Places
from .segments import Segment
from .stamps import checksum, stamp, wrong_stamp
from .transfers import Transfers

_FREE = -1
_NEVER = 1 << 62


class _Buffer:
    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.segment = _FREE
        self.dirty = False
        self.users = 0
        self.loading: Future[None] | None = None

    @property
    def is_idle(self) -> bool:
        return self.users == 0 and (self.loading is None or self.loading.done())


class Ring:
    """Segments in `buffers` (uint8 tensors, each as large as the largest segment), the rest in a file.

    One thread uses it; others of its own read and write. grow: makes the file twice as long, so that the
    state can be frozen; called by the first `freeze`. Without it there are no checksums.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        buffers: Sequence[Tensor],
        transfers: Transfers,
        grow: Callable[[], None] | None = None,
    ) -> None:
        largest = max((segment.nbytes for segment in segments), default=0)
        if len(buffers) < 3 or any(len(buffer) < largest for buffer in buffers):
            raise ValueError(f"a ring needs three buffers of {largest} bytes or more")
        self._segments, self._transfers = segments, transfers
        self._buffers = [_Buffer(memory) for memory in buffers]
        self._at: dict[int, _Buffer] = {}
        self._writes: dict[int, Future[None]] = {}  # of segments that have left their buffer
        self._written = [0] * len(segments)
        self._places = Places(segments)
        self._grow, self._has_grown = grow, False
        self._checksums: dict[int, Future[int]] = {}
        self._uses: list[int] = []  # this pass and the next one
        self._positions: dict[int, list[int]] = {}
        self._cursor = self._ahead = 0
        self._error: OffloadError | None = None
        self._pool = ThreadPoolExecutor(len(buffers), thread_name_prefix="shoestring-offload")

    @property
    def traffic(self) -> tuple[int, int]:
        """See Holder."""
        return self._transfers.bytes_read, self._transfers.bytes_written

    def expect(self, uses: Sequence[int], following: Sequence[int], *, same_way: bool = False) -> None:
        """See Holder. Where all go the same way, half of the buffers read ahead and the others stay."""
        self._raise()
        self._uses = [*uses, *following]
        self._positions = {}
        for position, segment in enumerate(self._uses):
            self._positions.setdefault(segment, []).append(position)
        self._cursor = 0
        self._ahead = len(self._buffers) // 2 if same_way else len(self._buffers)
        self._read_ahead()

    @contextmanager
    def using(self, index: int, *, changes: bool, expected: bool = True) -> Iterator[Tensor]:
        """See Holder. Changed bytes are written before they leave memory."""
        self._raise()
        if expected:
            self._move_cursor(index)
        buffer = self._at.get(index)
        if buffer is None:
            buffer = self._any_victim()
            self._fetch(index, buffer)
        self._settle(buffer)
        buffer.users += 1
        try:
            yield buffer.memory[: self._segments[index].nbytes]
        finally:
            buffer.users -= 1
            buffer.dirty |= changes
        if expected:
            self._cursor += 1
            self._read_ahead()

    def wait(self) -> None:
        """See Holder."""
        for buffer in self._buffers:
            if buffer.loading is not None:
                self._settle(buffer)

    def freeze(self) -> Frozen:
        """The state as of now: its places are not written until `release` was called after the next `freeze`.

        What is changed in memory is written in the background. Before anything changes again, `release` or
        `thaw` must be called. OffloadError: the file cannot grow, or the disk failed before.
        """
        self._raise()
        if self._grow is None:
            raise ValueError("state is frozen that was not made for it")
        if not self._has_grown:
            self._grow()
            self._has_grown = True
        for buffer in self._buffers:
            if buffer.dirty:
                self._settle(buffer)
                buffer.dirty = False
                buffer.loading = self._pool.submit(self._begin_write(buffer))
        writes = [buffer.loading for buffer in self._buffers if buffer.loading is not None]
        self._places.freeze()
        return Frozen(
            [self._extent(segment) for segment in self._segments], [*writes, *self._writes.values()]
        )

    def release(self) -> None:
        """The snapshot of what is frozen is published: of the one before it nothing is needed any more."""
        self._places.release()

    def thaw(self) -> None:
        """What is frozen gets no snapshot: the places of the one before stay as they are."""
        self._places.thaw()

    def close(self) -> None:
        """See Holder."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._at.clear()

    def _move_cursor(self, index: int) -> None:
        positions = self._positions.get(index, [])
        found = bisect_left(positions, self._cursor)
        if found < len(positions):
            self._cursor = positions[found]

    def _read_ahead(self) -> None:
        for position in range(self._cursor, min(self._cursor + self._ahead, len(self._uses))):
            index = self._uses[position]
            if index in self._at:
                continue
            buffer = self._victim(position)
            if buffer is None:
                return
            self._fetch(index, buffer)

    def _victim(self, position: int) -> _Buffer | None:
        """The idle buffer whose segment is needed last, if that is after `position`."""
        best, latest = None, position
        for buffer in self._buffers:
            if buffer.segment == _FREE:
                return buffer
            next_use = self._next_use(buffer.segment)
            if next_use > latest and buffer.is_idle:
                best, latest = buffer, next_use
        return best

    def _any_victim(self) -> _Buffer:
        """For a segment that nobody expected: what is read ahead may have to go again."""
        buffer = self._victim(-1)
        if buffer is None:
            buffer = max((b for b in self._buffers if b.users == 0), key=lambda b: self._next_use(b.segment))
        return buffer

    def _next_use(self, segment: int) -> int:
        positions = self._positions.get(segment, [])
        found = bisect_left(positions, self._cursor)
        return positions[found] if found < len(positions) else _NEVER

    def _fetch(self, index: int, buffer: _Buffer) -> None:
        """Write what is in `buffer` if it changed, then read segment `index` into it; in the background."""
        self._settle(buffer)
        old = buffer.segment
        write: Callable[[], None] | None = None
        written: Future[None] = Future()
        if old != _FREE:
            del self._at[old]
            if buffer.dirty:
                write = self._begin_write(buffer)
                self._writes[old] = written
        new = self._segments[index]
        before = self._writes.pop(index, None)
        buffer.segment, buffer.dirty = index, False
        self._at[index] = buffer
        reads, offset = self._written[index] > 0, self._places.of(index)

        def move() -> None:
            try:
                if write is not None:
                    write()
                written.set_result(None)
            except BaseException as error:
                written.set_exception(error)
                raise
            if before is not None:
                before.result()
            if reads:
                self._transfers.read(offset, buffer.memory[: new.nbytes]).wait()
                self._check(buffer.memory[: new.nbytes], index)

        buffer.loading = self._pool.submit(move)

    def _begin_write(self, buffer: _Buffer) -> Callable[[], None]:
        """Stamp what is in `buffer` and give it a place; what is returned writes it, for another thread."""
        index = buffer.segment
        data = buffer.memory[: self._segments[index].nbytes]
        offset = self._places.for_write(index)
        self._written[index] += 1
        stamp(data, index, self._written[index])
        summed: Future[int] | None = None
        if self._grow is not None:
            summed = self._checksums[index] = Future()

        def write() -> None:
            if summed is not None:
                summed.set_result(checksum(data))
            self._transfers.write(offset, data).wait()

        return write

    def _extent(self, segment: Segment) -> Extent | None:
        index = segment.index
        if not self._written[index]:
            return None
        summed = self._checksums[index].result()  # at once: the first thing that a write does
        return Extent(self._places.of(index), segment.nbytes, self._written[index], summed)

    def _settle(self, buffer: _Buffer) -> None:
        if buffer.loading is None:
            return
        try:
            buffer.loading.result()
        except OffloadError as error:
            # A segment may exist nowhere any more: no step after this one could be right.
            self._error = error
            raise
        buffer.loading = None

    def _raise(self) -> None:
        if self._error is not None:
            raise OffloadError(f"{self._error}\n  Resume from the last checkpoint.")

    def _check(self, data: Tensor, index: int) -> None:
        wanted = index, self._written[index]
        found = wrong_stamp(data, *wanted)
        if found is not None:
            raise OffloadError(
                f"offload: segment {index} of the optimizer's state came back as (segment, write) "
                f"{found}, not {wanted}: the disk returned other bytes than were written"
            )
