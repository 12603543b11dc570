"""Transfers, both engines under the same bodies: right bytes or an error, whatever the disk does."""

from __future__ import annotations

import errno
import os
import resource
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from shoestring.offload.arena import Arena
from shoestring.offload.direct_file import DirectFile
from shoestring.offload.errors import OffloadError
from shoestring.offload.io_uring import Ring, UringTransfers, refusal
from shoestring.offload.transfers import BlockTransfers, ThreadTransfers, Transfer

PAGE = 4096
BLOCK = 16 * PAGE
SIZE = 16 * BLOCK

needs_io_uring = pytest.mark.skipif(refusal() is not None, reason=f"io_uring: {refusal()}")
ENGINES = [
    pytest.param("threads", id="threads"),
    pytest.param("io_uring", id="io_uring", marks=needs_io_uring),
]


def engine(name: str, file: DirectFile) -> BlockTransfers:
    return ThreadTransfers(file, 4, BLOCK) if name == "threads" else UringTransfers(file, 4, BLOCK)


class Disk:
    """Stands between an engine and the kernel; each rule may change one request or its answer.

    at_most: bytes that a request moves. answer: (verb, offset) -> errno to answer instead. held: offsets
    whose requests are answered only after `release`.
    """

    def __init__(self) -> None:
        self.at_most = 1 << 30
        self.answer: Callable[[str, int], int] = lambda verb, offset: 0
        self.held: set[int] = set()
        self.released = threading.Event()
        self.requests: list[tuple[str, int, int]] = []
        self.wake: Callable[[], None] = lambda: None

    def release(self) -> None:
        self.released.set()
        self.wake()

    def under_threads(self, patch: pytest.MonkeyPatch) -> None:
        def wrap(verb: str, real: Callable[..., int]) -> Callable[..., int]:
            def call(fd: int, buffers: list[memoryview], offset: int) -> int:
                self.requests.append((verb, offset, len(buffers[0])))
                if offset in self.held:
                    self.released.wait()
                if code := self.answer(verb, offset):
                    raise OSError(code, os.strerror(code))
                return real(fd, [buffers[0][: self.at_most]], offset)

            return call

        patch.setattr(os, "preadv", wrap("read", os.preadv))
        patch.setattr(os, "pwritev", wrap("write", os.pwritev))

    def under_io_uring(self, patch: pytest.MonkeyPatch) -> None:
        real_push, real_completions = Ring.push, Ring.completions
        flying: dict[int, tuple[str, int]] = {}
        kept: list[tuple[int, int]] = []

        def push(ring: Ring, opcode: int, fd: int, offset: int, address: int, nbytes: int, tag: int) -> None:
            if tag:
                verb = {22: "read", 23: "write"}[opcode]
                self.requests.append((verb, offset, nbytes))
                flying[tag] = (verb, offset)
                nbytes = min(nbytes, self.at_most)
            real_push(ring, opcode, fd, offset, address, nbytes, tag)

        def completions(ring: Ring) -> Iterator[tuple[int, int]]:
            for tag, result in real_completions(ring):
                verb, offset = flying.pop(tag, ("wake", -1))
                code = self.answer(verb, offset) if tag else 0
                if offset in self.held and not self.released.is_set():
                    kept.append((tag, result))
                else:
                    yield tag, -code if code else result
            if self.released.is_set():
                yield from kept
                kept.clear()

        patch.setattr(Ring, "push", push)
        patch.setattr(Ring, "completions", completions)


