"""What autograd saves inside a layer goes to host memory, and comes back when the backward pass asks for it.

Through `torch.autograd.graph.saved_tensors_hooks`: custom functions, checkpointed parts and packed attention
save through them too. A storage is copied once a call of the layer, however many views of it are saved. What
stays: parameters, buffers, what all layers share (masks, rotary tables), small tensors, tensor subclasses,
tensors of another device, and whatever the pool has no room for.

A model that trains without swapping trains the same, bit for bit: only copies of bytes are added. What
autograd checks when it keeps tensors itself, that none was changed in place, is checked here for those that
stay.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .pool import HostPool

# Below this a copy's overhead is more than what it frees: norms' one number a token, indices.
SMALLEST = 64 << 10


class Link(Protocol):
    """The way between device and host. Copies happen in the order in which they are asked for."""

    ahead: bool
    """Whether a copy runs beside the work, so that asking early pays."""

    def send(self, source: Tensor, buffer: Tensor) -> None:
        """Begin to copy `source` (uint8, device) into `buffer`, and keep the source until it is done."""

    def settle(self) -> None:
        """A layer's forward pass is over: let go of the sources of the layer before it."""

    def fetch(self, buffer: Tensor, device: torch.device) -> tuple[Tensor, object]:
        """(new tensor on the device, ticket): begin to fill it. The buffer may be given back at once."""

    def wait(self, ticket: object) -> None:
        """What the caller does from here on comes after the copy of `ticket`."""


class PlainLink:
    """Copies that are done when the call returns: between host and host, where nothing is gained by them."""

    ahead = False

    def send(self, source: Tensor, buffer: Tensor) -> None:
        """Copy."""
        buffer.copy_(source)

    def settle(self) -> None:
        """Nothing is under way."""

    def fetch(self, buffer: Tensor, device: torch.device) -> tuple[Tensor, object]:
        """Copy into new memory."""
        return torch.empty_like(buffer, device=device).copy_(buffer), None

    def wait(self, ticket: object) -> None:
        """Nothing is under way."""


class StreamLink:
    """Copies on one side stream of a CUDA device, beside the work of the current stream.

    One stream for both directions: a buffer may be given back as soon as its copy to the device was asked
    for, since whatever is written into it next comes later in the same stream. Sources are kept until the
    work stream waits for their copies, one layer late, and not by `record_stream`: so a slow link holds the
    work up, and the allocator does not take ever more memory. Not run on a GPU so far.
    """

    ahead = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no types here
        self._sources: list[Tensor] = []
        self._before: tuple[list[Tensor], torch.cuda.Event] | None = None

    def send(self, source: Tensor, buffer: Tensor) -> None:
        """On the side stream, after the work that made `source`."""
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            buffer.copy_(source, non_blocking=True)
        self._sources.append(source)

    def settle(self) -> None:
        """The work stream waits for the copies of the layer before the last."""
        self._let_go()
        self._before = (self._sources, self._side.record_event())
        self._sources = []

    def fetch(self, buffer: Tensor, device: torch.device) -> tuple[Tensor, object]:
        """On the side stream, after the work so far, which may have used the target's memory."""
        self._let_go()
        target = torch.empty_like(buffer, device=device)
        self._side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._side):
            target.copy_(buffer, non_blocking=True)
        return target, self._side.record_event()

    def wait(self, ticket: object) -> None:
        """The work stream waits, this thread does not."""
        assert isinstance(ticket, torch.cuda.Event)
        torch.cuda.current_stream(self.device).wait_event(ticket)

    def _let_go(self) -> None:
        if self._before is not None:
            torch.cuda.current_stream(self.device).wait_event(self._before[1])
            self._before = None


def link_for(device: torch.device) -> Link:
    """Streams on CUDA, plain copies elsewhere."""
    return StreamLink(device) if device.type == "cuda" else PlainLink()


class Swap:
    """Moves what layers on `device` save. One for a model; calls of its layers follow each other by index."""

    def __init__(self, pool: HostPool, link: Link, device: torch.device, *, smallest: int = SMALLEST) -> None:
        self.pool = pool
        self.link = link
        self.device = device
        self.smallest = smallest
        self._last: tuple[int, weakref.ref[_Call]] | None = None

    @contextmanager
    def layer(self, index: int, stays: Iterable[Tensor]) -> Iterator[None]:
        """Inside, what autograd saves is swapped, but for tensors of the storages of `stays`."""
        before = None
        if (
            self._last is not None and self._last[0] < index
        ):  # else this is the first layer of a new forward pass
            before = self._last[1]
        call = _Call(before)
        packing = _Packing(self, call, stays)
        try:
            with torch.autograd.graph.saved_tensors_hooks(packing.pack, _unpack):
                yield
        finally:
            packing.close()
            self._last = (index, weakref.ref(call))
            self.link.settle()


