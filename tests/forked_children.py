"""A command of ours whose own processes are forked from it: a sweep's trials and plans, a launch's ranks.

Each stays a process of its own with the command, environment, group and log that it is given; what is saved
is the imports. `python -c "import forked_children; forked_children.main()" VERB ...` is the command line.
That the real starts work, too, is for tests with short programs, and for the ranks of test_clock_real.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked

COMMAND = "import forked_children; forked_children.main()"
_FORK = multiprocessing.get_context("fork")


class Popen:
    """What `sweep_process.trainer` and `launch` use of `subprocess.Popen`."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        stdout: Any = None,
        preexec_fn: Callable[[], None] | None = None,
        **given: int,
    ) -> None:
        if stdout is not None:
            assert given.pop("stderr") == subprocess.STDOUT
            assert given.pop("stdin") == subprocess.DEVNULL
        alone = given.pop("process_group", None) == 0
        assert not given
        names = (stdout.name, stdout.name) if stdout else ("/dev/fd/1", "/dev/fd/2")
        arguments = (list(command), dict(env), *names, alone, preexec_fn)
        self._process = _FORK.Process(target=_begin, args=arguments)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> None:
        self._process.join()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()


def run(command: Sequence[str], *, env: Mapping[str, str], **given: Any) -> subprocess.CompletedProcess[str]:
    """What `sweep_process.make_plan` uses of `subprocess.run`."""
    assert given["capture_output"]
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "output"), Path(folder, "errors")
        given = (list(command), dict(env), str(output), str(errors), True, None)
        process = _FORK.Process(target=_begin, args=given)
        process.start()
        process.join()
        texts = (output.read_text(), errors.read_text())
    return subprocess.CompletedProcess(list(command), process.exitcode, *texts)


def _begin(
    words: list[str],
    environment: dict[str, str],
    output: str,
    errors: str,
    alone: bool,
    first: Callable[[], None] | None,
) -> None:
    """In the new process, as `subprocess` begins one."""
    if alone:
        os.setpgid(0, 0)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)  # the parent's own handlers are not the child's
    if first:
        first()
    forked.become(words, environment, os.getcwd(), output, errors)


def main() -> None:
    """The command line, with children that are forked."""
    from shoestring.train import cli, launch, sweep_process

    names = ("DEVNULL", "STDOUT", "CompletedProcess")
    kept = {name: getattr(subprocess, name) for name in names}
    for module in (launch, sweep_process):
        module.subprocess = SimpleNamespace(Popen=Popen, run=run, **kept)
    cli.main()
