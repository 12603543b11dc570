"""What gives the bytes of segments for use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from torch import Tensor

from .segments import Segment


class Holder(Protocol):
    """What gives the bytes of segments for use: `Ring`, or `Resident` where all are in memory."""

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes read from the disk and written to it so far."""
        ...

    def expect(self, uses: Sequence[int], following: Sequence[int], *, same_way: bool = False) -> None:
        """Segments of the pass that begins, in the order of their uses, and of the pass after it.

        same_way: whether all passes go the same way.
        """
        ...

    def using(self, index: int, *, changes: bool, expected: bool = True) -> AbstractContextManager[Tensor]:
        """Inside, the bytes (uint8) of a segment in memory; changed ones are kept.

        expected: whether the use is one of those that `expect` told. OffloadError: the disk failed, now or
        before.
        """
        ...

    def wait(self) -> None:
        """Until nothing is read or written any more. OffloadError: the disk failed."""
        ...

    def close(self) -> None:
        """Let go; what is in memory is lost."""
        ...


class Resident:
    """All segments in one piece of memory, each at its offset."""

    traffic = (0, 0)

    def __init__(self, segments: Sequence[Segment], memory: Tensor) -> None:
        self._segments, self._memory = segments, memory

    def expect(self, uses: Sequence[int], following: Sequence[int], *, same_way: bool = False) -> None:
        """See Holder."""

    @contextmanager
    def using(self, index: int, *, changes: bool, expected: bool = True) -> Iterator[Tensor]:
        """See Holder."""
        segment = self._segments[index]
        yield self._memory[segment.offset : segment.offset + segment.nbytes]

    def wait(self) -> None:
        """See Holder."""

    def close(self) -> None:
        """See Holder."""
