"""Which engine is taken and why, what the system may refuse, and the measured rates."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from shoestring.offload import io_uring, rates, transfers
from shoestring.offload.arena import Arena
from shoestring.offload.direct_file import DirectFile
from shoestring.offload.errors import OffloadError
from shoestring.offload.io_uring import Ring, UringTransfers, refusal
from shoestring.offload.rates import measure_disk, race
from shoestring.offload.transfers import ThreadTransfers, open_transfers
from shoestring.recipes.errors import UserError

PAGE = 4096
MIB = 1 << 20

needs_io_uring = pytest.mark.skipif(refusal() is not None, reason=f"io_uring: {refusal()}")


def refuse_io_uring(patch: pytest.MonkeyPatch, code: int) -> None:
    """A container's seccomp rule, an old kernel, a low memlock: io_uring_setup answers `code`."""

    def call(self: Ring, number: int, *_: Any) -> int:
        raise OSError(code, os.strerror(code))

    patch.setattr(Ring, "_call", call)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (errno.EPERM, "forbidden by the container"),
        (errno.ENOSYS, "kernel does not have it"),
        (errno.ENOMEM, "ulimit -l"),
        (errno.EMFILE, "Too many open files"),
    ],
)
def test_where_io_uring_is_refused_threads_are_taken_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, text: str
) -> None:
    refuse_io_uring(monkeypatch, code)
    assert text in str(refusal())
    with DirectFile(tmp_path / "state", PAGE) as file:
        engine, line = open_transfers(file, io=None, threads=3)
        engine.close()
        assert isinstance(engine, ThreadTransfers)
        assert line.startswith("disk transfers: 3 threads, since io_uring cannot be used: ")
        assert text in line
        with pytest.raises(UserError, match=r"(?s)offload\.io +io_uring cannot be used.*offload\.io=threads"):
            open_transfers(file, io="io_uring")


def test_nothing_is_left_open_by_a_look_at_io_uring() -> None:
    before = os.listdir("/proc/self/fd")
    for _ in range(20):
        refusal()
    assert len(os.listdir("/proc/self/fd")) == len(before)


@needs_io_uring
def test_what_is_asked_for_is_taken(tmp_path: Path) -> None:
    with DirectFile(tmp_path / "state", PAGE) as file:
        for io, kind in (("threads", ThreadTransfers), ("io_uring", UringTransfers)):
            engine, line = open_transfers(file, io=io)  # type: ignore[arg-type]
            engine.close()
            assert isinstance(engine, kind)
            assert f"offload.io={io}" in line


@needs_io_uring
def test_auto_does_not_race_for_a_small_or_a_buffered_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "race", lambda *_: pytest.fail("a race"))
    with DirectFile(tmp_path / "state", PAGE) as file:
        file.direct = True
        engine, line = open_transfers(file)
        engine.close()
        assert isinstance(engine, ThreadTransfers)
        assert "the file is small" in line
        file.direct = False
        engine, line = open_transfers(file)
        engine.close()
        assert isinstance(engine, ThreadTransfers)
        assert "page cache" in line


@needs_io_uring
@pytest.mark.parametrize(("measured", "kind"), [([1e9, 2e9], UringTransfers), ([2e9, 1e9], ThreadTransfers)])
def test_auto_takes_the_quicker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[float], kind: type
) -> None:
    monkeypatch.setattr(rates, "race", lambda *_: measured)
    monkeypatch.setattr(transfers, "RACE_BYTES", PAGE)
    with DirectFile(tmp_path / "state", PAGE) as file:
        file.direct = True
        engine, line = open_transfers(file)
        engine.close()
    assert type(engine) is kind
    assert f"{measured[1] / 1e9:.2f} GB/s by io_uring, {measured[0] / 1e9:.2f} GB/s by threads" in line


@needs_io_uring
def test_a_real_race_takes_turns_and_little_time(tmp_path: Path) -> None:
    order: list[str] = []

    def made(name: str, make: Callable[[DirectFile], Any]) -> Callable[[], Any]:
        def call() -> Any:
            order.append(name)
            return make(file)

        return call

    with DirectFile(tmp_path / "state", 64 * MIB) as file:
        started = time.perf_counter()
        found = race(file, [made("threads", ThreadTransfers), made("io_uring", UringTransfers)])
        seconds = time.perf_counter() - started
    assert order == ["threads", "io_uring"] * 2
    assert len(found) == 2
    assert min(found) > 1e6
    assert seconds < 10  # 0.6 on an idle disk; others use it


