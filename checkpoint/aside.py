"""A private directory beside the checkpoints, where all that is unfinished lives until it is renamed.

    run/.aside-3f9c/new/                          being written; renamed to run/checkpoint-001200
    run/.aside-3f9c/replaced-checkpoint-001200/   an earlier one of that step, until the new one is in place
    run/.aside-3f9c/removed-checkpoint-000300/    taken off the list in one rename, then deleted

Its owner holds a lock (flock) on it. A directory whose lock can be had belongs to a process that died:
`sweep` puts back what was replaced but not yet succeeded, and deletes the rest. A lock, unlike a process id,
is never reused and means the same in every container that sees the directory.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .files import sync_directory

PREFIX = ".aside-"
_REPLACED = "replaced-"
_REMOVED = "removed-"
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EBADF, errno.ENOSYS, errno.EINVAL}


@contextmanager
def aside(folder: Path) -> Iterator[Path]:
    """A new, empty, locked directory (0700) inside `folder`; gone afterwards, whatever happens in between."""
    path, fd = _create(folder)
    try:
        try:
            yield path
        except BaseException as error:
            try:
                _dissolve(folder, path)
            except OSError as second:
                error.add_note(f"{path} could not be removed ({second}); the next start tries again")
            raise
        _dissolve(folder, path)
    finally:
        os.close(fd)


def publish(private: Path, new: Path, final: Path) -> None:
    """Rename `new` (inside `private`, all of it fsynced) to `final`, durably. What had that name is replaced.

    At no moment, and after no crash, are both the old and the new one lost: see `sweep`.
    """
    if os.path.lexists(final):
        sync_directory(final.parent)  # the name of `private`, or what moves into it could be lost with it
        os.rename(final, private / f"{_REPLACED}{final.name}")
        sync_directory(private)
    os.rename(new, final)
    sync_directory(final.parent)


def remove(private: Path, checkpoint: Path) -> None:
    """Take a checkpoint out of its folder in one durable rename; `aside` deletes it when it ends."""
    os.rename(checkpoint, private / f"{_REMOVED}{checkpoint.name}")
    sync_directory(checkpoint.parent)


def sweep(folder: Path) -> list[str]:
    """Clear what dead processes left in `folder`; one line for each thing done. Safe beside live ones and
    others.

    A directory that cannot be judged (a file system without locks) or not be removed is left, with a line.
    """
    lines = []
    for path in sorted(folder.glob(f"{PREFIX}*")):
        try:
            with _locked(path) as owned:
                if owned:
                    back = _dissolve(folder, path)
                    lines.append(f"{path.name}: removed, left by a process that died while it was saving")
                    lines += [f"{name}: put back, it was about to be replaced" for name in back]
        except FileNotFoundError:
            continue  # another process swept it at the same time
        except OSError as error:
            lines.append(f"{path.name}: left by a process that died, and cannot be removed: {error.strerror}")
    return lines


def is_abandoned(path: Path) -> bool:
    """Whether the owner of this directory is known to be dead."""
    try:
        with _locked(path) as owned:
            return owned
    except OSError:
        return False


def _create(folder: Path) -> tuple[Path, int]:
    while True:
        path = folder / f"{PREFIX}{secrets.token_hex(6)}"
        os.mkdir(path, 0o700)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # swept in the instant before it was locked
        if _lock(fd) is not False and _is_same(fd, path):
            return path, fd
        os.close(fd)


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """True inside when the lock was free, and is now ours."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield _lock(fd) is True and _is_same(fd, path)
    finally:
        os.close(fd)


def _lock(fd: int) -> bool | None:
    """True: locked. False: another holds it. None: this file system has no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _is_same(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def _dissolve(folder: Path, path: Path) -> list[str]:
    """Put back what has no successor, delete the rest. Returns the names put back."""
    back = []
    for replaced in path.glob(f"{_REPLACED}*"):
        final = folder / replaced.name.removeprefix(_REPLACED)
        if not os.path.lexists(final):
            os.rename(replaced, final)
            sync_directory(folder)
            back.append(final.name)
    shutil.rmtree(path)
    return back
