"""The processes of a sweep: one trial's leg, or its plan, as a person would have typed it."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..recipes.errors import BudgetError, ShoestringError, UserError
from .launch import STARTED_AT
from .signals import StopRequest

TRAIN = (sys.executable, "-m", "shoestring.train")
PLAN = (sys.executable, "-c", "from shoestring.train.cli import main; main()", "plan")
LOG = "log.txt"
_POLL = 0.05
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Task:
    """A leg to run: the arguments of `shoestring train`, and the run directory that they name."""

    name: str
    folder: Path
    arguments: list[str]


@dataclass(frozen=True)
class Outcome:
    """How it ended: the exit code (minus the signal's number for a death by one) and the seconds it took."""

    code: int
    seconds: float


Runner = Callable[[Task], Outcome]


def trainer(stop: StopRequest, command: Sequence[str] = TRAIN) -> Runner:
    """A Runner that starts `command` with the task's arguments, output to log.txt, and passes on a stop."""

    def run(task: Task) -> Outcome:
        task.folder.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        with open(task.folder / LOG, "a", encoding="utf-8") as log:
            log.write(f"$ shoestring train {' '.join(task.arguments)}\n")
            log.flush()
            process = subprocess.Popen(
                [*command, *task.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {STARTED_AT: repr(began)},  # its budget counts from here, not from our start
                process_group=0,  # a Ctrl-C in the terminal comes once, from here
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
            code = _wait(process, stop)
        return Outcome(code, time.monotonic() - began)

    return run


def make_plan(arguments: Sequence[str], command: Sequence[str] = PLAN) -> tuple[dict[str, Any], float]:
    """The plan of a trial as plain values, and the seconds its process took.

    Raises the error that the process ended with: UserError, BudgetError, or ShoestringError.
    """
    began = time.monotonic()
    done = subprocess.run(
        [*command, *arguments, "--json"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {STARTED_AT: repr(began)},
        process_group=0,
    )
    seconds = time.monotonic() - began
    if done.returncode != 0:
        kind = {2: UserError, 3: BudgetError}.get(done.returncode, ShoestringError)
        text = done.stderr.strip() or f"shoestring plan ended with code {done.returncode}"
        raise kind(text)
    values: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    return values, seconds


def wait_until_free(folder: Path, say: Callable[[str], None], stop: StopRequest) -> None:
    """Until no process trains into the run directory: one may be left of a sweep that was killed."""
    path, told = folder / ".lock", False
    while path.exists() and not stop():
        with open(path, encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if not told:
                    say(f"{folder.name} is still trained by process {lock.read().strip()}: waiting for it")
                    told = True
        time.sleep(_POLL)


def last_lines(folder: Path, most: int = 8) -> list[str]:
    """The end of a trial's log: what its last process said last."""
    try:
        text = (folder / LOG).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    own = text.rpartition("$ shoestring train ")[2].splitlines()[1:]
    return [line.rstrip() for line in own if line.strip()][-most:]


def _wait(process: subprocess.Popen[bytes], stop: StopRequest) -> int:
    told = False
    try:
        while process.poll() is None:
            if stop() and not told:
                process.send_signal(stop.signal_number or signal.SIGTERM)
                told = True
            time.sleep(_POLL)
    except BaseException:  # a second Ctrl-C: it does not wait for a checkpoint, nor leaves a process behind
        process.kill()
        process.wait()
        raise
    return process.returncode


def _end_with_parent() -> None:
    """In the child, before it becomes the trainer: when this sweep is killed, it saves and ends, too."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