def test_an_engine_that_is_slowed_down_loses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk that takes no time, so that nobody else's load decides."""

    class Slow(ThreadTransfers):
        def _end(self, block: transfers.Block, error: BaseException | None = None) -> None:
            time.sleep(0.02)
            super()._end(block, error)

    monkeypatch.setattr(DirectFile, "read", lambda *_: None)
    monkeypatch.setattr(DirectFile, "write", lambda *_: None)
    with DirectFile(tmp_path / "state", 32 * MIB) as file:
        slow, quick = race(file, [lambda: Slow(file), lambda: ThreadTransfers(file)])
    assert quick > slow > 0


@needs_io_uring
def test_a_ring_that_breaks_is_an_error_for_all_and_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Ring) -> None:
        raise OSError(errno.EBADF, "the ring is gone")

    with DirectFile(tmp_path / "state", 4 * MIB) as file, Arena(4 * MIB) as arena:
        data = arena.take(4 * MIB)
        monkeypatch.setattr(io_uring.Ring, "enter", broken)
        engine = UringTransfers(file)
        for _ in range(2):  # before or after the thread has noticed
            with pytest.raises(OSError, match="the ring is gone"):
                engine.read(0, data).wait()
        engine._thread.join()
        with pytest.raises(OSError, match="the ring is gone"):
            engine.read(0, data)
        engine.close()


# Rates


def test_rates_are_measured_in_bounded_time_and_leave_nothing(tmp_path: Path) -> None:
    started = time.perf_counter()
    found = measure_disk(tmp_path / "not" / "yet", nbytes=32 * MIB, seconds=0.4)
    seconds = time.perf_counter() - started
    assert min(found.read, found.write, found.mixed) > 1e6
    assert seconds < 10
    assert list(tmp_path.iterdir()) == []


def test_rates_are_bytes_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes 10 ms for each 4 MiB and has one thread: 0.42 GB/s, reading, writing or both.

    On a clock that only the disk moves, so that no other process is measured; with two threads it is used by
    both at once.
    """
    now, at_once, most = [0.0], [0], [0]
    turn = threading.Lock()

    def slow(self: DirectFile, offset: int, data: memoryview) -> None:
        with turn:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
            now[0] += 0.01
        time.sleep(0.001)
        with turn:
            at_once[0] -= 1

    monkeypatch.setattr(DirectFile, "read", slow)
    monkeypatch.setattr(DirectFile, "write", slow)
    monkeypatch.setattr(rates, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    found = measure_disk(tmp_path, nbytes=32 * MIB, seconds=1.2, threads=1)
    for rate in (found.read, found.write, found.mixed):
        assert rate == pytest.approx(4 * MIB / 0.01)
    assert most == [1]
    measure_disk(tmp_path, nbytes=32 * MIB, seconds=1.2, threads=2)
    assert most == [2]


def test_both_are_measured_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the bytes of the third figure are read and half written, on different parts of the file."""
    moved: list[tuple[str, int]] = []
    real_read, real_write = DirectFile.read, DirectFile.write

    def read(self: DirectFile, offset: int, into: memoryview) -> None:
        moved.append(("read", offset))
        real_read(self, offset, into)

    def write(self: DirectFile, offset: int, data: memoryview) -> None:
        moved.append(("write", offset))
        real_write(self, offset, data)

    monkeypatch.setattr(DirectFile, "read", read)
    monkeypatch.setattr(DirectFile, "write", write)
    with DirectFile(tmp_path / "state", 32 * MIB) as file:
        engine = ThreadTransfers(file, 1)
        rate = rates.mixed_rate(engine, 32 * MIB, 0.2)
        engine.close()
    assert rate > 1e6
    counts = {verb: sum(verb == one for one, _ in moved) for verb in ("read", "write")}
    assert abs(counts["read"] - counts["write"]) <= 1
    assert all(offset >= 16 * MIB for verb, offset in moved if verb == "read")
    assert all(offset < 16 * MIB for verb, offset in moved if verb == "write")
    with pytest.raises(ValueError, match="too few"):
        rates.mixed_rate(engine, MIB, 0.1)


def test_a_disk_that_fails_while_it_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def fail(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OffloadError, match="EIO"):
        measure_disk(tmp_path, nbytes=32 * MIB, seconds=0.4)
    assert list(tmp_path.iterdir()) == []