@pytest.fixture(params=ENGINES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def disk(name: str, monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    disk.under_threads(monkeypatch) if name == "threads" else disk.under_io_uring(monkeypatch)
    return disk


@pytest.fixture
def file(tmp_path: Path) -> Iterator[DirectFile]:
    with DirectFile(tmp_path / "state", SIZE) as file:
        yield file


@pytest.fixture
def buffers() -> Iterator[Callable[[int], torch.Tensor]]:
    with Arena(4 * SIZE) as arena:
        yield arena.take


def noise(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    return tensor.copy_(torch.randint(256, tensor.shape, generator=torch.Generator().manual_seed(seed)))


Buffers = Callable[[int], torch.Tensor]


def test_what_is_written_lies_on_the_disk_and_is_read_back(
    name: str, file: DirectFile, buffers: Buffers
) -> None:
    data, back = noise(buffers(SIZE), 1), buffers(SIZE)
    transfers = engine(name, file)
    transfers.write(0, data).wait()
    with open(file.path, "rb", buffering=0) as other:
        assert other.read() == data.numpy().tobytes()
    transfers.read(0, back).wait()
    assert torch.equal(back, data)
    assert (transfers.bytes_read, transfers.bytes_written) == (SIZE, SIZE)
    transfers.close()


def test_many_in_flight_of_all_lengths_and_offsets(name: str, file: DirectFile, buffers: Buffers) -> None:
    """Offsets and lengths of one page to three blocks and a bit, all begun before the first is awaited."""
    lengths = [PAGE, BLOCK - PAGE, BLOCK, BLOCK + PAGE, 3 * BLOCK + 5 * PAGE, 0] * 2
    offsets = [sum(lengths[:index]) for index in range(len(lengths))]
    data = [noise(buffers(length), seed) for seed, length in enumerate(lengths)]
    back = [buffers(length) for length in lengths]
    transfers = engine(name, file)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0)).tolist()
    for each in [transfers.write(offsets[i], data[i]) for i in order]:
        each.wait()
        each.wait()
        assert each.done
    for each in [transfers.read(offsets[i], back[i]) for i in reversed(order)]:
        each.wait()
    assert all(torch.equal(one, two) for one, two in zip(back, data, strict=True))
    assert transfers.bytes_read == transfers.bytes_written == sum(lengths)
    transfers.close()


@pytest.mark.parametrize("at_most", [PAGE, 5 * PAGE])
def test_short_answers_go_on(name: str, disk: Disk, file: DirectFile, buffers: Buffers, at_most: int) -> None:
    data, back = noise(buffers(SIZE), 2), buffers(SIZE)
    transfers = engine(name, file)
    disk.at_most = at_most
    disk.requests.clear()
    transfers.write(0, data).wait()
    transfers.read(0, back).wait()
    transfers.close()
    assert torch.equal(back, data)
    pages = BLOCK // PAGE
    assert len(disk.requests) == 2 * (SIZE // BLOCK) * -(-pages // (at_most // PAGE))
    assert (transfers.bytes_read, transfers.bytes_written) == (SIZE, SIZE)


def test_an_unaligned_short_answer_goes_on_at_the_last_aligned_byte(
    name: str, disk: Disk, tmp_path: Path, buffers: Buffers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system's, say: the next request is aligned again, and all bytes arrive."""
    _without_direct(monkeypatch)
    with DirectFile(tmp_path / "state", SIZE) as file:
        data, back = noise(buffers(SIZE), 3), buffers(SIZE)
        transfers = engine(name, file)
        disk.at_most = 2 * PAGE + 100
        transfers.write(0, data).wait()
        transfers.read(0, back).wait()
        transfers.close()
    assert torch.equal(back, data)
    assert all(offset % PAGE == 0 and nbytes % PAGE == 0 for _, offset, nbytes in disk.requests)


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.EIO, "dmesg"),
        (errno.ENOSPC, "Free space"),
        (errno.EDQUOT, "Free space"),
        (errno.ENODEV, "last checkpoint"),
        (errno.EINVAL, "local disk"),
    ],
)
@pytest.mark.parametrize("verb", ["read", "write"])
def test_an_error_of_one_block_is_the_transfers(
    name: str, disk: Disk, file: DirectFile, buffers: Buffers, code: int, advice: str, verb: str
) -> None:
    transfers = engine(name, file)
    tensor = noise(buffers(SIZE), 4)
    bad = 5 * BLOCK
    disk.answer = lambda given, offset: code if (given, offset) == (verb, bad) else 0
    transfer: Transfer = getattr(transfers, verb)(0, tensor)
    for _ in range(2):
        with pytest.raises(OffloadError) as caught:
            transfer.wait()
        first, second = str(caught.value).splitlines()
        assert first.startswith(f"offload.disk_path  cannot {verb} {BLOCK:,} bytes at {bad:,} of {file.path}")
        assert os.strerror(code) in first
        assert errno.errorcode[code] in first
        assert advice in second
    assert transfer.done
    # the others are not disturbed, and what was raised is not raised again
    other = buffers(BLOCK)
    transfers.read(0, other).wait()
    transfers.close()
    transfers.close()


