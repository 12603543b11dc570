"""Small tables that operations look up again and again, on a device, without a wait for it.

A table is made on the CPU and sent from pinned memory, in the order of the current stream. It is kept by all
that is in it, so that nothing remembered is ever out of date, and by that stream: another one would have to
wait for it, and memory given back is used again in that stream's order alone.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_ENTRIES = 2048


class Kept(Generic[T]):
    """What was made before, by its key; the longest unused goes where all have more than `most` elements.

    Or where there are more than 2,048: keys and objects take memory too, a kilobyte or so each.
    """

    def __init__(self, most: int, elements: Callable[[T], int]) -> None:
        self._most, self._elements, self._held = most, elements, 0
        self._made: OrderedDict[Hashable, T] = OrderedDict()
        self._lock = threading.Lock()  # backward has a thread for each device

    def find(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make()` gave for this key; the newest stays however large it is."""
        with self._lock:
            if key in self._made:
                self._made.move_to_end(key)
                return self._made[key]
            with torch.inference_mode(False):  # or no backward after an evaluation could save it
                made = self._made[key] = make()
            self._held += self._elements(made)
            while (self._held > self._most and len(self._made) > 1) or len(self._made) > _ENTRIES:
                self._held -= self._elements(self._made.popitem(last=False)[1])
            return made

    def __len__(self) -> int:
        return len(self._made)


def sent(table: Tensor, device: torch.device) -> Tensor:
    """`table`, of the CPU, on its way to `device`: nothing waits for it here."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def stream_of(device: torch.device) -> int:
    """The stream that work for `device` goes to now; one number where it has none."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
