"""The keeper as a process: what it is made of, when it ends, what it does when a trainer dies or it does."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from keeper_processes import (
    QUICK,
    alive,
    hear,
    keepers_of,
    kill,
    memories,
    no_keeper_left,
    state,
    step_in,
    take,
    trainer,
    until,
)
from shoestring.checkpoint import KeeperSettings, Snapshotter, keeping, newest, save
from shoestring.checkpoint.keeper_process import LOG
from shoestring.checkpoint.messages import Kind, Message, send
from shoestring.checkpoint.rendezvous import connect, socket_name
from shoestring.recipes.errors import UserError

__all__ = ["no_keeper_left"]  # a fixture, for every test here


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def train(run: Path, settings: KeeperSettings, pipe: Connection) -> None:
    """Say what was found; then a snapshot of each step that is asked for."""
    lines: list[str] = []
    with Snapshotter(run, settings=settings, warn=lines.append) as snapshots:
        found = snapshots.newest()
        pipe.send((step_in(found) if found else 0, snapshots.keeper_pid))
        del found
        while (order := pipe.recv()) != "leave":
            if order == "warnings":
                pipe.send(list(lines))
            elif order == "fork":
                child = os.fork()
                if not child:
                    time.sleep(60)
                    os._exit(0)
                pipe.send(child)
            else:
                took = time.monotonic()
                take(snapshots, order)
                pipe.send(time.monotonic() - took)


def said(run: Path) -> str:
    log = run / LOG
    return log.read_text() if log.exists() else ""


# What it is


def test_it_imports_neither_torch_nor_pydantic() -> None:
    code = (
        "import sys, shoestring.checkpoint.keeper\n"
        "print(sorted({'torch', 'pydantic', 'numpy', 'yaml', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_it_is_a_process_of_its_own_that_takes_nothing_along(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-5f1e")
    monkeypatch.setenv("WANDB_API_KEY", "canary-5f1e")
    with Snapshotter(run, settings=QUICK) as snapshots:
        take(snapshots, 1, floats=10_000_000)
        pid = snapshots.keeper_pid
        proc = Path(f"/proc/{pid}")
        assert b"canary" not in (proc / "environ").read_bytes()
        assert os.getsid(pid) == pid != os.getsid(0)
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGHUP)
        snapshots.leave()
    until(lambda: newest(run, print) is not None)
    assert alive(pid)
    peak = next(line for line in (proc / "status").read_text().splitlines() if line.startswith("VmHWM"))
    assert int(peak.split()[1]) < 64_000, "kB, after it has written 50 MB to the disk"
    assert stat.S_IMODE((run / LOG).stat().st_mode) == 0o600


def test_its_place_is_this_user_s_alone_and_may_have_a_long_path(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.setenv("TMPDIR", str(long))
    with Snapshotter(run, settings=QUICK) as snapshots:
        place = long / f"shoestring-{os.getuid()}"
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
        names = sorted(path.name for path in place.iterdir())
        assert names == [socket_name(run), f"{socket_name(run)}.lock"]
        assert stat.S_IMODE((place / names[0]).stat().st_mode) & 0o077 == 0
        take(snapshots, 1)
    assert list(place.iterdir()) == []
    place.chmod(0o755)
    with pytest.raises(UserError, match=r"must belong to you and be closed to others \(mode 0700\)"):
        Snapshotter(run, settings=QUICK)
    place.rmdir()
    place.symlink_to(tmp_path)
    with pytest.raises(UserError, match="is not a directory of yours"):
        Snapshotter(run, settings=QUICK)


def test_what_killed_keepers_leave_is_taken_away_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for name in ("one", "two"):
        with Snapshotter(tmp_path / name, settings=KeeperSettings(heartbeat=30)) as snapshots:
            kill(snapshots.keeper_pid)
    place = tmp_path / f"shoestring-{os.getuid()}"
    with Snapshotter(tmp_path / "three", settings=QUICK) as third:
        take(third, 1)
        with Snapshotter(tmp_path / "two", settings=QUICK):
            names = {socket_name(tmp_path / name) for name in ("two", "three")}
            assert {path.name for path in place.iterdir()} == names | {f"{name}.lock" for name in names}
        take(third, 2)
    assert list(place.iterdir()) == []


def test_the_same_directory_by_another_path_has_the_same_keeper(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "TAKEOVER", 0.2)
    run.mkdir()
    link = tmp_path / "link"
    link.symlink_to(run)
    assert socket_name(link) == socket_name(run) == socket_name(run / ".." / "run")
    with Snapshotter(run, settings=QUICK), pytest.raises(UserError, match="is training in this directory"):
        Snapshotter(link, settings=QUICK)


def test_what_is_no_message_is_refused_and_leaves_nothing(run: Path) -> None:
    with Snapshotter(run, settings=QUICK) as snapshots:
        pid = snapshots.keeper_pid
        before = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        with open(os.devnull) as null:
            for data in (b"x", bytes(460), bytes(5000)):
                connection = connect(run, 5)
                assert connection is not None
                with connection, contextlib.suppress(ConnectionError):
                    socket.send_fds(connection, [data], [null.fileno()] * 3)
                    assert connection.recv(1000) == b""
            silent = connect(run, 5)
            assert silent is not None
            silent.close()
        take(snapshots, 1)
        until(lambda: len(list(Path(f"/proc/{pid}/fd").iterdir())) == before + 1)  # the memory
        assert snapshots.keeper_pid == pid


def test_nobody_else_is_listened_to_nor_believed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run.mkdir()
    code = (
        "import sys\nfrom shoestring.checkpoint import keeper\n"
        "keeper.peer = lambda connection: (1, 99999)\n"
        "keeper.FIRST_TRAINER = 5\n"
        "sys.exit(keeper.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stderr is not None
        assert other.stdout.readline() == "ready\n"
        connection = connect(run, 5)
        assert connection is not None
        with connection, pytest.raises(ConnectionError):  # noqa: PT012 (whichever of the two comes too late)
            send(connection, Message(Kind.HELLO))
            connection.recv(1000)
        assert "a connection is refused: a connection of user 99999" in other.stderr.readline()
        other.kill()
    monkeypatch.setattr(keeping, "peer", lambda connection: (1, 99999))
    with pytest.raises(UserError, match="the keeper's socket belongs to user 99999"):
        Snapshotter(run, settings=QUICK)


# Two trainers


def test_a_second_trainer_is_refused_and_the_first_goes_on(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "TAKEOVER", 0.2)
    with trainer(train, run, QUICK) as (first, pipe):
        hear(pipe)
        pipe.send(1)
        hear(pipe)
        with pytest.raises(UserError) as caught:
            Snapshotter(run, settings=QUICK)
        assert str(caught.value) == (
            f"{run}: process {first.pid} is training in this directory.\n"
            "Wait for it to finish or end it; or set another output_dir."
        )
        pipe.send(2)
        hear(pipe)
        first.kill()
        first.join()
    with Snapshotter(run, settings=QUICK) as snapshots:
        found = snapshots.newest()
        assert found is not None
        assert step_in(found) == 2


# The trainer's end


def test_a_killed_trainer_s_newest_snapshot_goes_to_the_disk(run: Path, tmp_path: Path) -> None:
    with trainer(train, run, QUICK) as (process, pipe):
        hear(pipe)
        for step in (1, 2, 3):
            pipe.send(step)
            hear(pipe)
        process.kill()
        process.join()
    until(lambda: "checkpoint-000003 written from memory" in said(run))
    found = newest(run, print)
    assert found is not None
    same = newest(
        save(tmp_path / "same", step=3, tensors=state(3), json={"trainer": {"step": 3}}).parent, print
    )
    assert same is not None
    assert found.manifest.files == same.manifest.files
    assert {path.name for path in run.iterdir()} == {"checkpoint-000003", LOG}
    assert stat.S_IMODE(found.path.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("step", "whole", "written"), [(2, True, True), (3, True, False), (4, True, False), (4, False, True)]
)
def test_not_where_an_equal_or_newer_one_is_whole(run: Path, step: int, whole: bool, written: bool) -> None:
    path = save(run, step=step, tensors=state(50), json={"trainer": {"step": 50}})
    if not whole:
        os.truncate(path / "model.safetensors", 100)
    with trainer(train, run, KeeperSettings(lease=0, heartbeat=0.1)) as (process, pipe):
        _, keeper = hear(pipe)
        pipe.send(3)
        hear(pipe)
        process.kill()
        process.join()
    until(lambda: not alive(keeper))
    assert ("checkpoint-000003 written from memory" in said(run)) is written
    found = newest(run, lambda line: None)
    assert found is not None
    assert found.step == (3 if written else step)
    assert found.json("trainer") == {"step": 3 if written else 50}


def test_a_worker_that_the_trainer_forked_does_not_hide_its_death(run: Path) -> None:
    with trainer(train, run, QUICK) as (process, pipe):
        hear(pipe)
        pipe.send(1)
        hear(pipe)
        pipe.send("fork")
        worker = hear(pipe)
        until(lambda: memories(worker) == 0)
        process.kill()
        process.join()
        until(lambda: newest(run, print) is not None)
        with Snapshotter(run, settings=QUICK) as snapshots:
            assert snapshots.newest() is not None
        kill(worker)


def test_the_lease_ends(run: Path) -> None:
    settings = KeeperSettings(lease=0.6, heartbeat=0.1)
    with trainer(train, run, settings) as (process, pipe):
        _, keeper = hear(pipe)
        pipe.send(1)
        hear(pipe)
        died = time.monotonic()
        process.kill()
        process.join()
    until(lambda: not alive(keeper))
    assert 0.4 < time.monotonic() - died < 5
    with trainer(train, run, settings) as (_, pipe):
        step, other = hear(pipe)
        assert (step, other == keeper) == (0, False)


def test_a_trainer_that_finishes_takes_the_memory_with_it(run: Path) -> None:
    with trainer(train, run, QUICK) as (process, pipe):
        _, keeper = hear(pipe)
        pipe.send(1)
        hear(pipe)
        pipe.send("leave")
        process.join(20)
        assert process.exitcode == 0
    until(lambda: not alive(keeper))
    assert list(run.iterdir()) == []


def test_told_to_end_it_writes_first(run: Path) -> None:
    with Snapshotter(run, settings=KeeperSettings(heartbeat=30)) as snapshots:
        take(snapshots, 5)
        os.kill(snapshots.keeper_pid, signal.SIGTERM)
        until(lambda: not keepers_of(run))
        found = newest(run, print)
        assert found is not None
        assert found.step == 5


# The keeper's end


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGSTOP])
def test_training_goes_on_without_it_and_another_is_started(run: Path, by: signal.Signals) -> None:
    settings = KeeperSettings(heartbeat=0.2, patience=1.0)
    with trainer(train, run, settings) as (process, pipe):
        _, keeper = hear(pipe)
        pipe.send(1)
        hear(pipe)
        os.kill(keeper, by)
        for step in range(2, 12):
            pipe.send(step)
            assert hear(pipe) < 1.0, "no snapshot waits for the keeper"
        until(lambda: not alive(keeper) and len(keepers_of(run)) == 1, 10)
        until(lambda: memories(keepers_of(run)[0]) == 1)
        pipe.send("warnings")
        what = "has died" if by is signal.SIGKILL else "does not answer"
        (line,) = hear(pipe)
        assert line.startswith(f"the process that keeps snapshots in memory {what}: another one is started.")
        process.kill()
        process.join()
    with Snapshotter(run, settings=QUICK) as snapshots:
        found = snapshots.newest()
        assert found is not None
        assert step_in(found) == 11


def test_what_prevents_another_one_is_told_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    tries = 0

    def refuse(run_dir: Path) -> None:
        nonlocal tries
        tries += 1
        raise PermissionError(errno.EACCES, "Permission denied")

    with Snapshotter(run, settings=QUICK, warn=lines.append) as snapshots:
        take(snapshots, 1)
        with monkeypatch.context() as patch:
            patch.setattr(keeping, "start_keeper", refuse)
            kill(snapshots.keeper_pid)
            until(lambda: tries >= 2)
            assert snapshots.keeper_pid == 0
            take(snapshots, 2)
        assert [line.split(":")[0] for line in lines] == [
            "the process that keeps snapshots in memory has died",
            "no process keeps snapshots in memory, it is tried again",
        ]
        assert lines[1].endswith("Permission denied")
        until(lambda: snapshots.keeper_pid and memories(snapshots.keeper_pid) == 1)
        snapshots.leave()
    until(lambda: newest(run, print) is not None)
    monkeypatch.setattr(keeping, "start_keeper", refuse)
    with pytest.raises(UserError, match=r"cannot be reached: .*Permission denied"):
        Snapshotter(run.parent / "other", settings=QUICK)


def leave_one(run: Path) -> int:
    """A keeper with a snapshot of step 1; all of it is on the disk too."""
    with Snapshotter(run, settings=QUICK) as snapshots:
        take(snapshots, 1)
        keeper = snapshots.keeper_pid
        snapshots.leave()
    until(lambda: newest(run, print) is not None)
    return keeper


def test_a_stopped_keeper_is_woken_by_the_next_trainer(run: Path) -> None:
    keeper = leave_one(run)
    os.kill(keeper, signal.SIGSTOP)
    with Snapshotter(run, settings=KeeperSettings(patience=0.5)) as snapshots:
        assert snapshots.keeper_pid == keeper
        found = snapshots.newest()
        assert found is not None
        assert step_in(found) == 1


def test_the_memory_of_one_that_cannot_be_woken_is_taken_over(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = leave_one(run)
    os.kill(keeper, signal.SIGSTOP)
    really = signal.pidfd_send_signal

    def not_woken(pidfd: int, number: int, *more: Any) -> None:
        if number != signal.SIGCONT:
            really(pidfd, number, *more)

    monkeypatch.setattr(signal, "pidfd_send_signal", not_woken)
    lines: list[str] = []
    with Snapshotter(run, settings=KeeperSettings(patience=0.5), warn=lines.append) as snapshots:
        assert snapshots.keeper_pid != keeper
        assert not alive(keeper)
        found = snapshots.newest()
        assert found is not None
        assert step_in(found) == 1
        assert lines == ["the process that keeps snapshots in memory does not answer: another one is started"]
        del found
        snapshots.leave()
    with Snapshotter(run, settings=QUICK) as snapshots:
        found = snapshots.newest()
        assert found is not None
        assert step_in(found) == 1, "the new keeper holds it"
