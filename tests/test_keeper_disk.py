"""From memory to the disk: at its pace, on its schedule, and when the disk is full or fails."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from keeper_processes import QUICK, alive, keepers_of, no_keeper_left, state, step_in, take, until
from shoestring.checkpoint import KeeperSettings, Snapshotter, newest, persisting
from shoestring.checkpoint.errors import BrokenCheckpoint
from shoestring.checkpoint.keeper_process import LOG
from shoestring.checkpoint.memory import Memory
from shoestring.checkpoint.persisting import Persister, Stopped, write_slot
from shoestring.checkpoint.slot_writer import SlotWriter
from shoestring.checkpoint.slots import CONSTANT, Geometry, slot_bytes

__all__ = ["no_keeper_left"]  # a fixture, for every test here

MIB = 1 << 20
SIZES = {"data.bin": 12 * MIB, "trainer.json": 2}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    run.mkdir()
    return run


def write(memory: Memory, generation: int, sizes: dict[str, int] = SIZES) -> None:
    with memory.claim() as index:
        assert index is not None
        writer = SlotWriter(memory.view(), memory.geometry, index)
        for name, size in sizes.items():
            writer.begin_file(name, size)
            writer.write(b"{}" if name.endswith(".json") else bytes([generation]) * size)
        writer.publish(generation=generation, step=generation)


@pytest.fixture
def memory() -> Iterator[Memory]:
    memory = Memory.create(Geometry(2, slot_bytes(SIZES)))
    write(memory, 1)
    write(memory, 2)
    yield memory
    memory.close()


def put(memory: Memory, run: Path, **more: Any) -> Path:
    return write_slot(memory.fd, *memory.tables(memory.headers()[0].index), run, **more)


# The writing itself


def test_the_pace_is_kept(memory: Memory, run: Path) -> None:
    began = time.monotonic()
    put(memory, run, rate=20 * MIB)
    # The last chunk is due when the two before it have been paid for.
    assert 8 / 20 <= time.monotonic() - began < 3
    began = time.monotonic()
    shutil.rmtree(run / "checkpoint-000002")
    stop = threading.Event()
    threading.Timer(0.1, stop.set).start()
    with pytest.raises(Stopped):
        put(memory, run, rate=MIB, stop=stop)
    assert time.monotonic() - began < 3
    assert list(run.iterdir()) == []


CALLS: dict[str, int] = {
    "open": errno.ENOSPC,
    "write": errno.EIO,
    "fsync": errno.EIO,
    "mkdir": errno.EDQUOT,
    "rename": errno.EIO,
}


def test_a_disk_that_fails_at_any_call_costs_nothing_else(
    memory: Memory, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(memory, 3, {"data.bin": 100, "trainer.json": 2})
    first = put(memory, run)
    write(memory, 4, {"data.bin": 100, "trainer.json": 2})
    calls = 0
    at = 0
    synced: list[str] = []

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            if name == "open" and not args[1] & os.O_CREAT:
                return real(*args, **options)
            if name == "fsync":
                synced.append(os.readlink(f"/proc/self/fd/{args[0]}"))
            calls += 1
            if calls - 1 == at:
                raise OSError(CALLS[name], os.strerror(CALLS[name]))
            return real(*args, **options)

        return call

    for name in CALLS:
        monkeypatch.setattr(os, name, wrap(name, getattr(os, name)))
    lines: list[str] = []
    while True:
        calls = 0
        synced.clear()
        persister = Persister(run, lines.append, lambda: None)
        persister.start(memory, 0, look=True)
        until(lambda persister=persister: not persister.busy)
        assert len(set(synced)) == len(synced), "no fsync is tried again"
        if not persister.failure:
            break
        found = newest(run, print)
        assert found is not None
        # After the rename, it is only the name that may be lost with the power.
        assert found.step in (3, 4)
        assert not list(run.glob(".aside*"))
        assert lines[-1] == f"the snapshot in memory could not be written to the disk: {persister.failure}"
        if found.step == 4:
            shutil.rmtree(found.path)
        at += 1
    assert at >= 12
    assert persister.persisted == (4, 4)
    assert first.is_dir()


def test_what_is_on_the_disk_already_is_not_read_again_on_schedule(
    memory: Memory, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[Path] = []
    monkeypatch.setattr(persisting, "verify_files", looked.append)
    persister = Persister(run, print, lambda: None)
    for look, looks in ((False, 0), (False, 0), (True, 1)):
        persister.start(memory, 0, look=look)
        until(lambda: not persister.busy)
        assert len(looked) == looks
    assert persister.persisted == (2, 2)


def test_no_room_is_told_before_anything_is_written(
    memory: Memory, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10, 10, 12 * MIB + 100))
    with pytest.raises(OSError, match=r"No space left on device: 12\.58 MB needed, 12\.58 MB free") as caught:
        put(memory, run)
    assert caught.value.errno == errno.ENOSPC
    assert list(run.iterdir()) == []


def test_damaged_memory_never_reaches_the_disk(memory: Memory, run: Path) -> None:
    index = memory.headers()[0].index
    memory.view()[memory.geometry.start(index) + 65536 + 9 * MIB] ^= 1
    with pytest.raises(BrokenCheckpoint, match="chunk 2 of its data"):
        put(memory, run)
    assert list(run.iterdir()) == []
    lines: list[str] = []
    persister = Persister(run, lines.append, lambda: None)
    persister.start(memory, 0, look=True)
    until(lambda: not persister.busy)
    assert lines == [
        "the snapshot of step 2 in memory is skipped: chunk 2 of its data does not match its checksum",
        "checkpoint-000001 written from memory",
    ]
    assert (run / "checkpoint-000001" / "data.bin").read_bytes() == b"\1" * 12 * MIB


def test_a_constant_file_that_is_another_never_reaches_the_disk(run: Path) -> None:
    memory = Memory.create(Geometry(2, slot_bytes(SIZES), slot_bytes({"base": 5})))
    writer = SlotWriter(memory.view(), memory.geometry, CONSTANT)
    writer.begin_file("base", 5, "00")
    writer.write(b"12345")
    identity = writer.publish(generation=1, step=0).table_digest.hex()
    with memory.claim() as index:
        assert index is not None
        SlotWriter(memory.view(), memory.geometry, index).publish(generation=1, step=1, constant=identity)
    with pytest.raises(BrokenCheckpoint, match="base is not the constant part that was stored"):
        put(memory, run)
    memory.close()


# The keeper


def test_it_writes_on_its_schedule_while_training_goes_on(run: Path) -> None:
    settings = KeeperSettings(persist_every=0.3, persist_rate=20e6, heartbeat=0.05)
    floats = 4_000_000  # 24 MB: a write takes a second
    with Snapshotter(run, slots=3, settings=settings) as snapshots:
        steps = 0
        while snapshots.persisted_step < 3:
            steps += 1
            take(snapshots, steps, floats)
            assert snapshots.skipped == 0, "the third slot is free while one is written"
            assert steps < 3000
        found = newest(run, print)
        assert found is not None
        assert found.step >= 3
        # Slots were written over while this one was read for the disk.
        assert steps > found.step + 3
        assert found.json("trainer") == {"step": found.step}
        for part, tensors in state(found.step, floats).items():
            theirs = found.tensors(part)
            assert all(torch.equal(theirs[name], tensor) for name, tensor in tensors.items())
        # In the middle of a write: it ends at once all the same.
        until(lambda: list(run.glob(".aside-*/new/*")))
        began = time.monotonic()
    until(lambda: not keepers_of(run))
    assert time.monotonic() - began < 2
    assert not list(run.glob(".aside-*"))


def test_a_failed_write_is_told_once_and_tried_again_with_new_files(run: Path) -> None:
    lines: list[str] = []
    settings = KeeperSettings(persist_every=0.2, heartbeat=0.05)
    with Snapshotter(run, settings=settings, warn=lines.append) as snapshots:
        pid = snapshots.keeper_pid
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (100_000, hard))
        take(snapshots, 1)
        until(lambda: lines)
        until(lambda: (run / LOG).read_text().count("could not be written") >= 2)
        assert lines == [f"the newest snapshot could not be written to the disk: {run}: File too large"]
        assert newest(run, print) is None
        assert snapshots.persisted_step == -1
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))
        until(lambda: snapshots.persisted_step == 1)
        take(snapshots, 2)
        until(lambda: snapshots.persisted_step == 2)
        assert len(lines) == 1
        assert snapshots.keeper_pid == pid


def test_after_the_trainer_s_death_it_tries_until_the_lease_ends(run: Path) -> None:
    with Snapshotter(run, settings=QUICK) as snapshots:
        pid = snapshots.keeper_pid
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (100_000, hard))
        take(snapshots, 1)
        snapshots.leave()
    until(lambda: "could not be written" in (run / LOG).read_text())
    assert newest(run, print) is None
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))
    until(lambda: newest(run, print) is not None)
    lines: list[str] = []
    with Snapshotter(run, settings=KeeperSettings(lease=0.5), warn=lines.append) as snapshots:
        until(lambda: snapshots.persisted_step == 1)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (100_000, hard))
        until(lambda: snapshots.begin(2, tensors=state(2), json={"trainer": {"step": 2}}))
        snapshots.flush()
        found = snapshots.newest()
        assert found is not None
        assert step_in(found) == 2
        snapshots.leave()
    until(lambda: not alive(pid))
    assert "ends, and the memory with it; what was in it is not on the disk" in (run / LOG).read_text()
    assert newest(run, lines.append) is not None
