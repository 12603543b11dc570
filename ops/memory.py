"""Keep freed memory in the process: on Linux with glibc, large tensors are otherwise mapped afresh each time.

Why: glibc gives every block above 32 MB at most, and at first above 128 KB, its own mapping and returns it
when it is freed; the next tensor's pages are then faulted in and zeroed one by one. A training step frees and
takes the same gigabytes again and again; docs/performance.md has what that costs. The price: rows of ever
other lengths leave holes that nothing fits, and the process grows step by step, by half in a hundred steps of
real data. So the holes are given back once it has grown by an eighth: `FreedMemory`. Where memory is short
the largest blocks are better mapped after all: `map_large_blocks`.
"""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass, field

import psutil

_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_MMAP_MAX = -4
_MMAP_MAX_DEFAULT = 65_536

LARGE_BLOCK_BYTES = 32 << 20
"""From here on a block is large: no higher threshold is allowed by glibc."""


def bound_kernel_cache() -> None:
    """Let oneDNN keep 128 compiled kernels, not 1,024; before the first matmul. A user's own setting stays.

    Rows of ever other lengths make ever other shapes, each with a kernel of up to a megabyte: half a gigabyte
    after thirty steps. A step of SmolLM2 has some hundred shapes, the same in all its layers.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")


def keep_freed_memory() -> bool:
    """Tell the C allocator to map nothing separately and to give nothing back; say whether it agreed.

    For the whole process, from now on; call it before the model is loaded. False where there is no `mallopt`
    (macOS, Windows, musl), or it refuses.
    """
    return _tell_allocator((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))


def map_large_blocks() -> bool:
    """Tell the C allocator to map blocks of LARGE_BLOCK_BYTES and more, and to return them when freed.

    Smaller ones are kept as before, and what is allocated stays where it is. Logits and gradients of
    embeddings are so large that they seldom fit each other's holes: a heap that keeps them grows to twice
    what is alive. The price is that they are faulted in and zeroed each time: about 0.35 s a micro-batch of
    1,024 tokens where a head of 49,152 x 576 is trained in bfloat16. Returns as `keep_freed_memory`.
    """
    return _tell_allocator((_MMAP_THRESHOLD, LARGE_BLOCK_BYTES), (_MMAP_MAX, _MMAP_MAX_DEFAULT))


def _tell_allocator(*options: tuple[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
        glibc = hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
    except (OSError, AttributeError):
        return False
    # another C library may know the name and mean something else by the numbers
    return glibc and all(mallopt(name, value) == 1 for name, value in options)


def give_back_freed_memory() -> bool:
    """Return every free page of the C heap; the next step faults them in again. False: it cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return False
    return bool(trim(0))


@dataclass
class FreedMemory:
    """Bounds what the heap's holes cost: call `after_step` when a step's activations are free.

    What two steps leave resident after pages were given back is what steps need. Once `growth` times that is
    resident, they are given back again.
    """

    growth: float = 1.12
    steps: int = 0
    needed: int = 0
    process: psutil.Process = field(default_factory=psutil.Process)

    def after_step(self) -> None:
        """Look at the process, and give back when it has grown too far."""
        resident = self.process.memory_info().rss
        self.steps += 1
        if self.steps <= 2:
            self.needed = max(self.needed, resident)
        elif resident > self.growth * self.needed and give_back_freed_memory():
            self.steps = self.needed = 0
