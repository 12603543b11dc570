"""Where each segment lies in the scratch file: in one place, or in one of two.

With two places a snapshot of the state costs no copy. `freeze` pins the places that hold the state as of now;
a later write of a segment goes to its other place. Two are enough because the first write after a `freeze`
comes only once that snapshot is published, and with it the one before is nobody's (`release`).

A write goes to the place that the segment has, unless a snapshot names it: then to the other one. So of a
write that was cut off half-way the rest lies where no snapshot looks.
"""

from __future__ import annotations

from collections.abc import Sequence

from .segments import Segment


class Places:
    """Offsets in the file of `segments`, which lie one after the other; their second places follow."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._offsets = [segment.offset for segment in segments]
        self._second = sum(segment.nbytes for segment in segments)
        self._at = [0] * len(segments)
        self._published: list[int] | None = None
        self._frozen: list[int] | None = None

    def of(self, index: int) -> int:
        """Where the bytes of a segment are."""
        return self._offsets[index] + self._second * self._at[index]

    def for_write(self, index: int) -> int:
        """Where they are from now on: a place that no snapshot names.

        RuntimeError where there is none: neither `release` nor `thaw` was called since `freeze`.
        """
        named = [places[index] for places in (self._published, self._frozen) if places is not None]
        free = [place for place in (self._at[index], 1 - self._at[index]) if place not in named]
        if not free:
            raise RuntimeError(f"segment {index} is written before the frozen state is released")
        self._at[index] = free[0]
        return self.of(index)

    def freeze(self) -> None:
        """From now on the present places are not written, as those of the snapshot before."""
        if self._frozen is not None:
            raise RuntimeError("frozen again before the state frozen last was released")
        self._frozen = list(self._at)

    def release(self) -> None:
        """What is frozen is published: it is the snapshot that counts, and the one before no more."""
        if self._frozen is not None:
            self._published, self._frozen = self._frozen, None

    def thaw(self) -> None:
        """What is frozen will not be published: the snapshot before stays the one that counts."""
        self._frozen = None
