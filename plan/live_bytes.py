"""Counts the bytes of tensors alive while a piece of code runs: what a CPU allocator does not tell.

On CUDA the allocator's own counters are exact. On a CPU there are none, so every operation is watched: the
storages that it creates are counted from birth to death. Unlike hooks on saved tensors this also sees what
activation checkpointing keeps, temporaries, and tensors held by hand-written backward functions. Not seen:
scratch buffers inside a library's kernels.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes:
    """`with LiveBytes(device) as live:` then `live.now` and `live.peak`: bytes above those at the start."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._mode = _StorageWatch()
        self._start = 0

    @property
    def now(self) -> int:
        """Bytes alive at this moment that were not at the start."""
        if self._cuda:
            return int(torch.cuda.memory_allocated(self._device)) - self._start
        return self._mode.now

    @property
    def peak(self) -> int:
        """The largest value of `now` so far."""
        if self._cuda:
            return int(torch.cuda.max_memory_allocated(self._device)) - self._start
        return self._mode.peak

    def __enter__(self) -> LiveBytes:
        if self._cuda:
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._start = int(torch.cuda.memory_allocated(self._device))
        else:
            self._mode.__enter__()  # type: ignore[no-untyped-call]  # torch ships no types for it
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._cuda:
            self._mode.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]


class _StorageWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        # The references must stay alive, a weak reference that dies never calls back.
        self._watched: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((*args, *(kwargs or {}).values()))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors((result,)):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:  # views and in-place results are no new memory
                self._watch(storage)
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._watched:
            return
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)

        def died(_: object) -> None:
            self.now -= size
            del self._watched[key]

        self._watched[key] = weakref.ref(storage, died)


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Those among `values` and in lists and tuples of them: an operation's schema nests no deeper.

    By hand, since torch's general walk over nested values took a fifth of a small measurement.
    """
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (item for item in value if isinstance(item, torch.Tensor))
