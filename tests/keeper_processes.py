"""Trainers for the tests of the keeper: real processes, from a server that has imported torch once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import CONTEXT
from shoestring.checkpoint import KeeperSettings, Snapshot, Snapshotter

QUICK = KeeperSettings(lease=60, heartbeat=0.1, patience=5)


def state(step: int, floats: int = 200_000) -> dict[str, dict[str, torch.Tensor]]:
    """A training state that says in every element which step it is of."""
    return {
        "model": {"w": torch.full((floats,), float(step)), "b": torch.full((7,), step, dtype=torch.int64)},
        "optimizer": {"m": torch.full((floats // 2,), float(step % 256)).bfloat16()},
    }


def step_in(snapshot: Snapshot) -> int:
    """The one step that all of a snapshot is of."""
    step = snapshot.step
    expected = state(step, floats=snapshot.views("model")["w"].numel())
    for part, tensors in expected.items():
        views = snapshot.views(part)
        assert views.keys() == tensors.keys()
        assert all(torch.equal(views[name], tensor) for name, tensor in tensors.items())
    assert snapshot.json("trainer") == {"step": step}
    return step


def take(snapshots: Snapshotter, step: int, floats: int = 200_000) -> None:
    """One snapshot, published when this returns; waits for the keeper to have read the only free slot."""
    until(lambda: snapshots.begin(step, tensors=state(step, floats), json={"trainer": {"step": step}}))
    snapshots.flush()


@contextmanager
def trainer(work: Callable[..., None], *arguments: Any) -> Iterator[tuple[Any, Connection]]:
    """A process that runs `work(*arguments, connection)`; killed at the end if it lives."""
    here, there = CONTEXT.Pipe()
    process = CONTEXT.Process(target=work, args=(*arguments, there))
    process.start()
    there.close()
    try:
        yield process, here
    finally:
        process.kill()
        process.join()
        here.close()


def hear(pipe: Connection, seconds: float = 60) -> Any:
    """The next message."""
    assert pipe.poll(seconds), "the trainer says nothing"
    return pipe.recv()


def all_heard(pipe: Connection) -> list[Any]:
    """What a trainer that is dead has said."""
    heard = []
    try:
        while True:
            heard.append(pipe.recv())
    except (EOFError, ConnectionResetError):
        return heard


def until(true: Callable[[], object], seconds: float = 20) -> None:
    """Wait for it."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill(pid: int) -> None:
    """SIGKILL, and wait until it is gone."""
    os.kill(pid, signal.SIGKILL)
    until(lambda: not alive(pid))


def keepers_of(folder: Path) -> list[int]:
    """Process ids of the keepers of run directories in `folder`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().decode().split("\0")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if "shoestring.checkpoint.keeper" in words and any(str(folder) in word for word in words):
                found.append(int(entry.name))
    return found


def memories(pid: int) -> int:
    """Memory files of ours that the process holds open."""
    count = 0
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            count += "memfd:shoestring" in os.readlink(path)
    return count


@pytest.fixture(autouse=True)
def no_keeper_left(tmp_path: Path) -> Iterator[None]:
    """A test that fails leaves no process behind."""
    yield
    for pid in keepers_of(tmp_path):
        with suppress(ProcessLookupError):
            kill(pid)
