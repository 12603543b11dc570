"""Reading a snapshot where it lies, with the names that a checkpoint on the disk has for the same things."""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import strict_json
from .errors import BrokenCheckpoint
from .memory import Memory
from .slots import PAGE, Slot
from .tensors import decode_header


@dataclass(frozen=True)
class _Mapped:
    """One slot, mapped copy-on-write: what a reader writes into it stays his, and never reaches the slot."""

    slot: Slot
    mapping: mmap.mmap

    def file(self, name: str) -> memoryview:
        extent = self.slot.files[name]
        start = PAGE + extent.offset
        return memoryview(self.mapping)[start : start + extent.bytes]


class Snapshot:
    """A snapshot that verified when it was opened. Its slot is not written while this, or a view, lives."""

    def __init__(self, memory: Memory, slot: Slot, constant: Slot | None) -> None:
        self.step, self.generation = slot.header.step, slot.header.generation
        self._parts = [_map(memory, part) for part in (slot, constant) if part is not None]
        index = slot.header.index
        memory.pin(index)
        # Views hold the mapping, so the slot is given up with the last of them.
        weakref.finalize(self._parts[0].mapping, memory.unpin, index)

    @property
    def name(self) -> str:
        """What it is called to a person."""
        return f"snapshot-{self.step:06d} in memory"

    @property
    def files(self) -> dict[str, int]:
        """Name and bytes of every file."""
        return {name: extent.bytes for part in self._parts for name, extent in part.slot.files.items()}

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors saved under `name`, in memory of their own. KeyError without such a file."""
        return {key: view.clone() for key, view in self.views(name).items()}

    def views(self, name: str) -> dict[str, Tensor]:
        """As `tensors`, not copied: windows on the slot, which is taken for as long as one of them lives."""
        return views_in(self.file(f"{name}.safetensors"))

    def open_tensors(self, name: str) -> dict[str, MemoryTensor]:
        """As `tensors`, but each is copied when and as far as it is asked for."""
        return {key: MemoryTensor(view) for key, view in self.views(name).items()}

    def json(self, name: str) -> Any:
        """The value saved under `name` (tuples as lists). KeyError when there is no such file."""
        return strict_json.loads(bytes(self.file(f"{name}.json")), name=f"{name}.json")

    def file(self, name: str) -> memoryview:
        """The bytes of a file, a window as `views` has. KeyError when there is no such file."""
        for part in self._parts:
            if name in part.slot.files:
                return part.file(name)
        there = ", ".join(sorted(self.files))
        raise KeyError(f"the snapshot of step {self.step} has no {name}; it has {there}")


class MemoryTensor:
    """`Stored`: a tensor in a snapshot, read by ranges of its elements."""

    def __init__(self, view: Tensor) -> None:
        self.dtype, self.shape = view.dtype, view.shape
        self._view = view

    @property
    def nbytes(self) -> int:
        """See Stored."""
        return self._view.nbytes

    def read(self, first: int, count: int) -> Tensor:
        """See Stored."""
        return self._view.reshape(-1)[first : first + count].clone()


def views_in(data: memoryview) -> dict[str, Tensor]:
    """The tensors of a safetensors file in memory, as windows on it."""
    length = int.from_bytes(data[:8], "little")
    places = decode_header(bytes(data[8 : 8 + length]), 8 + length)
    return {key: _tensor(data, *place) for key, place in places.items()}


def newest_snapshot(memory: Memory, on_broken: Callable[[str], None]) -> Snapshot | None:
    """The newest snapshot of which every byte verifies; others are discarded, with a line to `on_broken`."""
    for header in memory.headers():
        memory.pin(header.index)
        try:
            slot, constant = memory.read(header.index)
            return Snapshot(memory, slot, constant)
        except BrokenCheckpoint as error:
            on_broken(f"the snapshot of step {header.step} in memory is skipped: {error}")
            memory.discard(header.index)
        finally:
            memory.unpin(header.index)
    return None


def _map(memory: Memory, slot: Slot) -> _Mapped:
    start, size = slot.geometry.start(slot.header.index), slot.geometry.size(slot.header.index)
    return _Mapped(slot, mmap.mmap(memory.fd, size, offset=start, access=mmap.ACCESS_COPY))


def _tensor(data: memoryview, dtype: torch.dtype, shape: torch.Size, offset: int) -> Tensor:
    count = shape.numel()
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype, count=count, offset=offset).view(shape)
