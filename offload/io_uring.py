"""Transfers by io_uring(7) through ctypes: one thread hands many blocks to the kernel and takes answers back.

Why: a thread of `ThreadTransfers` is one block in flight and a system call each; here one call hands over and
collects any number. It is often forbidden in containers (EPERM), so `refusal` tries it first.

The owner thread alone touches the rings. It sleeps in io_uring_enter(2), which releases the interpreter's
lock as all foreign calls do; an eventfd, read by way of the ring itself, wakes it for new blocks. The kernel
reads the submission queue within that call, in the same thread, so its tail needs no barrier; the completion
queue's tail is read before its entries, with a lock taken between, which orders the two on Arm as well.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
import threading
from collections import deque
from collections.abc import Iterator

from .direct_file import DirectFile
from .errors import disk_error
from .transfers import Block, BlockTransfers

# The same numbers on all architectures that have them (since Linux 5.1).
_SETUP, _ENTER = 425, 426
_READ, _WRITE = 22, 23  # IORING_OP_*, since Linux 5.6
_OFF_SQES = 0x10000000
_ENTER_GETEVENTS = 1
_FEAT_SINGLE_MMAP = 1
_SQE = struct.Struct("=BBHiQQIIQ24x")  # opcode, flags, ioprio, fd, off, addr, len, rw_flags, user_data
_CQE = struct.Struct("=QiI")  # user_data, res, flags
_PARAMS_BYTES = 120
_WAKE = 0  # user_data of the read of the eventfd; blocks count from 1

URING_BLOCK = 4 << 20
DEPTH = 8


class Ring:
    """The two rings of one io_uring instance of `entries`. Raises OSError where the system refuses it."""

    def __init__(self, entries: int) -> None:
        self._syscall = ctypes.CDLL(None, use_errno=True).syscall
        self._syscall.restype = ctypes.c_long
        params = (ctypes.c_char * _PARAMS_BYTES)()
        self.fd = self._call(_SETUP, ctypes.c_uint(entries), params)
        try:
            sq_entries, cq_entries, _, _, _, features = struct.unpack_from("=6I", params, 0)
            if not features & _FEAT_SINGLE_MMAP:
                raise OSError(errno.ENOSYS, "the kernel is older than Linux 5.6")
            _, sq_tail, sq_mask, _, _, _, sq_array = struct.unpack_from("=7I", params, 40)
            cq_head, cq_tail, cq_mask, _, _, cqes = struct.unpack_from("=6I", params, 80)
            nbytes = max(sq_array + 4 * sq_entries, cqes + _CQE.size * cq_entries)
            self._rings = mmap.mmap(self.fd, nbytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
            self._sqes = mmap.mmap(
                self.fd,
                _SQE.size * sq_entries,
                flags=mmap.MAP_SHARED | mmap.MAP_POPULATE,
                offset=_OFF_SQES,
            )
        except BaseException:
            os.close(self.fd)
            raise

        def number(offset: int) -> ctypes.c_uint32:
            return ctypes.c_uint32.from_buffer(self._rings, offset)  # one load or store each

        self._sq_tail, self._cq_head, self._cq_tail = number(sq_tail), number(cq_head), number(cq_tail)
        self._sq_mask, self._cq_mask = number(sq_mask).value, number(cq_mask).value
        self._cqes = cqes
        self._barrier = threading.Lock()
        self._new = 0
        # Entry i of the queue is always sqes[i].
        (ctypes.c_uint32 * sq_entries).from_buffer(self._rings, sq_array)[:] = range(sq_entries)

    def push(self, opcode: int, fd: int, offset: int, address: int, nbytes: int, tag: int) -> None:
        """Queue one read or write; `enter` hands it over. At most `entries` may be queued."""
        tail = self._sq_tail.value
        _SQE.pack_into(
            self._sqes,
            (tail & self._sq_mask) * _SQE.size,
            opcode,
            0,
            0,
            fd,
            offset,
            address,
            nbytes,
            0,
            tag,
        )
        self._sq_tail.value = (tail + 1) & 0xFFFFFFFF
        self._new += 1

    def enter(self) -> None:
        """Hand over what is queued and sleep until something has completed. Raises OSError."""
        try:
            taken = self._call(
                _ENTER,
                ctypes.c_int(self.fd),
                ctypes.c_uint(self._new),
                ctypes.c_uint(1),
                ctypes.c_uint(_ENTER_GETEVENTS),
                ctypes.c_void_p(None),
                ctypes.c_size_t(0),
            )
        except OSError as error:
            if error.errno not in (errno.EINTR, errno.EAGAIN, errno.EBUSY):
                raise
            return
        self._new -= taken

    def completions(self) -> Iterator[tuple[int, int]]:
        """(tag, result) of what has completed, in the order of completion; a negative result is -errno."""
        head, tail = self._cq_head.value, self._cq_tail.value
        with self._barrier:
            pass
        while head != tail:
            tag, result, _ = _CQE.unpack_from(self._rings, self._cqes + (head & self._cq_mask) * _CQE.size)
            head = (head + 1) & 0xFFFFFFFF
            self._cq_head.value = head
            yield tag, result

    def close(self) -> None:
        """Give the rings back."""
        del self._sq_tail, self._cq_head, self._cq_tail  # a map with views of it cannot be closed
        self._sqes.close()
        self._rings.close()
        os.close(self.fd)

    def _call(self, number: int, *arguments: object) -> int:
        answer = int(self._syscall(ctypes.c_long(number), *arguments))
        if answer < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return answer


def refusal() -> str | None:
    """None where io_uring works, else why the system refuses it."""
    try:
        Ring(4).close()
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, "")
        return {
            "EPERM": "EPERM, forbidden by the container (seccomp) or by sysctl kernel.io_uring_disabled",
            "ENOSYS": "ENOSYS, the kernel does not have it",
            "ENOMEM": "ENOMEM, too little memory may be locked (`ulimit -l`)",
        }.get(name, f"{error.strerror} ({name})")
    return None


class UringTransfers(BlockTransfers):
    """Up to `depth` blocks of at most `block` bytes in flight, by one thread. OSError: see `refusal`."""

    def __init__(self, file: DirectFile, depth: int = DEPTH, block: int = URING_BLOCK) -> None:
        super().__init__(file, block)
        self._depth = depth
        self._ring = Ring(depth + 1)
        self._event = os.eventfd(0)
        self._count = ctypes.c_uint64()  # where the eventfd is read to
        self._waiting: deque[Block] = deque()
        self._flying: dict[int, tuple[Block, int]] = {}  # by tag, with the bytes of it that are done
        self._tag = _WAKE
        self._asleep = False  # a read of the eventfd is in flight
        self._broken: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="offload-io-uring", daemon=True)
        self._thread.start()

    def _begin(self, blocks: list[Block]) -> None:
        if self._broken is not None:
            raise self._broken.with_traceback(None)
        if blocks:
            self._waiting.extend(blocks)
            os.eventfd_write(self._event, 1)

    def _stop(self) -> None:
        os.eventfd_write(self._event, 1)
        self._thread.join()
        self._ring.close()
        os.close(self._event)

    def _work(self) -> None:
        try:
            while not self._closed or self._waiting or self._flying:
                self._hand_over()
                self._ring.enter()
                for tag, result in self._ring.completions():
                    if tag == _WAKE:
                        self._asleep = False
                    else:
                        self._answer(tag, result)
        except BaseException as error:  # it belongs to whoever waits for a transfer
            self._give_up(error)

    def _hand_over(self) -> None:
        if not self._asleep:
            self._asleep = True
            self._ring.push(_READ, self._event, 0, ctypes.addressof(self._count), 8, _WAKE)
        while self._waiting and len(self._flying) < self._depth:
            block = self._waiting.popleft()
            if block.transfer.error is not None:
                self._end(block, block.transfer.error)
            else:
                self._fly(block, 0)

    def _fly(self, block: Block, done: int) -> None:
        self._tag += 1
        self._flying[self._tag] = (block, done)
        opcode = _READ if block.transfer.verb == "read" else _WRITE
        self._ring.push(
            opcode,
            self.file.fd,
            block.offset + done,
            block.address + done,
            len(block.data) - done,
            self._tag,
        )

    def _answer(self, tag: int, result: int) -> None:
        block, done = self._flying.pop(tag)
        verb, nbytes = block.transfer.verb, len(block.data)
        if -result in (errno.EINTR, errno.EAGAIN):
            self._fly(block, done)
            return
        try:
            if result < 0:
                raise disk_error(verb, self.file.path, block.offset + done, nbytes - done, -result)
            done = self.file.advance(verb, block.offset, nbytes, done, result)
            if done == nbytes:
                self.file.forget(block.offset, nbytes)
        except BaseException as error:
            self._end(block, error)
            return
        if done < nbytes:
            self._fly(block, done)
        else:
            self._end(block)

    def _give_up(self, error: BaseException) -> None:
        """The ring itself failed. What flies stays referenced: the kernel may still write to its memory."""
        with self._lock:
            self._broken = error
        for block in [*self._waiting, *(block for block, _ in self._flying.values())]:
            self._end(block, error)
