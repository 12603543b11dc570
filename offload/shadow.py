"""Snapshots of state in a scratch file that copy none of it: they name the places where it lies.

A later write of a segment goes to its second place (places.py), so what a snapshot names stays as it is.
What of the state is in memory, and the weights, are copied as ever; with them goes a text of the places, of
the number of writes of each segment and of its checksum. So a reader (frozen_reading.py) finds either the
bytes as of that step, all of them, or none.

    freeze        between two steps: tensors to copy, and the text
    release       when the snapshot is published: what only the one before named may be written again
    thaw          where it will not be

and one of the last two before the next step. What is frozen is in the file once the byte `written` among the
tensors can be read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from .direct_file import DirectFile
from .frozen import Written
from .ring import Ring
from .scratch import Scratch
from .stored import Stored, whole

FORMAT = 1

Part = tuple[int, int, int, int]
"""(segment, bytes into it, first element, elements)."""


@runtime_checkable
class Cut(Protocol):
    """A `Stored` whose elements lie in segments."""

    def places(self) -> list[Part] | None:
        """Where each range of elements lies; None where they are in memory."""
        ...


class Shadow:
    """The scratch file of one optimizer's state, for whoever takes snapshots of it."""

    def __init__(self, ring: Ring, file: DirectFile, scratch: Scratch) -> None:
        self._ring, self._file, self._scratch = ring, file, scratch
        self._keeper: tuple[Path, int] | None = None

    def keep(self, run: Path, process: int) -> None:
        """Before the first snapshot is published: see `Scratch.keep`."""
        if self._keeper != (run, process):
            self._scratch.keep(run, process)
            self._keeper = run, process

    def freeze(
        self, tensors: Mapping[str, Tensor | Stored]
    ) -> tuple[dict[str, Tensor | Stored], dict[str, Stored], dict[str, Any]]:
        """Of `tensors`, the state as of now by name: those in memory; `written`; the text of the others.

        The first one takes the second places. OffloadError: there is no room for them, or the disk failed.
        """
        frozen = self._ring.freeze()
        status = os.fstat(self._file.fd)
        there: dict[str, Any] = {}
        here: dict[str, Tensor | Stored] = {}
        for name, value in tensors.items():
            places = value.places() if isinstance(value, Cut) else None
            if places is not None:
                there[name] = {"dtype": str(value.dtype), "shape": list(value.shape), "parts": places}
            else:
                here[name] = whole(value) if isinstance(value, Stored) else value
        text = {
            "format": FORMAT,
            "file": os.path.realpath(self._file.path),
            "identity": [status.st_dev, status.st_ino],
            "segments": [
                None if extent is None else [extent.offset, extent.nbytes, extent.writes, extent.checksum]
                for extent in frozen.extents
            ],
            "tensors": there,
        }
        return here, {"written": Written(frozen.writes)}, text

    def release(self) -> None:
        """See `Ring.release`."""
        self._ring.release()

    def thaw(self) -> None:
        """See `Ring.thaw`."""
        self._ring.thaw()

    def drop(self) -> None:
        """No snapshot names the file any more: it goes with the optimizer, or now if that is closed."""
        self._scratch.drop()
