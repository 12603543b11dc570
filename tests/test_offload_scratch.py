"""The scratch folder: it goes with its process, however that ends; nothing else is ever deleted."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import subprocess
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from shoestring.offload.scratch import open_scratch, require_space, start_time, sweep
from shoestring.recipes.errors import UserError


@contextmanager
def owner(folder: Path) -> Iterator[tuple[int, Path]]:
    """Another process (its id) with a scratch folder in `folder`, and that folder; killed with the block."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        scratch = open_scratch(folder)
        (scratch.path / "state").write_bytes(b"x" * 1000)
        os.write(writing, f"{scratch.path}\n".encode())
        signal.pause()
    os.close(writing)
    with open(reading, encoding="utf-8") as pipe:
        path = Path(pipe.readline().strip())
    try:
        yield child, path
    finally:
        kill(child)


def kill(child: int) -> None:
    with suppress(ChildProcessError):  # it is dead already
        os.waitpid(child, os.WNOHANG)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_folder_of_this_process_that_goes(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    scratch = open_scratch(folder)
    assert scratch.path.parent == folder
    assert scratch.path.name == f"shoestring-{os.getpid()}-{start_time(os.getpid())}"
    assert scratch.path.stat().st_mode & 0o777 == 0o700
    assert scratch.removed == ()
    (scratch.path / "inner").mkdir()
    (scratch.path / "inner" / "state").write_bytes(b"x")
    scratch.close()
    scratch.close()
    assert list(folder.iterdir()) == []


def test_two_of_one_process(tmp_path: Path) -> None:
    with open_scratch(tmp_path) as one, open_scratch(tmp_path) as two:
        assert one.path != two.path
        assert two.removed == ()
        assert one.path.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_swept_and_a_living_one_is_not(tmp_path: Path) -> None:
    with owner(tmp_path) as (killed, dead), owner(tmp_path) as (_, alive):
        assert (dead / "state").stat().st_size == 1000
        with open_scratch(tmp_path) as scratch:
            assert scratch.removed == ()
        kill(killed)
        assert dead.is_dir(), "nobody cleans up after SIGKILL"
        with open_scratch(tmp_path) as scratch:
            assert scratch.removed == (dead,)
            assert not dead.exists()
            assert (alive / "state").stat().st_size == 1000


def test_it_goes_with_its_process_and_not_with_a_child_of_it(tmp_path: Path) -> None:
    """What an interpreter does at its end, in a forked process, whose own child ends before it."""

    def end() -> None:
        atexit._run_exitfuncs()
        os._exit(0)

    child = os.fork()
    if child == 0:
        try:
            atexit._clear()  # what pytest registered is not ours to run
            scratch = open_scratch(tmp_path)
            (scratch.path / "state").write_bytes(b"x" * 1000)
            grandchild = os.fork()
            if grandchild == 0:
                end()
            os.waitpid(grandchild, 0)
            shutil.copytree(scratch.path, tmp_path / "seen")
            end()
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert list(tmp_path.iterdir()) == [tmp_path / "seen"]
    assert (tmp_path / "seen" / "state").stat().st_size == 1000


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("mine")
    folder = tmp_path / "scratch"
    folder.mkdir()
    (folder / "notes").mkdir()
    (folder / "shoestring-backup").mkdir()
    (folder / "shoestring-1-x").mkdir()
    (folder / "shoestring-999999999-1").write_text("a file")
    (folder / "shoestring-999999998-1").symlink_to(elsewhere)
    (folder / "shoestring-999999997-1-2.bak").mkdir()
    before = sorted(folder.iterdir())
    with open_scratch(folder) as scratch:
        assert scratch.removed == ()
    assert sorted(folder.iterdir()) == before
    assert (elsewhere / "mine").read_text() == "mine"


def test_links_inside_a_dead_folder_are_not_followed(tmp_path: Path) -> None:
    keep = tmp_path / "keep"
    keep.mkdir()
    (keep / "mine").write_text("mine")
    dead = tmp_path / "scratch" / "shoestring-999999999-1"
    dead.mkdir(parents=True)
    (dead / "lock").touch()
    (dead / "link").symlink_to(keep)
    assert sweep(tmp_path / "scratch") == (dead,)
    assert (keep / "mine").read_text() == "mine"


def test_before_the_lock_is_there_the_name_judges(tmp_path: Path) -> None:
    """A folder between mkdir and lock: its owner's id and start time say whether it lives."""
    pid = os.getpid()
    mine = tmp_path / f"shoestring-{pid}-{start_time(pid)}-7"
    earlier = tmp_path / f"shoestring-{pid}-{(start_time(pid) or 0) - 1}"  # the id was another's before
    nobody = tmp_path / "shoestring-999999999-1"
    for path in (mine, earlier, nobody):
        path.mkdir()
        (path / "lock.new").touch()
    assert set(sweep(tmp_path)) == {earlier, nobody}
    assert mine.is_dir()


def test_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(UserError) as caught:
        open_scratch(tmp_path / "link")
    assert str(caught.value).startswith(f"offload.disk_path  {tmp_path}/link is a symbolic link")
    assert f"offload.disk_path={tmp_path}/real" in str(caught.value)
    assert list((tmp_path / "real").iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"offload\.disk_path  no scratch folder can be made in"):
            open_scratch(folder)


def test_start_times_tell_processes_apart() -> None:
    mine = start_time(os.getpid())
    assert mine is not None
    assert mine == start_time(os.getpid())
    assert start_time(999999999) is None
    # a command with spaces and parentheses in its name
    with subprocess.Popen(["/bin/sh", "-c", "exec -a 'a) b (c' sleep 60 2>/dev/null || sleep 60"]) as process:
        later = start_time(process.pid)
        process.kill()
    assert later is not None
    assert later >= mine


def test_space_is_required(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = namedtuple("disk", "f_bavail f_frsize")(1000, 4096)
    monkeypatch.setattr(os, "statvfs", lambda path: disk)
    require_space(tmp_path / "not" / "yet", 4096000)
    with pytest.raises(UserError) as caught:
        require_space(tmp_path / "not", 4096001)
    first, *rest = str(caught.value).splitlines()
    assert first == f"offload.disk_path  {tmp_path}/not has 0.00 GB free, the run needs 0.00."
    assert "offload.optimizer=host" in "".join(rest)


def test_space_is_that_of_the_disk_below(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path)
    require_space(tmp_path / "a" / "b", 1)
    with pytest.raises(UserError, match="GB free"):
        require_space(tmp_path / "a" / "b", free.f_blocks * free.f_frsize + 1)
