"""Buffers through which layers pass: one computes while the next is read and the last is written back."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import OffloadError
from .layer_layout import Place
from .layer_store import LayerStore

THREADS = 2
"""That read and write: one layer each way at a time."""


@dataclass
class Use:
    """A layer in memory; set `changed` for its bytes to be written back after the use."""

    memory: Tensor
    changed: bool = False


class _Slot:
    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.layer: int | None = None
        self.sequence = 0  # how many layers have been here
        self.users = 0
        self.last_use = 0
        self.reading: Future[None] | None = None
        self.writing: Future[None] | None = None
        self.used: torch.cuda.Event | None = None  # the last use, where an accelerator computes


class LayerBuffers:
    """Layers of `store` in buffers (uint8 tensors, each as large as the largest layer, two or more).

    The least recently used buffer is given up: in a forward pass the lowest layer, in a backward pass the
    highest, which are those needed last. Changed layers are written at once, so any buffer without a write in
    flight can be given up at no cost. One thread uses it; two of its own read and write.
    """

    def __init__(self, places: Sequence[Place], memory: Sequence[Tensor], store: LayerStore) -> None:
        largest = max(place.nbytes for place in places)
        if len(memory) < 2 or any(len(buffer) < largest for buffer in memory):
            raise ValueError(f"streaming needs two buffers of {largest} bytes or more")
        self._places, self._store = places, store
        self._slots = [_Slot(buffer) for buffer in memory]
        self._written = [0] * len(places)
        self._writes: dict[int, Future[None]] = {}
        self._clock = 0
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="shoestring-layers")
        self.seconds_waited = 0.0
        """For layers that were not there yet when they were needed."""

    def put(self, layer: int, values: Iterable[Tensor]) -> None:
        """Store the first contents of a layer: its weights, one after the other."""
        slot = self._victim(())
        self._wait([future for future in (slot.reading, slot.writing) if future is not None])
        slot.reading = None
        slot.layer, slot.sequence = layer, slot.sequence + 1
        place = self._places[layer]
        for view, value in zip(place.views(slot.memory[: place.nbytes]), values, strict=True):
            view.copy_(value)
        self._end_use(slot, changed=True)

    @contextmanager
    def using(self, layer: int, following: Sequence[int] = (), *, changes: bool = False) -> Iterator[Use]:
        """Inside, the bytes of a layer in memory; `following` layers are read meanwhile, as many as fit.

        changes: whether the bytes may be changed. OffloadError: the disk failed, now or in a write before.
        """
        self._raise()
        slot = self._holder(layer) or self._fetch(layer, self._victim(following))
        sequence = slot.sequence
        slot.users += 1
        use = Use(slot.memory[: self._places[layer].nbytes])
        try:
            self._settle(slot)
            if changes and slot.writing is not None:
                self._wait([slot.writing])
            self._read_ahead(following)
            yield use
            if (slot.layer, slot.sequence) != (layer, sequence):
                raise RuntimeError(f"layer {layer} was overwritten by layer {slot.layer} while it was in use")
        finally:
            slot.users -= 1
            self._end_use(slot, changed=use.changed)

    def flush(self) -> None:
        """Return when all that was changed is in the store. OffloadError: it is not, the disk failed."""
        self._wait(list(self._writes.values()))
        self._raise()

    def forget(self) -> None:
        """The store was changed from outside: what the buffers hold is old."""
        self.flush()
        for slot in self._slots:
            if slot.reading is not None:
                wait_for([slot.reading])
            slot.layer = slot.reading = None

    def close(self) -> None:
        """Return when nothing is read or written any more; what waits to be is dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _holder(self, layer: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.layer == layer), None)

    def _victim(self, keep: Sequence[int]) -> _Slot:
        """The buffer to give up: not in use, and if possible not of the layers that will be needed soon."""
        idle = [slot for slot in self._slots if slot.users == 0]
        if not idle:
            raise RuntimeError(f"all {len(self._slots)} buffers are in use at the same time")
        return min(idle, key=lambda slot: (slot.layer in keep, slot.layer is not None, slot.last_use))

    def _read_ahead(self, following: Sequence[int]) -> None:
        soon = following[: len(self._slots) - 1]
        for layer in soon:
            if self._holder(layer) is not None:
                continue
            if all(slot.users or slot.layer in soon for slot in self._slots):
                return
            self._fetch(layer, self._victim(soon))

    def _fetch(self, layer: int, slot: _Slot) -> _Slot:
        """Begin to read a layer, once the buffer's last contents and the layer itself have been written."""
        place, wanted = self._places[layer], [layer, self._written[layer]]
        memory, used, reading = slot.memory[: place.nbytes], slot.used, slot.reading
        writes = [future for future in (slot.writing, self._writes.get(layer)) if future is not None]

        def read() -> None:
            if reading is not None:
                wait_for([reading])
            for write in writes:
                write.result()
            if used is not None:
                used.synchronize()
            self._store.read(place.offset, memory)
            for found in place.stamps(memory):
                if found != wanted:
                    raise OffloadError(
                        f"offload.weights  layer {layer} was read back as (layer, write) {tuple(found)}, "
                        f"expected {tuple(wanted)}: the disk returned other bytes than were written.\n"
                        "                 Look at the disk, then start the run again: it goes on from its "
                        "last checkpoint"
                    )

        slot.layer, slot.sequence = layer, slot.sequence + 1
        self._touch(slot)
        slot.reading = self._pool.submit(read)
        return slot

    def _settle(self, slot: _Slot) -> None:
        """Wait for the layer that is being read into the buffer."""
        if slot.reading is None:
            return
        try:
            self._wait([slot.reading])
            slot.reading.result()
        except BaseException:
            slot.layer = None
            raise
        finally:
            slot.reading = None

    def _end_use(self, slot: _Slot, *, changed: bool) -> None:
        self._touch(slot)
        if slot.memory.is_cuda:
            slot.used = torch.cuda.current_stream().record_event()
        if not changed or slot.layer is None:
            return
        layer, place, used = slot.layer, self._places[slot.layer], slot.used
        memory = slot.memory[: place.nbytes]
        self._written[layer] += 1
        place.stamp(memory, layer, self._written[layer])
        if memory.is_cuda:
            used = torch.cuda.current_stream().record_event()

        def write() -> None:
            if used is not None:
                used.synchronize()
            self._store.write(place.offset, memory)

        slot.writing = self._writes[layer] = self._pool.submit(write)

    def _touch(self, slot: _Slot) -> None:
        self._clock += 1
        slot.last_use = self._clock

    def _wait(self, futures: list[Future[None]]) -> None:
        began = time.monotonic()
        wait_for(futures)
        self.seconds_waited += time.monotonic() - began

    def _raise(self) -> None:
        """A layer that could not be written exists nowhere any more: nothing after it could be right."""
        for layer, write in list(self._writes.items()):
            if write.done():
                write.result()
                del self._writes[layer]
