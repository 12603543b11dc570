"""C++ for the CPU, where PyTorch has no operation for what an optimizer's step does in one pass.

The sources in this folder become one library with a plain C interface, compiled for this very processor by
the machine's own compiler when it is first wanted (some seconds, once) and kept in the user's cache. No
headers of PyTorch, nothing to install: where there is no compiler, PyTorch's own operations do the work.
ctypes releases Python's lock while a function runs.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterable
from functools import cache
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


def missing() -> str | None:
    """Why there is no library, in a few words; None where there is one. Compiles it when first asked."""
    return _built()[1]


def library() -> ctypes.CDLL:
    """The compiled library. Raises RuntimeError where `missing` says why there is none."""
    found, reason = _built()
    if found is None:
        raise RuntimeError(f"the C++ operations are not available: {reason}")
    return found


@cache
def _built() -> tuple[ctypes.CDLL | None, str | None]:
    compiler = _compiler()
    if compiler is None:
        return None, "there is no C++ compiler (c++, g++ or clang++; or name one in CXX)"
    try:
        path = _compiled(compiler)
        return ctypes.CDLL(str(path)), None
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line] or ["no message"]
        return None, f"{compiler} could not compile them: {lines[0].strip()}"
    except OSError as error:
        return None, f"the compiled library could not be written or loaded: {error}"


def _compiler() -> str | None:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, names)), None)


def _compiled(compiler: str) -> Path:
    folder = Path(__file__).parent
    sources = sorted(folder.glob("*.cpp"))
    runtime = None if "clang" in os.path.realpath(compiler) else _openmp()  # clang's calls another runtime
    flags = (*_FLAGS, "-fopenmp") if runtime else _FLAGS
    kept = _folder()
    path = kept / f"{_key(compiler, (*sources, *folder.glob('*.h')), flags, runtime)}.so"
    if not path.exists():
        # Beside it and renamed: two processes may build at once, and neither loads half a file.
        with tempfile.TemporaryDirectory(dir=kept) as aside:
            _run([compiler, *flags, "-c", *map(str, sources)], aside)
            objects = [f"{source.stem}.o" for source in sources]
            # Without -fopenmp here: it would bring the compiler's own runtime beside PyTorch's.
            linked = [*objects, runtime] if runtime else objects
            _run([compiler, "-shared", "-pthread", *linked, "-o", "it.so"], aside)
            (Path(aside) / "it.so").replace(path)
    return path


def _run(command: list[str], folder: str) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)


def _openmp() -> str | None:
    """The GNU OpenMP runtime that PyTorch has loaded, whose threads are then ours too."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    found = {line.split(maxsplit=5)[5] for line in lines if "/libgomp" in line}
    return found.pop() if len(found) == 1 else None


def _key(compiler: str, sources: Iterable[Path], flags: tuple[str, ...], runtime: str | None) -> str:
    """Of everything that makes another library: sources, flags, compiler, and the processor's abilities."""
    digest = hashlib.sha256()
    for source in sorted(sources):
        digest.update(source.read_bytes())
    tool = os.stat(compiler)
    made_by = (flags, runtime, os.path.realpath(compiler), tool.st_size, tool.st_mtime_ns)
    digest.update(repr(made_by).encode())
    digest.update(_processor().encode())
    return digest.hexdigest()[:32]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def _folder() -> Path:
    """A folder that only this user writes to: what lies in it is run."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(home) / "shoestring" / "native"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        ours = status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if ours and os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass  # a read-only home: for this process alone
    return Path(tempfile.mkdtemp(prefix="shoestring-native-"))
