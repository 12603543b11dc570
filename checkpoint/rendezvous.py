"""Where the trainer of a run directory finds its keeper: a unix socket in a directory of this user alone.

    $TMPDIR/shoestring-<uid>/        0700; nobody else's, or it is refused
        keeper-<hash of the run directory's real path>         the socket
        keeper-<...>.lock            flock of the living keeper: there is at most one

Sockets are named through /proc/self/fd/<directory>/..., so that no path is longer than the 108 bytes of a
socket's address, and the directory that was checked is the one that is used.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import stat
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


class Unsafe(Exception):
    """The directory of the sockets is not this user's own."""


@dataclass(frozen=True)
class Listening:
    """The keeper's side. `close` gives name and lock back."""

    socket: socket.socket
    name: str
    folder: int
    lock: int

    def close(self) -> None:
        """The next keeper may start."""
        self.socket.close()
        for name in (self.name, f"{self.name}.lock"):
            os.unlink(name, dir_fd=self.folder)
        os.close(self.lock)
        os.close(self.folder)


def socket_name(run_dir: Path) -> str:
    """The same for every path that leads to the directory."""
    return f"keeper-{hashlib.sha256(os.fsencode(os.path.realpath(run_dir))).hexdigest()[:32]}"


def connect(run_dir: Path, timeout: float) -> socket.socket | None:
    """A connection to the keeper of `run_dir`; None where there is none. `timeout`: seconds, of each call."""
    folder = _folder()
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.settimeout(timeout)
        connection.connect(f"/proc/self/fd/{folder}/{socket_name(run_dir)}")
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    except BaseException:
        connection.close()
        raise
    finally:
        os.close(folder)
    return connection


def listen(run_dir: Path) -> Listening | None:
    """The keeper's socket; None when a keeper of this directory lives."""
    folder = _folder()
    name = socket_name(run_dir)
    lock = _lock(folder, f"{name}.lock")
    if lock is None:
        os.close(folder)
        return None
    _sweep(folder, keep=name)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f"/proc/self/fd/{folder}/{name}")
    listener.listen(8)
    return Listening(listener, name, folder, lock)


def _folder() -> int:
    """A descriptor of the directory, made when it is missing. Raises Unsafe, OSError."""
    path = Path(tempfile.gettempdir(), f"shoestring-{os.getuid()}")
    with suppress(FileExistsError):  # usual; whose it is comes next
        os.mkdir(path, 0o700)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (NotADirectoryError, PermissionError):
        raise Unsafe(f"{path} is not a directory of yours") from None
    facts = os.fstat(fd)
    if facts.st_uid != os.getuid() or stat.S_IMODE(facts.st_mode) & 0o077:
        os.close(fd)
        raise Unsafe(f"{path} must belong to you and be closed to others (mode 0700)")
    return fd


def _sweep(folder: int, keep: str) -> None:
    """Take away what keepers that were killed have left: of all directories the locks that nobody has.

    And the socket `keep`, whose lock is the caller's.
    """
    names = set(os.listdir(folder))
    if keep in names:
        os.unlink(keep, dir_fd=folder)
    for name in names:
        socket_of = name.removesuffix(".lock")
        if name == socket_of or socket_of == keep or (lock := _lock(folder, name)) is None:
            continue
        with suppress(FileNotFoundError):
            os.unlink(socket_of, dir_fd=folder)
        os.unlink(name, dir_fd=folder)
        os.close(lock)


def _lock(folder: int, name: str) -> int | None:
    """A descriptor with the lock; None when another process has it."""
    while True:
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.stat(name, dir_fd=folder, follow_symlinks=False)):
                return fd
        except BlockingIOError:
            os.close(fd)
            return None
        except FileNotFoundError:
            pass  # its owner ended between our two calls, and took the name away
        os.close(fd)