class _Call:
    """One forward pass of one layer. Lives as long as something that it stored: nothing else holds it."""

    def __init__(self, before: weakref.ref[_Call] | None) -> None:
        self.stored: list[weakref.ref[_Stored]] = []
        self._before = before
        self._asked = False

    def ask_ahead(self) -> None:
        """At the first use of any of it begin with all, and with the layer that backward needs next."""
        if self._asked:
            return
        self._asked = True
        before = self._before() if self._before is not None else None
        for call in (self, before):
            for reference in call.stored if call is not None else ():
                stored = reference()
                if stored is not None:
                    stored.fetch()


class _Stored:
    """The bytes of one storage: in a buffer of the pool, and from the first use on the device again."""

    def __init__(self, swap: Swap, call: _Call, buffer: Tensor) -> None:
        self._swap, self._call = swap, call
        self._buffer: Tensor | None = buffer
        self._bytes: Tensor | None = None
        self._ticket: object = None
        call.stored.append(weakref.ref(self))

    def fetch(self) -> None:
        """Begin to bring it back; harmless when repeated."""
        if self._buffer is not None:
            self._bytes, self._ticket = self._swap.link.fetch(self._buffer, self._swap.device)
            buffer, self._buffer = self._buffer, None
            self._swap.pool.give(buffer)

    def storage(self) -> torch.UntypedStorage:
        """On the device, whole; the same one for all views, and again where a graph is retained."""
        if self._swap.link.ahead:
            self._call.ask_ahead()
        self.fetch()
        self._wait()
        assert self._bytes is not None
        return self._bytes.untyped_storage()

    def _wait(self) -> None:
        if self._ticket is not None:
            ticket, self._ticket = self._ticket, None
            self._swap.link.wait(ticket)

    def __del__(self) -> None:
        # The graph is gone: after the backward pass, or without one (an error, a loss that was dropped).
        if self._buffer is not None:
            self._swap.pool.give(self._buffer)
        self._wait()  # memory on the device must not be another's while a copy into it is under way


class _Packing:
    """The pack hook of one call. It holds what was sent to the end, or an address could come again."""

    def __init__(self, swap: Swap, call: _Call, stays: Iterable[Tensor]) -> None:
        self._swap, self._call = swap, call
        self._stays = {t.untyped_storage().data_ptr() for t in stays if not is_traceable_wrapper_subclass(t)}
        self._sent: dict[tuple[int, int], tuple[Tensor, _Stored]] = {}

    def close(self) -> None:
        self._sent.clear()

    def pack(self, tensor: Tensor) -> _Kept | _View:
        if not self._goes(tensor):
            return _Kept(tensor)
        storage = tensor.untyped_storage()
        key = (storage.data_ptr(), tensor._version)
        if key not in self._sent:
            buffer = self._swap.pool.take(storage.nbytes())
            if buffer is None:
                return _Kept(tensor)
            source = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            self._swap.link.send(source, buffer)
            self._sent[key] = source, _Stored(self._swap, self._call, buffer)
        return _View(self._sent[key][1], tensor)

    def _goes(self, tensor: Tensor) -> bool:
        if tensor.device != self._swap.device or tensor.layout is not torch.strided:
            return False
        if is_traceable_wrapper_subclass(tensor) or tensor.is_complex() or tensor.is_neg():
            return False  # more than bytes, shape and strides
        storage = tensor.untyped_storage()
        return storage.nbytes() >= self._swap.smallest and storage.data_ptr() not in self._stays


class _Kept:
    """A tensor that stays where it is, with the version that it had when it was saved."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._version = tensor._version

    def tensor(self) -> Tensor:
        if self._tensor._version != self._version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self._tensor.shape)} that the backward pass needs was changed in "
                f"place after it was saved (version {self._tensor._version}, saved at {self._version})"
            )
        return self._tensor


class _View:
    """A tensor by its place in a stored storage."""

    def __init__(self, stored: _Stored, tensor: Tensor) -> None:
        self._stored = stored
        self._dtype, self._offset = tensor.dtype, tensor.storage_offset()
        self._size, self._stride = tensor.size(), tensor.stride()

    def tensor(self) -> Tensor:
        storage = self._stored.storage()
        empty = torch.empty(0, dtype=self._dtype, device=storage.device)
        return empty.set_(storage, self._offset, self._size, self._stride)


def _unpack(packed: Any) -> Tensor:
    tensor: Tensor = packed.tensor()
    return tensor
