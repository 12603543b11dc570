"""Many reads and writes of one scratch file in flight.

A transfer is cut into blocks, which are begun in the order in which transfers were asked for and end in any
order. Whether two transfers of one range may overlap is the caller's business: wait for the first.
`ThreadTransfers` needs the standard library alone: `os.preadv` and `os.pwritev` release the interpreter's
lock, so a thread is one block in flight. `io_uring.UringTransfers` has one thread for all of them.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from queue import SimpleQueue
from typing import Literal, NamedTuple, Protocol

import torch

from ..recipes.errors import UserError
from .direct_file import DirectFile

Verb = Literal["read", "write"]
THREAD_BLOCK = 4 << 20
RACE_BYTES = 64 << 20
"""Files below it are served by threads: to find the quicker engine would take longer than it saves."""


class Transfer:
    """One whole read or write on its way. It keeps its tensor alive until it is done."""

    def __init__(self, verb: Verb, tensor: torch.Tensor, parts: int) -> None:
        self.verb = verb
        self.error: BaseException | None = None
        self.raised = False
        self._tensor: torch.Tensor | None = tensor
        self._parts = parts
        self._lock = threading.Lock()
        self._finished = threading.Event()
        if parts == 0:
            self._finished.set()

    @property
    def done(self) -> bool:
        """All its blocks have ended, well or not."""
        return self._finished.is_set()

    def wait(self) -> None:
        """Return when the bytes are there. Raises OffloadError of any of its blocks, each time."""
        self._finished.wait()
        if self.error is not None:
            self.raised = True
            raise self.error.with_traceback(None)

    def end_part(self, error: BaseException | None) -> None:
        """A block has ended, for the engine to say."""
        with self._lock:
            self._parts -= 1
            self.error = self.error or error
            if self._parts == 0:
                self._tensor = None
                self._finished.set()


class Transfers(Protocol):
    """Reads and writes of one file in flight. Tensors are uint8, on the CPU, contiguous and aligned."""

    bytes_read: int
    bytes_written: int

    def read(self, offset: int, into: torch.Tensor) -> Transfer:
        """Begin to fill `into` from `offset` on."""
        ...

    def write(self, offset: int, data: torch.Tensor) -> Transfer:
        """Begin to store `data` at `offset`."""
        ...

    def close(self) -> None:
        """Wait for what is in flight; raise an error that no `wait` has raised."""
        ...


class Block(NamedTuple):
    """A part of a transfer: where in the file, and the memory."""

    transfer: Transfer
    offset: int
    data: memoryview
    address: int


class BlockTransfers(ABC):
    """What the engines share: checks, cutting, counting, errors. An engine begins blocks and stops."""

    def __init__(self, file: DirectFile, block: int) -> None:
        if block < 1 or block % file.alignment:
            raise ValueError(f"a block of {block} bytes is no multiple of {file.alignment}, the alignment")
        self.file = file
        self.bytes_read = 0
        self.bytes_written = 0
        self._block = block
        self._closed = False
        self._lock = threading.Lock()
        self._failed: list[Transfer] = []

    def read(self, offset: int, into: torch.Tensor) -> Transfer:
        """See `Transfers.read`. Raises ValueError for a transfer that is misaligned or outside the file."""
        return self._transfer("read", offset, into)

    def write(self, offset: int, data: torch.Tensor) -> Transfer:
        """See `Transfers.write`. Raises ValueError for a transfer that is misaligned or outside the file."""
        return self._transfer("write", offset, data)

    def _transfer(self, verb: Verb, offset: int, tensor: torch.Tensor) -> Transfer:
        if tensor.dtype != torch.uint8 or tensor.device.type != "cpu" or not tensor.is_contiguous():
            kind = f"{tensor.dtype} on {tensor.device}" + (", not contiguous" * (not tensor.is_contiguous()))
            raise ValueError(f"a transfer takes a contiguous uint8 tensor on the CPU, not {kind}")
        address = tensor.data_ptr()
        self.file.check(offset, tensor.nbytes, address)
        data = tensor.detach().numpy().data
        starts = range(0, data.nbytes, self._block)
        transfer = Transfer(verb, tensor, len(starts))
        blocks = [
            Block(transfer, offset + start, data[start : start + self._block], address + start)
            for start in starts
        ]
        with self._lock:
            if self._closed:
                raise ValueError(f"the transfers of {self.file.path} are closed")
            self._begin(blocks)
        return transfer

    def _end(self, block: Block, error: BaseException | None = None) -> None:
        """A block has ended: count it, and tell its transfer."""
        with self._lock:
            if error is not None:
                self._failed.append(block.transfer)
            elif block.transfer.verb == "read":
                self.bytes_read += len(block.data)
            else:
                self.bytes_written += len(block.data)
        block.transfer.end_part(error)

    def close(self) -> None:
        """See `Transfers.close`; again does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._stop()
        for transfer in self._failed:
            if not transfer.raised:
                transfer.wait()

    @abstractmethod
    def _begin(self, blocks: list[Block]) -> None:
        """Put the blocks behind those that wait; called with the lock held."""

    @abstractmethod
    def _stop(self) -> None:
        """Return when all blocks have ended; none is begun any more."""


