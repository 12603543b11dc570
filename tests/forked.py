"""Real processes of Python from a server that has imported everything once: most of a start is imports.

`CONTEXT.Process` runs a function of a test; `Popen` and `run` take what `subprocess` takes: the interpreter
with `-m MODULE`, `-c CODE` or a script, and arguments. Each is a process of its own, forked from one that
has only imported (`preloaded.py`), with its own id, signals, exit code, environment and standard streams.
What is not the same as in a new interpreter: modules are there already, so an environment variable that a
library reads when it is imported comes too late, and a peak of memory counts from the server's.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shoestring.train.launch import STARTED_AT

TESTS = str(Path(__file__).parent)
_BEGAN = dict(os.environ)  # what a test sets before it starts the server is its own affair


class _Context(multiprocessing.context.ForkServerContext):
    """As the standard one, with a server that finds the modules of the tests (3.11's does not)."""

    def Process(self, *args: Any, **kwargs: Any) -> Any:
        _start_server()
        return super().Process(*args, **kwargs)


CONTEXT = _Context()
CONTEXT.set_forkserver_preload(["preloaded"])


def _start_server() -> None:
    """Once in each process of pytest; after that this does nothing."""
    now = dict(os.environ)
    try:
        os.environ.clear()
        os.environ.update({**_BEGAN, "PYTHONPATH": TESTS, "OMP_NUM_THREADS": "1"})
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(now)


class Popen:
    """A program in a process of its own. `output`: the file that both streams are added to; None: nowhere."""

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        output: Path | None = None,
        errors: Path | None = None,
    ) -> None:
        given = dict(os.environ if env is None else env)
        given.setdefault(STARTED_AT, repr(time.monotonic()))  # the server is older than the user's command
        words = [os.fspath(word) for word in command]
        streams = (str(output or os.devnull), str(errors or output or os.devnull))
        self.args = words
        self._process = CONTEXT.Process(target=become, args=(words, given, str(cwd or Path.cwd()), *streams))
        self._process.start()
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        code: int = self._process.exitcode
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def run(
    command: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 300.0,
    check: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Until it has ended, with what it wrote to each stream."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "output"), Path(folder, "errors")
        process = Popen(command, env=env, cwd=cwd, output=output, errors=errors)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        done = subprocess.CompletedProcess(process.args, code, output.read_text(), errors.read_text())
    if check:
        done.check_returncode()
    return done


def become(words: list[str], environment: dict[str, str], folder: str, output: str, errors: str) -> None:
    """In the new process: the program that `words` start, until it ends."""
    assert "preloaded" in sys.modules, "the server has not imported preloaded.py"
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    # as a program from a terminal has it; where pytest runs in the background, Ctrl-C is ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for path, number in ((output, 1), (errors, 2)):
        stream = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(stream, number)
        os.close(stream)
    interpreter, *given = words
    assert interpreter == sys.executable
    match given:
        case ["-m", module, *arguments]:
            sys.argv = [module, *arguments]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case ["-c", code, *arguments]:
            sys.argv = ["-c", *arguments]
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        case [script, *arguments]:
            sys.argv = [script, *arguments]
            runpy.run_path(script, run_name="__main__")
