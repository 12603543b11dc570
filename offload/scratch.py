"""A process's own folder for scratch files on the offload disk, and the removal of those of dead processes.

The folder is named by process id and start time, since ids come again. Its `lock` is held by flock(2) as long
as the owner lives, also through SIGKILL: the kernel lets go of it with the process. The lock is taken under
another name and renamed, so a `lock` that nobody holds belongs to the dead. A folder without `lock`, from the
moment before, is judged by its name.

A folder that a snapshot names outlives its process: `kept` in it says of which run, and which process holds
the snapshot. It goes when that process has ended too, when the run starts again and does not need it, or with
`drop`.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import json
import os
import re
import shutil
import time
from pathlib import Path

from ..recipes.errors import UserError
from .errors import OffloadError

_NAME = re.compile(r"shoestring-(\d+)-(\d+)(?:-\d+)?")
_LOCK = "lock"
_KEPT = "kept"
_PATIENCE = 10.0
"""Seconds in which a dead owner's lock may still be held: by its forked workers, which notice its death a
little later, or by another process that looks whether it lives."""


class Scratch:
    """A folder that goes with this process: `path` for its files, `removed` stale ones found at the start."""

    def __init__(self, path: Path, descriptor: int, removed: tuple[Path, ...]) -> None:
        self.path = path
        self.removed = removed
        self.kept = False
        self._descriptor = descriptor
        self._owner = os.getpid()
        atexit.register(self.close)

    def keep(self, run: Path, process: int) -> None:
        """Leave the folder where it is when this process ends, for the next one of `run`, a folder.

        process: id of the one whose memory says what is in it; when that has ended too, it may go.
        """
        self.kept = True
        text = json.dumps({"run": _real(run), "process": process, "started": start_time(process)})
        aside = self.path / f"{_KEPT}.new"
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, self.path / _KEPT)

    def close(self) -> None:
        """Delete the folder with all in it, unless it is kept; again, or in a forked child, does nothing."""
        if self._descriptor < 0 or os.getpid() != self._owner:
            return
        descriptor, self._descriptor = self._descriptor, -1
        atexit.unregister(self.close)
        if not self.kept:
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(descriptor)

    def drop(self) -> None:
        """As `close`, and what was kept is deleted, now or after it."""
        if os.getpid() != self._owner:
            return
        if self._descriptor < 0 and self.kept:
            shutil.rmtree(self.path, ignore_errors=True)
        self.kept = False
        self.close()

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_scratch(folder: Path) -> Scratch:
    """A new scratch folder under `folder`, which is made; those of dead processes there are deleted first.

    Raises UserError when `folder` is a symbolic link or cannot be written.
    """
    if folder.is_symlink():
        raise UserError(
            f"offload.disk_path  {folder} is a symbolic link; files are written and deleted below it.\n"
            f"                   Give the folder itself: offload.disk_path={folder.resolve()}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        removed = sweep(folder)
        path = _make(folder)
        return Scratch(path, _lock(path), removed)
    except OSError as error:
        raise UserError(
            f"offload.disk_path  no scratch folder can be made in {folder}: {error.strerror or error}.\n"
            "                   Choose a folder that you may write to: offload.disk_path=PATH"
        ) from None


def adopt(path: Path) -> Scratch:
    """The kept folder of a dead process, from now on this one's; it stays kept until `drop`.

    OffloadError: there is none, or its owner lives.
    """
    if _NAME.fullmatch(path.name) is None or path.is_symlink():
        raise OffloadError(f"{path} is no scratch folder")
    try:
        descriptor = os.open(_lock_of(path), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise OffloadError(f"the scratch folder {path} is gone: {error.strerror}") from None
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                break  # no locks on this file system
            if time.monotonic() > until:
                os.close(descriptor)
                raise OffloadError(f"another process uses the scratch folder {path}") from None
            time.sleep(0.01)
    scratch = Scratch(path, descriptor, ())
    scratch.kept = True
    return scratch


def sweep(folder: Path, *, run: Path | None = None, but: Path | None = None) -> tuple[Path, ...]:
    """Delete the scratch folders of dead processes in `folder`; whatever else is there is left alone.

    A kept one goes only if it was kept for `run`, which has started again, and is not `but`.
    """
    removed = []
    for path in sorted(folder.iterdir()):
        name = _NAME.fullmatch(path.name)
        if name is None or path.is_symlink() or not path.is_dir():
            continue
        if path == but or _is_kept(path, run):
            continue
        if _is_dead(path, int(name[1]), int(name[2])):
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path)
    return tuple(removed)


def _is_kept(path: Path, run: Path | None) -> bool:
    try:
        kept = json.loads((path / _KEPT).read_text(encoding="utf-8"))
        process, started, of = int(kept["process"]), kept["started"], str(kept["run"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return started is not None and start_time(process) == started and (run is None or of != _real(run))


def _real(run: Path) -> str:
    return os.path.realpath(run)


def _lock_of(path: Path) -> Path:
    """Where there are no locks, it has kept its first name."""
    return path / _LOCK if (path / _LOCK).exists() else path / f"{_LOCK}.new"


def _is_dead(path: Path, pid: int, started: int) -> bool:
    try:
        descriptor = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return start_time(pid) != started
    except OSError:
        return False  # another user's, or not ours
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        return start_time(pid) != started  # a file system without locks
    finally:
        os.close(descriptor)


def _make(folder: Path) -> Path:
    pid = os.getpid()
    name = f"shoestring-{pid}-{start_time(pid)}"
    for number in range(1000):
        path = folder / (f"{name}-{number}" if number else name)
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            continue
        return path
    raise FileExistsError(errno.EEXIST, f"{name} to {name}-999 are all there")


def _lock(path: Path) -> int:
    aside = path / f"{_LOCK}.new"
    descriptor = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            os.close(descriptor)
            raise
        return descriptor  # no locks on this file system: the name is judged instead
    os.rename(aside, path / _LOCK)
    return descriptor


def start_time(pid: int) -> int | None:
    """Start of process `pid` in clock ticks since boot (proc(5), field 22 of stat); None: there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The second field is the command in parentheses, which may hold spaces and parentheses.
    return int(stat.rpartition(")")[2].split()[19])


def require_space(folder: Path, nbytes: int) -> None:
    """UserError unless the file system of `folder`, or of its nearest existing parent, has nbytes free."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    disk = os.statvfs(there)
    free = disk.f_bavail * disk.f_frsize
    if free < nbytes:
        raise UserError(
            f"offload.disk_path  {folder} has {free / 1e9:.2f} GB free, the run needs {nbytes / 1e9:.2f}.\n"
            "                   Free space, choose another disk: offload.disk_path=PATH, or keep the state\n"
            "                   in memory: offload.optimizer=host"
        )
