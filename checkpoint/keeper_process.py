"""Starting a keeper, and taking the memory of one that does not answer."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from .memory import MEMORY_NAME

LOG = "keeper.log"
_START = 30.0  # seconds for a new keeper to be ready
_PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH")


def start_keeper(run_dir: Path) -> subprocess.Popen[bytes]:
    """A keeper of `run_dir` that listens, or has found that another one does.

    In a session of its own, with the few environment variables that Python needs: no secret of the trainer's
    goes with it. What it says goes to RUN/keeper.log. Raises OSError, TimeoutError when it is not ready in
    time, ConnectionError when it ends at once.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    log = os.open(run_dir / LOG, flags, 0o600)
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "shoestring.checkpoint.keeper", str(run_dir)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd="/",
            env={key: os.environ[key] for key in _PASSED_ON if key in os.environ},
            start_new_session=True,
        )
    finally:
        os.close(log)
    assert process.stdout is not None
    with process.stdout as said:
        ready = wait_readable(said.fileno(), _START)
        word = said.readline() if ready else b""
    if word not in (b"ready\n", b"taken\n"):
        process.kill()
        process.wait()
        if not ready:
            raise TimeoutError(f"a new keeper is not ready after {_START:.0f} s")
        raise ConnectionError("a new keeper ended at once")
    return process


def wait_readable(fd: int, seconds: float) -> bool:
    """Whether `fd` can be read, or has ended, within so many seconds. `poll` takes any number, select not."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def memory_of(pid: int) -> int | None:
    """A descriptor of the memory that process `pid`, of this user, holds; None when it holds none."""
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since it was listed
            if os.readlink(path).startswith(f"/memfd:{MEMORY_NAME}"):
                return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    return None


def remove_empty_log(run_dir: Path) -> None:
    """Nothing was said: nothing is left."""
    log = run_dir / LOG
    if log.is_file() and log.stat().st_size == 0:
        log.unlink()
