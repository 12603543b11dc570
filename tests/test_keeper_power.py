"""Loss of power and failing disks while the keeper writes a slot: the old or the new checkpoint, never less.

The simulation of power cuts is that of test_checkpoint_power.py, here around `write_slot`.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from shoestring.checkpoint import newest
from shoestring.checkpoint.memory import Memory
from shoestring.checkpoint.persisting import write_slot
from shoestring.checkpoint.slot_writer import SlotWriter
from shoestring.checkpoint.slots import Geometry, slot_bytes
from shoestring.recipes.errors import UserError
from test_checkpoint_power import Recorder, build, install

SIZES = {"data.bin": 300, "trainer.json": 12}


@pytest.fixture
def memory() -> Iterator[Memory]:
    memory = Memory.create(Geometry(2, slot_bytes(SIZES)))
    yield memory
    memory.close()


def hold(memory: Memory, generation: int, step: int) -> None:
    """A snapshot of `step` in the next free slot."""
    with memory.claim() as index:
        assert index is not None
        writer = SlotWriter(memory.view(), memory.geometry, index)
        writer.begin_file("data.bin", 300)
        writer.write(bytes([step]) * 300)
        writer.begin_file("trainer.json", 12)
        writer.write(f'{{"step": {step:2}}}'.encode())
        writer.publish(generation=generation, step=step)


def put(memory: Memory, run: Path) -> Path:
    return write_slot(memory.fd, *memory.tables(memory.headers()[0].index), run)


def step_on(run: Path) -> int:
    """The one step that all of the newest checkpoint is of; -1 without one."""
    found = newest(run, lambda line: None)
    if found is None:
        return -1
    assert found.json("trainer") == {"step": found.step}
    assert (found.path / "data.bin").read_bytes() == bytes([found.step]) * 300
    return found.step


def power_cuts(
    work: Path, memory: Memory, monkeypatch: pytest.MonkeyPatch, forgets: str = ""
) -> tuple[int, set[int], list[str]]:
    """How many different disks there were, the steps resumed from, and what was wrong with any of them."""
    run = work / "run"
    run.mkdir()
    recorder = Recorder(run, forgets)
    acknowledged = -1
    found: dict[tuple[Any, ...], int] = {}  # disk -> the last step that `write_slot` had returned by then

    def look() -> None:
        for disk in recorder.disks():
            found[disk] = max(found.get(disk, -1), acknowledged)

    for generation, step in enumerate((1, 2, 2, 3), 1):
        hold(memory, generation, step)
        with monkeypatch.context() as patch:
            install(recorder, patch, look)
            put(memory, run)
        acknowledged = step
    resumed, problems = set(), []
    for number, (disk, least) in enumerate(found.items()):
        folder = work / str(number)
        build(disk, folder)
        try:
            resumed.add(step := step_on(folder))
            assert step >= least
        except (AssertionError, UserError) as error:
            problems.append(f"{error}")
        shutil.rmtree(folder)
    return len(found), resumed, problems


def test_every_disk_that_a_power_cut_can_leave_resumes(
    tmp_path: Path, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, resumed, problems = power_cuts(tmp_path, memory, monkeypatch)
    assert problems == []
    assert count > 50
    assert resumed == {-1, 1, 2, 3}


@pytest.mark.parametrize("forgets", ["file", "dir"])
def test_the_simulation_finds_a_missing_fsync(
    tmp_path: Path, memory: Memory, monkeypatch: pytest.MonkeyPatch, forgets: str
) -> None:
    assert power_cuts(tmp_path, memory, monkeypatch, forgets)[2]


FAULTS = [("open", errno.ENOSPC), ("open", errno.EDQUOT), ("write", errno.ENOSPC), ("write", errno.EIO),
          ("fsync", errno.EIO), ("mkdir", errno.ENOSPC), ("rename", errno.EIO)]  # fmt: skip


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize(("name", "code"), FAULTS)
def test_a_fault_at_each_call(
    tmp_path: Path, memory: Memory, monkeypatch: pytest.MonkeyPatch, name: str, code: int, persistent: bool
) -> None:
    hold(memory, 1, 1)
    put(memory, tmp_path)
    hold(memory, 2, 2)
    real = getattr(os, name)
    at = 0
    while True:
        calls = 0
        synced: list[str] = []

        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            if name == "open" and not args[1] & os.O_CREAT:
                return real(*args, **options)
            if name == "fsync":
                synced.append(os.readlink(f"/proc/self/fd/{args[0]}"))  # noqa: B023 - of this round
            calls += 1
            if calls - 1 == at or (persistent and calls > at):  # noqa: B023
                raise OSError(code, os.strerror(code))
            return real(*args, **options)

        failed = _fails(monkeypatch, name, call, lambda: put(memory, tmp_path))
        assert len(set(synced)) == len(synced), "no fsync is tried again"
        found = step_on(tmp_path)
        assert failed == (calls > at)
        if not failed:
            break
        # Only the fsync of the name comes after the rename.
        assert found == 1 or (found == 2 and name == "fsync")
        assert not list(tmp_path.glob(".aside-*"))
        assert (tmp_path / "checkpoint-000001").is_dir()
        shutil.rmtree(tmp_path / "checkpoint-000002", ignore_errors=True)
        at += 1
    assert at >= 1
    assert found == 2


def _fails(
    patching: pytest.MonkeyPatch, name: str, call: Callable[..., Any], action: Callable[[], Any]
) -> bool:
    with patching.context() as patch:
        patch.setattr(os, name, call)
        try:
            action()
        except OSError:
            return True
    return False


@pytest.mark.parametrize("most", [1, 7, 100])
def test_short_writes_are_completed(
    tmp_path: Path, memory: Memory, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    hold(memory, 1, 1)
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, memoryview(data)[:most]))
    put(memory, tmp_path)
    assert step_on(tmp_path) == 1
