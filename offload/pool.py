"""Host memory for activations: one region, cut into buffers and joined again, the same in every step.

Why not a stock of buffers by byte count: packed rows have another length in every micro-batch, so a buffer's
exact size hardly comes a second time, and a stock would grow for ever or round sizes up. Here a buffer is the
lowest hole that is large enough. Activations are given back in the reverse of the order in which they were
taken, so that holes join and the next step uses the same addresses. Memory of the region above `reach` has
never been touched and is not resident, unless an arena touched it.
"""

from __future__ import annotations

import threading
from bisect import insort

import torch
from torch import Tensor

from .arena import Arena

ALIGNMENT = 512


class HostPool:
    """`nbytes` of host memory, out of `arena` (pinned, where a device is to copy beside its work) or plain.

    used, peak: bytes in buffers now and at most, each rounded up to 512. reach: end of the highest buffer so
    far. refused: how often `take` had no hole. Any thread may call; so may a finalizer inside a call.
    """

    def __init__(self, nbytes: int, *, arena: Arena | None = None) -> None:
        """ValueError: less than one buffer, or more than the arena has left."""
        if nbytes < ALIGNMENT:
            raise ValueError(f"a pool of {nbytes} bytes holds no buffer; the smallest has {ALIGNMENT}")
        self.nbytes = nbytes // ALIGNMENT * ALIGNMENT
        self.used = self.peak = self.reach = self.refused = 0
        region = torch.empty(self.nbytes, dtype=torch.uint8) if arena is None else arena.take(self.nbytes)
        self._region = region
        self._holes = [(0, self.nbytes)]  # (start, bytes), ascending, no two of them touch
        self._taken: dict[int, int] = {}  # address of a buffer -> bytes
        self._lock = threading.RLock()

    def take(self, nbytes: int) -> Tensor | None:
        """A buffer [nbytes] uint8 with anything in it; None where no hole is large enough."""
        needed = max(1, -(-nbytes // ALIGNMENT)) * ALIGNMENT
        with self._lock:
            place = next((i for i, (_, size) in enumerate(self._holes) if size >= needed), None)
            if place is None:
                self.refused += 1
                return None
            start, size = self._holes[place]
            rest = [(start + needed, size - needed)] if size > needed else []
            self._holes[place : place + 1] = rest
            self.used += needed
            self.peak = max(self.peak, self.used)
            self.reach = max(self.reach, start + needed)
            buffer = self._region[start : start + nbytes]
            self._taken[start] = needed
            return buffer

    def give(self, buffer: Tensor) -> None:
        """Take a buffer back; its memory may be another's from here on. ValueError: it is not out."""
        start = buffer.data_ptr() - self._region.data_ptr()
        with self._lock:
            size = self._taken.pop(start, None)
            if size is None:
                raise ValueError("this buffer is not out: it was given back before, or is another pool's")
            self.used -= size
            insort(self._holes, (start, size))
            place = self._holes.index((start, size))
            for left in (place, place - 1):  # with the hole after it, then with the one before
                if left < 0 or left + 1 >= len(self._holes):
                    continue
                (first, one), (second, two) = self._holes[left : left + 2]
                if first + one == second:
                    self._holes[left : left + 2] = [(first, one + two)]
