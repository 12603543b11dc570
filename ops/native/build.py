"""The library of C++ operations, made once a machine: compiled, kept where only this user writes, loaded.

Processes that start at once wait for the first of them, which compiles; a kept library that does not load (of
another system under the same home, or cut off with the power) is made anew. Where neither the user's cache
nor the folder of temporary files can hold it, each process makes its own and leaves nothing behind.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# No -ffast-math: what is not finite must stay so. Square roots need no errno, so that they are vectors.
_FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-pthread",
    "-fno-math-errno",
    "-fno-trapping-math",
)
PATIENCE = 120.0
"""Seconds that a compiler may take, of which it needs ten, and that another process is waited for."""


class NotBuilt(Exception):
    """There is no library; the message says why, in a few words."""


def built() -> ctypes.CDLL:
    """The library, kept or compiled. Raises NotBuilt, and OSError where it cannot be written or loaded."""
    command = compiler()
    folder = kept_folder()
    if folder is not None:
        return _kept(command, folder)
    with tempfile.TemporaryDirectory(prefix="shoestring-native-") as alone:
        path = Path(alone) / "it.so"
        _compile(command, path)
        return ctypes.CDLL(str(path))  # stays in memory when its file is gone


def compiler() -> list[str]:
    """The command: what CXX says, flags included, or the first that is there. Raises NotBuilt for none."""
    given = os.environ.get("CXX", "").strip()
    try:
        asked = [shlex.split(given)] if given else [["c++"], ["g++"], ["clang++"]]
    except ValueError as error:
        raise NotBuilt(f"CXX={given!r} is no command: {error}") from None
    for words in asked:
        if program := shutil.which(words[0]):
            return [program, *words[1:]]
    wanted = f"CXX={given!r} names none" if given else "c++, g++ or clang++; or name one in CXX"
    raise NotBuilt(f"there is no C++ compiler ({wanted})")


def kept_folder() -> Path | None:
    """A folder that only this user writes to, since what lies in it is run; None where there is none."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache"))
    aside = Path(tempfile.gettempdir()) / f"shoestring-native-{os.getuid()}"  # for a home that is read only
    return next(filter(_ours, (home / "shoestring" / "native", aside)), None)


def _ours(folder: Path) -> bool:
    """Whether `folder`, made where it lacks, is this user's alone, and nobody else can replace it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return False
        for above in folder.parents[:2]:
            status = above.stat()
            shared = status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX
            if status.st_uid not in (os.getuid(), 0) or shared:
                return False
    except OSError:
        return False
    return os.access(folder, os.W_OK) and not os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0)


def _kept(command: list[str], folder: Path) -> ctypes.CDLL:
    path = folder / f"{_key(command)}.so"
    # A file that is there is whole: it was renamed. Only a missing or useless one has to be waited for.
    with suppress(OSError):
        return ctypes.CDLL(str(path))
    with _alone(folder / "lock"):
        with suppress(OSError):
            return ctypes.CDLL(str(path))  # another process has made it meanwhile
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            made = Path(aside) / "made.so"
            _compile(command, made)
            with made.open("rb") as file:
                os.fsync(file.fileno())
            made.replace(path)
        return ctypes.CDLL(str(path))


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """While no other process is inside. Raises NotBuilt when another has been for too long."""
    until = time.monotonic() + 1.5 * PATIENCE
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise NotBuilt(f"another process has compiled for too long, see {path}") from None
                time.sleep(0.05)
            except OSError:
                break  # a file system without locks: several compile, and each renames a whole file
        yield


def _compile(command: list[str], path: Path) -> None:
    """Write the library to `path`, whose folder holds its parts meanwhile."""
    flags, runtime = _options(command)
    _run([*command, *flags, "-c", *map(str, _sources(".cpp"))], path.parent)
    objects = [f"{source.stem}.o" for source in _sources(".cpp")]
    # Without -fopenmp here: it would bring the compiler's own runtime beside PyTorch's.
    linked = [*objects, runtime] if runtime else objects
    _run([*command, "-shared", "-pthread", *linked, "-o", path.name], path.parent)


def _run(command: list[str], folder: Path) -> None:
    """Raises NotBuilt with the first error that the compiler tells, and where it does not end."""
    # A session of its own, so that a compiler's children end with it.
    running = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True,
    )  # fmt: skip
    try:
        told, _ = running.communicate(timeout=PATIENCE)
    except BaseException as error:
        os.killpg(running.pid, signal.SIGKILL)
        running.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise NotBuilt(f"{command[0]} did not end within {PATIENCE:g} seconds") from None
        raise
    if running.returncode:
        lines = [line for line in told.splitlines() if "error" in line.casefold()] or ["no message"]
        raise NotBuilt(f"{command[0]} could not compile them: {lines[0].strip()}")


def _options(command: list[str]) -> tuple[tuple[str, ...], str | None]:
    """Flags, and the OpenMP runtime to link with, if any."""
    clang = any("clang" in program for program in _programs(command))  # calls another runtime
    runtime = None if clang else _openmp()
    return ((*_FLAGS, "-fopenmp") if runtime else _FLAGS), runtime


def _openmp() -> str | None:
    """The GNU OpenMP runtime that PyTorch has loaded, whose threads are then ours too."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    found = {line.split(maxsplit=5)[5] for line in lines if "/libgomp" in line}
    return found.pop() if len(found) == 1 else None


def _sources(suffix: str) -> list[Path]:
    return sorted(Path(__file__).parent.glob(f"*{suffix}"))


def _programs(command: Iterable[str]) -> list[str]:
    """The programs that a command names, by their own names: a compiler, perhaps one that calls it."""
    return [os.path.realpath(found) for word in command if (found := shutil.which(word))]


def _key(command: list[str]) -> str:
    """Of everything that makes another library: sources, flags, compiler, and the processor's abilities."""
    digest = hashlib.sha256()
    for source in (*_sources(".cpp"), *_sources(".h")):
        digest.update(source.read_bytes())
    tools = [(name, os.stat(name).st_size, os.stat(name).st_mtime_ns) for name in _programs(command)]
    digest.update(repr((command, _options(command), tools)).encode())
    digest.update(_processor().encode())
    return digest.hexdigest()[:32]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