def test_close_waits_and_raises_what_nobody_waited_for(
    name: str, disk: Disk, file: DirectFile, buffers: Buffers
) -> None:
    transfers = engine(name, file)
    data = noise(buffers(SIZE), 5)
    disk.answer = lambda verb, offset: errno.EIO if offset == SIZE - BLOCK else 0
    transfer = transfers.write(0, data)
    with pytest.raises(OffloadError, match="EIO"):
        transfers.close()
    assert transfer.done
    transfers.close()
    with pytest.raises(ValueError, match="closed"):
        transfers.read(0, data)


def test_close_finishes_what_was_begun(name: str, file: DirectFile, buffers: Buffers) -> None:
    data = noise(buffers(SIZE), 6)
    transfers = engine(name, file)
    transfer = transfers.write(0, data)
    transfers.close()
    assert transfer.done
    assert file.path.read_bytes() == data.numpy().tobytes()


@pytest.mark.parametrize("code", [errno.EINTR, errno.EAGAIN])
@needs_io_uring
def test_io_uring_asks_again_when_it_was_interrupted(
    file: DirectFile, buffers: Buffers, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    disk = Disk()
    disk.under_io_uring(monkeypatch)
    once: set[tuple[str, int]] = set()

    def answer(verb: str, offset: int) -> int:
        first = (verb, offset) not in once
        once.add((verb, offset))
        return code if first else 0

    disk.answer = answer
    data, back = noise(buffers(SIZE), 7), buffers(SIZE)
    transfers = engine("io_uring", file)
    transfers.write(0, data).wait()
    transfers.read(0, back).wait()
    transfers.close()
    assert torch.equal(back, data)
    assert len(disk.requests) == 4 * (SIZE // BLOCK)


def test_signals_interrupt_nothing(name: str, file: DirectFile, buffers: Buffers) -> None:
    hits = 0

    def count(*_: Any) -> None:
        nonlocal hits
        hits += 1

    before = signal.signal(signal.SIGALRM, count)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        transfers = engine(name, file)
        data, back = buffers(SIZE), buffers(SIZE)
        for seed in range(20):
            transfers.write(0, noise(data, seed)).wait()
            transfers.read(0, back).wait()
            assert torch.equal(back, data)
        transfers.close()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert hits > 5


def test_a_late_block_delays_its_own_transfer_only(
    name: str, disk: Disk, file: DirectFile, buffers: Buffers
) -> None:
    """Completions in another order than requests: neither is done early, both have their own bytes."""
    data = noise(buffers(SIZE), 8)
    one, two = buffers(4 * BLOCK), buffers(4 * BLOCK)
    transfers = engine(name, file)
    if isinstance(transfers, UringTransfers):
        event = transfers._event
        disk.wake = lambda: os.eventfd_write(event, 1)
    transfers.write(0, data).wait()
    disk.held = {2 * BLOCK}
    first, second = transfers.read(0, one), transfers.read(8 * BLOCK, two)
    second.wait()
    assert torch.equal(two, data[8 * BLOCK : 12 * BLOCK])
    assert not first.done
    disk.release()
    first.wait()
    assert torch.equal(one, data[: 4 * BLOCK])
    assert transfers.bytes_read == 8 * BLOCK
    transfers.close()


def test_a_file_that_is_cut_under_us(name: str, file: DirectFile, buffers: Buffers) -> None:
    transfers = engine(name, file)
    data = noise(buffers(SIZE), 9)
    transfers.write(0, data).wait()
    os.truncate(file.path, 3 * BLOCK + 100)
    with pytest.raises(OffloadError) as caught:
        transfers.read(3 * BLOCK, data[:BLOCK]).wait()
    assert f"{file.path} ends at {3 * BLOCK + 100:,}, {BLOCK - 100:,} bytes too early" in str(caught.value)
    with pytest.raises(OffloadError, match=f"ends at {10 * BLOCK:,}"):
        transfers.read(10 * BLOCK, data[:BLOCK]).wait()
    transfers.read(0, data[:BLOCK]).wait()
    transfers.close()


def test_a_real_refusal_of_the_kernel(name: str, file: DirectFile, buffers: Buffers) -> None:
    """The limit on file size, lowered under the file: EFBIG from the write itself, and what to do."""
    transfers = engine(name, file)
    data = noise(buffers(SIZE), 10)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, hard))
    try:
        with pytest.raises(OffloadError, match=r"(?s)cannot write .* File too large .*ulimit -f unlimited"):
            transfers.write(0, data).wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    transfers.write(0, data).wait()
    transfers.close()


