"""SIGKILL of a real process while it saves: at random moments, and at each system call.

After every kill, before anything else: the newest checkpoint is whole, is no older than the last one that
`save` returned, holds one step and not a mixture, and nothing is left behind.
"""

import os
import random
import signal
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import CONTEXT
from shoestring.checkpoint import newest, prune, save, set_best
from shoestring.checkpoint.aside import aside, sweep

# Real processes from a server that has imported torch once: a kill costs milliseconds, not the import.


def put(run: Path, step: int) -> Path:
    def copy(folder: Path) -> None:
        fd = os.open(folder / "config.json", os.O_CREAT | os.O_WRONLY, 0o600)
        os.write(fd, str(step).encode() * 300)
        os.close(fd)

    tensors = {"w": torch.full((200, 50), float(step)), "b": torch.full((7,), step, dtype=torch.int64)}
    more = {"m": torch.full((10_000,), float(step)).bfloat16()}
    return save(
        run, step=step, tensors={"model": tensors, "optimizer": more}, json={"trainer": step}, copy=copy
    )


def check(run: Path, acknowledged: int) -> int:
    """The step of the newest checkpoint, after everything about it was found right."""
    found = newest(run, lambda line: None)
    if found is None:
        assert acknowledged < 0
        return -1
    step = found.step
    assert step >= acknowledged
    assert found.json("trainer") == step
    tensors = found.tensors("model") | found.tensors("optimizer")
    assert all(
        bool((tensor.float() == torch.tensor(float(step)).to(tensor.dtype).float()).all())
        for tensor in tensors.values()
    )
    assert (found.path / "config.json").read_text() == str(step) * 300
    assert not list(run.glob(".aside-*"))
    if (run / "best").is_symlink():
        assert (run / "best" / "MANIFEST.json").is_file()
    return step


def save_for_ever(run: Path, step: int, pipe: Connection) -> None:
    while True:
        put(run, step)
        pipe.send(step)
        if step % 3 == 0:
            put(run, step)  # as a signal right after a periodic save would
            set_best(run, run / f"checkpoint-{step:06d}")
        prune(run, keep=2)
        step += 1


def test_killed_at_random_moments(tmp_path: Path) -> None:
    rng = random.Random(0)
    run = tmp_path / "run"
    acknowledged, unfinished, saved = -1, 0, 0
    for _ in range(60):
        receiver, sender = CONTEXT.Pipe(duplex=False)
        start = check(run, acknowledged) + 1
        child = CONTEXT.Process(target=save_for_ever, args=(run, start, sender))
        child.start()
        sender.close()
        assert receiver.poll(60)  # the first is saved: it is in the middle of its work from here on
        time.sleep(rng.uniform(0, 0.04))
        child.kill()
        child.join()
        try:
            while True:
                acknowledged = receiver.recv()
                saved += 1
        except EOFError:
            receiver.close()
        unfinished += bool(list(run.glob(".aside-*")))
    check(run, acknowledged)
    assert saved >= 60
    assert unfinished >= 10, "the kills must have met saves in progress"


CALLS = ("open", "write", "fsync", "mkdir", "rename", "replace", "symlink", "unlink", "rmdir", "fchmod")


def die_at(run: Path, at: int, pipe: Connection) -> None:
    """Save a new step, save it again, choose it as best, prune; killed before system call number `at`."""
    count = 0

    def wrap(name: str, real: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal count
            if count == at:
                if name == "write":
                    real(args[0], bytes(args[1])[: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)
            count += 1
            return real(*args, **options)

        return call

    pipe.send(2)
    for name in CALLS:
        setattr(os, name, wrap(name, getattr(os, name)))
    acknowledge = pipe.send
    put(run, 3)
    acknowledge(3)
    put(run, 3)
    set_best(run, run / "checkpoint-000003")
    prune(run, keep=1)
    acknowledge(4)


def test_killed_at_every_system_call(tmp_path: Path) -> None:
    finished = False
    at = 0
    results = set()
    while not finished:
        run = tmp_path / str(at)
        for step in (1, 2):
            put(run, step)
        set_best(run, run / "checkpoint-000001")
        receiver, sender = CONTEXT.Pipe(duplex=False)
        child = CONTEXT.Process(target=die_at, args=(run, at, sender))
        child.start()
        sender.close()
        child.join(60)
        heard = -1
        try:
            while True:
                heard = receiver.recv()
        except EOFError:
            receiver.close()
        finished = heard == 4
        assert child.exitcode == (0 if finished else -signal.SIGKILL)
        results.add(check(run, min(heard, 3)))
        at += 1
    assert at > 60
    assert results == {2, 3}


def test_sweeping_beside_a_living_save_and_beside_other_sweepers(tmp_path: Path) -> None:
    put(tmp_path, 1)
    for index in range(20):
        dead = tmp_path / f".aside-dead{index}"
        (dead / "new").mkdir(parents=True)
        (dead / "new" / "w").write_bytes(bytes(1000))
    (tmp_path / ".aside-dead0" / "replaced-checkpoint-000002").mkdir()
    (tmp_path / "checkpoint-000001").rename(tmp_path / ".aside-dead1" / "replaced-checkpoint-000001")
    lines: list[str] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            lines.extend(sweep(tmp_path))
        except BaseException as error:
            failures.append(error)

    with aside(tmp_path) as living:
        (living / "new").mkdir()
        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (living / "new").is_dir()
    assert failures == []
    assert sum("removed, left by a process that died while it was saving" in line for line in lines) == 20
    assert "checkpoint-000001: put back, it was about to be replaced" in lines
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-000001", "checkpoint-000002"]


def test_what_cannot_be_removed_is_told_and_does_not_stop_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, 1)
    (tmp_path / ".aside-dead").mkdir()

    def refuse(*args: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "rmdir", refuse)
    lines: list[str] = []
    assert newest(tmp_path, lines.append) is not None
    assert lines == [".aside-dead: left by a process that died, and cannot be removed: Permission denied"]