class ThreadTransfers(BlockTransfers):
    """`threads` threads, each with one block of at most `block` bytes in flight."""

    def __init__(self, file: DirectFile, threads: int = 4, block: int = THREAD_BLOCK) -> None:
        super().__init__(file, block)
        self._waiting: SimpleQueue[Block | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"offload-io-{index}", daemon=True)
            for index in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def _begin(self, blocks: list[Block]) -> None:
        for block in blocks:
            self._waiting.put(block)

    def _work(self) -> None:
        while (block := self._waiting.get()) is not None:
            error = block.transfer.error
            if error is None:
                move = self.file.read if block.transfer.verb == "read" else self.file.write
                try:
                    move(block.offset, block.data)
                except BaseException as caught:  # it belongs to whoever waits for the transfer
                    error = caught
            self._end(block, error)
            del block  # else its memory is kept until the next one comes

    def _stop(self) -> None:
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join()


def open_transfers(
    file: DirectFile, *, io: Literal["threads", "io_uring"] | None = None, threads: int = 4
) -> tuple[Transfers, str]:
    """The transfers of `file` by the recipe's `offload.io`, and one line: what is used and why.

    None: the quicker of both, found by a race of about half a second that overwrites the file.
    Raises UserError where io_uring is asked for and the system forbids it.
    """
    from .io_uring import UringTransfers, refusal

    by_threads = f"disk transfers: {threads} threads"
    if io == "threads":
        return ThreadTransfers(file, threads), f"{by_threads} (offload.io=threads)"
    refused = refusal()
    if io == "io_uring":
        if refused is not None:
            raise UserError(
                f"offload.io      io_uring cannot be used: {refused}.\n"
                "                Allow it, or take threads: offload.io=threads"
            )
        return UringTransfers(file), "disk transfers: io_uring (offload.io=io_uring)"
    if refused is not None:
        return ThreadTransfers(file, threads), f"{by_threads}, since io_uring cannot be used: {refused}"
    if not file.direct:
        return ThreadTransfers(file, threads), f"{by_threads}, since transfers go through the page cache"
    if file.nbytes < RACE_BYTES:
        return ThreadTransfers(file, threads), f"{by_threads}, since the file is small"
    from .rates import race

    slow, fast = race(file, [lambda: ThreadTransfers(file, threads), lambda: UringTransfers(file)])
    rates = f"read and write together at {fast / 1e9:.2f} GB/s by io_uring, {slow / 1e9:.2f} GB/s by threads"
    if fast > slow:
        return UringTransfers(file), f"disk transfers: io_uring; {rates}"
    return ThreadTransfers(file, threads), f"{by_threads}; {rates}"