def test_misuse_is_refused(name: str, file: DirectFile, buffers: Buffers) -> None:
    transfers = engine(name, file)
    data = buffers(4 * PAGE)
    align = file.alignment
    for offset, tensor, text in (
        (1, data, f"offset 1 of a transfer to {file.path} is no multiple of {align}"),
        (0, data[: PAGE + 1], f"length {PAGE + 1} of a transfer"),
        (0, data[1 : PAGE + 1], "address"),
        (SIZE, data, f"bytes {SIZE} to {SIZE + 4 * PAGE} are outside"),
        (-PAGE, data, "outside"),
        (0, data.view(torch.int32), "contiguous uint8 tensor on the CPU, not torch.int32 on cpu"),
        (0, data.view(2, -1).t(), "not contiguous"),
        (0, torch.empty(PAGE, dtype=torch.uint8, device="meta"), "on meta"),
    ):
        with pytest.raises(ValueError, match=text):
            transfers.read(offset, tensor)
    transfers.close()
    with pytest.raises(ValueError, match="block of 100 bytes"):
        ThreadTransfers(file, 1, 100)


def test_nothing_grows(name: str, file: DirectFile, buffers: Buffers) -> None:
    """200 reads and writes leave no memory, descriptor or thread behind."""
    process = psutil.Process()
    data, back = noise(buffers(SIZE), 11), buffers(SIZE)
    before = process.num_fds(), threading.active_count()
    transfers = engine(name, file)

    def lap(count: int) -> None:
        for _ in range(count):
            write = transfers.write(0, data)
            read = transfers.read(0, back)
            write.wait()
            read.wait()

    lap(20)
    resident = process.memory_info().rss
    lap(200)
    assert process.memory_info().rss - resident < 1 << 20
    transfers.close()
    assert (process.num_fds(), threading.active_count()) == before


def test_a_transfer_keeps_its_memory_until_it_is_done(
    name: str, disk: Disk, file: DirectFile, buffers: Buffers
) -> None:
    """A tensor that nobody else holds is not freed under the kernel's hands, and is freed afterwards."""
    transfers = engine(name, file)
    if isinstance(transfers, UringTransfers):
        event = transfers._event
        disk.wake = lambda: os.eventfd_write(event, 1)
    disk.held = {0}
    data = buffers(BLOCK).clone()
    start = -data.data_ptr() % PAGE
    tensor = data[start : start + BLOCK // 2]
    gone = weakref.ref(tensor)
    transfer = transfers.read(0, tensor)
    del data, tensor
    assert gone() is not None
    disk.release()
    transfer.wait()
    transfers.close()
    assert gone() is None


def _without_direct(patch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *rest, **named)

    patch.setattr(os, "open", refuse)
