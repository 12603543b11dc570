"""Where layers lie while they are not in a buffer: host memory, or a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, Protocol

import torch
from torch import Tensor

from .transfers import Transfers


class LayerStore(Protocol):
    """Both calls return when it is done, and may come from several threads at once."""

    @property
    def bytes_read(self) -> int:
        """So far."""
        ...

    @property
    def bytes_written(self) -> int:
        """So far."""
        ...

    def read(self, offset: int, into: Tensor) -> None:
        """Fill a buffer (uint8, on the device that computes). OffloadError: the disk failed."""
        ...

    def write(self, offset: int, data: Tensor) -> None:
        """Store a buffer. OffloadError: the disk failed."""
        ...


class Copier:
    """Copies between buffers on `device` and host memory, on an accelerator beside what it computes.

    The path of an accelerator has not been run on one.
    """

    def __init__(self, device: torch.device) -> None:
        cuda: Any = torch.cuda  # untyped in torch
        self._stream = cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, into: Tensor, source: Tensor) -> None:
        """Return when the bytes are there."""
        if self._stream is None:
            into.copy_(source)
            return
        with torch.cuda.stream(self._stream):
            into.copy_(source, non_blocking=True)
        self._stream.synchronize()


class HostLayers:
    """Layers in one piece of host memory (uint8), pinned where an accelerator computes."""

    def __init__(self, memory: Tensor, copier: Copier) -> None:
        self._memory, self._copier = memory, copier
        self.bytes_read = self.bytes_written = 0

    def read(self, offset: int, into: Tensor) -> None:
        """See LayerStore."""
        self._copier.copy(into, self._memory[offset : offset + len(into)])
        self.bytes_read += len(into)

    def write(self, offset: int, data: Tensor) -> None:
        """See LayerStore."""
        self._copier.copy(self._memory[offset : offset + len(data)], data)
        self.bytes_written += len(data)


class DiskLayers:
    """Layers in a file.

    staging: pinned host memory that buffers on an accelerator go through, one for each thread that may read
    or write at the same time; none where the buffers are in host memory.
    """

    def __init__(self, transfers: Transfers, staging: list[Tensor], copier: Copier) -> None:
        self._transfers, self._copier = transfers, copier
        self._staging: SimpleQueue[Tensor] | None = None
        if staging:
            self._staging = SimpleQueue()
            for memory in staging:
                self._staging.put(memory)

    @property
    def bytes_read(self) -> int:
        """From the disk so far."""
        return self._transfers.bytes_read

    @property
    def bytes_written(self) -> int:
        """To the disk so far."""
        return self._transfers.bytes_written

    def read(self, offset: int, into: Tensor) -> None:
        """See LayerStore."""
        with self._in_host(into) as memory:
            self._transfers.read(offset, memory).wait()
            if memory is not into:
                self._copier.copy(into, memory)

    def write(self, offset: int, data: Tensor) -> None:
        """See LayerStore."""
        with self._in_host(data) as memory:
            if memory is not data:
                self._copier.copy(memory, data)
            self._transfers.write(offset, memory).wait()

    @contextmanager
    def _in_host(self, buffer: Tensor) -> Iterator[Tensor]:
        """Host memory as long as the buffer: itself, or pinned memory that its bytes go through."""
        if self._staging is None:
            yield buffer
            return
        memory = self._staging.get()
        try:
            yield memory[: len(buffer)]
        finally:
            self._staging.put(memory)
