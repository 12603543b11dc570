"""Keep freed memory in the process: on Linux with glibc, large tensors are otherwise mapped afresh each time.

Why: glibc gives every block above 32 MB at most, and at first above 128 KB, its own mapping and returns it
when it is freed; the next tensor's pages are then faulted in and zeroed one by one. A training step frees and
takes the same gigabytes again and again; docs/performance.md has what that costs. The price: the process
keeps its peak until it ends.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD = -1
_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Tell the C allocator to map nothing separately and to give nothing back; say whether it agreed.

    For the whole process, from now on; call it before the model is loaded. False where there is no `mallopt`
    (macOS, Windows, musl), or it refuses.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
        glibc = hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
    except (OSError, AttributeError):
        return False
    # another C library may know the name and mean something else by the numbers
    return glibc and mallopt(_MMAP_MAX, 0) == 1 and mallopt(_TRIM_THRESHOLD, -1) == 1
