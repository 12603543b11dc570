"""One block of host memory, of exactly the bytes asked for, from which buffers are cut in order.

Why not torch's allocators: the one for pinned memory rounds each block to the next power of two, up to twice
what is asked; the one for plain memory aligns to 64 bytes, where direct reads of a disk want 4,096. Here one
mapping is taken once, starts at 2 MiB so that huge pages fit, and is pinned by one registration.
"""

from __future__ import annotations

import contextlib
import mmap
import resource
import weakref
from typing import Any

import torch

from . import numa

PAGE = 4096
_HUGE_PAGE = 2 << 20


class Arena:
    """nbytes (rounded up to 4,096) of zeroed host memory, cut into buffers by `take`.

    pinned: registered with CUDA as a whole. lines: what was not possible, and what to do. Forked processes do
    not have it.
    numa_policy: "default", "local" or "interleave", see `numa.bind`.
    """

    def __init__(self, nbytes: int, *, pin: bool = False, numa_policy: numa.Policy = "default") -> None:
        if nbytes < 1:
            raise ValueError(f"an arena needs at least one byte, not {nbytes}")
        self.nbytes = -(-nbytes // PAGE) * PAGE
        self.lines: list[str] = []
        self.pinned = False
        self.used = 0
        self._unpin: weakref.finalize[[int], Arena] | None = None
        # Address space beyond the arena is never touched, so it takes no memory.
        space = mmap.mmap(-1, self.nbytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        whole = torch.frombuffer(memoryview(space), dtype=torch.uint8)
        skip = -whole.data_ptr() % _HUGE_PAGE
        self._bytes: torch.Tensor | None = whole[skip : skip + self.nbytes]
        self.address = self._bytes.data_ptr()
        _advise(space, skip, self.nbytes)
        self.lines += numa.bind(self.address, self.nbytes, numa_policy, numa.nodes())
        self._bytes.zero_()
        if pin:
            self._pin()

    def take(self, nbytes: int) -> torch.Tensor:
        """The next nbytes as uint8, aligned to 4,096. ValueError when the arena has less left."""
        if self._bytes is None:
            raise ValueError("the arena is closed")
        if nbytes < 0 or self.used + nbytes > self.nbytes:
            raise ValueError(
                f"{nbytes} bytes do not fit: {self.nbytes - self.used} of {self.nbytes} are left"
            )
        taken = self._bytes[self.used : self.used + nbytes]
        self.used = min(-(-(self.used + nbytes) // PAGE) * PAGE, self.nbytes)
        return taken

    def close(self) -> None:
        """Unpin and let go. The memory itself goes when the last tensor taken from it goes."""
        if self._bytes is None:
            return
        if self._unpin is not None:
            self._unpin()  # first: what is registered must still be mapped
        self.pinned = False
        self._bytes = None

    def _pin(self) -> None:
        if not torch.cuda.is_available():
            self.lines.append("buffers are not pinned: there is no CUDA device")
            return
        code = int(_runtime().cudaHostRegister(self.address, self.nbytes, 0))
        self.pinned = code == 0
        if self.pinned:
            # Also for an arena that is dropped unclosed; at exit CUDA is gone, and so are its registrations.
            self._unpin = weakref.finalize(self, _unregister, self.address)
            self._unpin.atexit = False
            return
        self.lines.append(pin_refusal(self.nbytes, code))
        _clear_last_error()

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch states no type


def _clear_last_error() -> None:
    """Let CUDA forget a refused call, which torch would report at the next kernel; that check clears it."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")


def _unregister(address: int) -> None:
    code = int(_runtime().cudaHostUnregister(address))
    if code:
        raise RuntimeError(f"cudaHostUnregister answered {code}")


def pin_refusal(nbytes: int, code: int) -> str:
    """The line for a cudaHostRegister of nbytes that answered `code`: the limit on locked memory, or not."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    plain = "buffers are not pinned, so copies to the device are slower"
    if limit == resource.RLIM_INFINITY or limit >= nbytes:
        return f"{plain}: cudaHostRegister of {nbytes:,} bytes answered {code}"
    return (
        f"{plain}: {nbytes:,} bytes are more than may be locked ({limit:,}). Raise the limit: "
        f"`ulimit -l {-(-nbytes // 1024)}`, or memlock in limits.conf, or docker run --ulimit memlock=-1"
    )


def _advise(space: mmap.mmap, start: int, nbytes: int) -> None:
    """Huge pages for whole 2 MiB; none for the rest, which would round it up by what a page has more.

    Forked processes (data loaders) do not inherit it: each page written here afterwards would be copied, and
    a direct read into a page that is shared with a child may end in the child's copy (open(2), notes).
    """
    space.madvise(mmap.MADV_DONTFORK)
    whole = nbytes // _HUGE_PAGE * _HUGE_PAGE
    with contextlib.suppress(OSError):  # a kernel without huge pages
        if whole:
            space.madvise(mmap.MADV_HUGEPAGE, start, whole)
        if whole < nbytes:
            space.madvise(mmap.MADV_NOHUGEPAGE, start + whole, nbytes - whole)
