"""The folder each bad input starts from, ways to break it, and the command line run in it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import forked
import tiny

RECIPE = """\
model: {model_name_or_path: model, dtype: float32}
data: {train: chats.jsonl, eval: 0.1}
budget: {steps: 4}
adapter: {name: lora, r: 4}
optimizer: {name: adamw, learning_rate: 1.0e-2}
train: {batch_tokens: 128}
eval: {samples: 0}
checkpoint: {every: 2, keep_best: false, in_memory: false}
output_dir: run
"""
PAIR = {"prompt": "a bee has", "completion": "five eyes"}
EXPECTED_LINES = 6


@dataclass(frozen=True)
class Case:
    """One mistake: how to make it in a sound folder, what is typed there, and what must come back."""

    name: str
    code: int
    says: str
    argv: tuple[str, ...] = ("train", "recipe.yaml")
    make: Callable[[Path], object] = lambda folder: None
    around: Callable[[Path], AbstractContextManager[Any]] = lambda folder: contextlib.nullcontext()
    environment: dict[str, str] = field(default_factory=dict)
    process: bool = False  # a real one; the others run in this process, which saves seconds of imports
    longer: int = EXPECTED_LINES  # most lines of the message


@dataclass(frozen=True)
class Outcome:
    """Exit code, and what the command line said: the errors, or on success all of it."""

    code: int
    message: str


def sound_folder(folder: Path, stock: Path) -> Path:
    """A small recipe that works, its model and its data; `stock` keeps what is made once."""
    if not (stock / "model").exists():
        tiny.model_folder(stock / "model")
        tiny.chats(stock / "chats.jsonl")
    folder.mkdir()
    shutil.copytree(stock / "model", folder / "model")
    shutil.copy(stock / "chats.jsonl", folder)
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return folder


def run_case(case: Case, folder: Path) -> Outcome:
    """Make the mistake in a sound folder and type its command there."""
    with contextlib.chdir(folder), _environment(folder, {}):
        case.make(folder)
    with contextlib.chdir(folder), _environment(folder, case.environment), case.around(folder):
        said = (_process if case.process else _here)(list(case.argv), folder)
    text = said.message.replace(f"{folder}/", "").replace(str(folder), "FOLDER")
    return Outcome(said.code, re.sub(r"/\S*site-packages", "SITE-PACKAGES", text).strip())


def _environment(folder: Path, given: dict[str, str]) -> Any:
    base = {
        "XDG_CACHE_HOME": str(folder / "cache"),
        "SHOESTRING_STARTED_AT": str(time.monotonic()),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "110",
        "NO_COLOR": "1",
    }
    return mock.patch.dict(os.environ, base | given)


def _process(argv: list[str], folder: Path) -> Outcome:
    command = [sys.executable, "-c", "from shoestring.train.cli import main; main()", *argv]
    if argv[0] == "train":
        command = [sys.executable, "-m", "shoestring.train", *argv[1:]]
    if "HF_HUB_OFFLINE" in os.environ:  # read when the library is imported
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    else:
        done = forked.run(command, cwd=folder, timeout=240)
    return Outcome(done.returncode, done.stderr if done.returncode else done.stdout)


def _here(argv: list[str], folder: Path) -> Outcome:
    from shoestring.train.cli import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["shoestring", *argv]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(bool(end.code))
        except Exception:
            traceback.print_exc()  # what the interpreter would have done
            code = 1
    return Outcome(code, err.getvalue() if code else out.getvalue())


# What `make` and `around` are built from.


def recipe(text: str | bytes, name: str = "recipe.yaml") -> Callable[[Path], object]:
    """A whole recipe in place of the sound one."""
    raw = text.encode() if isinstance(text, str) else text
    return lambda folder: (folder / name).write_bytes(raw)


def line(old: str, new: str) -> Callable[[Path], object]:
    """The sound recipe with one line replaced."""
    assert old in RECIPE
    return recipe(RECIPE.replace(old, new))


def file(name: str, text: str | bytes) -> Callable[[Path], object]:
    """A file beside the recipe."""
    raw = text.encode() if isinstance(text, str) else text
    return lambda folder: (folder / name).write_bytes(raw)


def rows(*values: object, name: str = "chats.jsonl") -> Callable[[Path], object]:
    """JSON lines in place of the sound ones."""
    return file(name, "".join(json.dumps(value) + "\n" for value in values))


def config(**keys: object) -> Callable[[Path], object]:
    """The model's config.json with other values; None takes a key out."""

    def change(folder: Path) -> None:
        path = folder / "model/config.json"
        values = {**json.loads(path.read_text()), **keys}
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return change


def cut(pattern: str, share: float = 0.5) -> Callable[[Path], object]:
    """The first file that matches loses its end."""

    def change(folder: Path) -> None:
        path = min(folder.glob(pattern))
        os.truncate(path, int(path.stat().st_size * share))

    return change


def finished(then: Callable[[Path], object] = lambda folder: None) -> Callable[[Path], object]:
    """A run that landed after 4 steps with checkpoints of step 2 and 4; kept in the stock, then copied."""

    def change(folder: Path) -> None:
        kept = folder.parent / "stock/run"
        if not kept.exists():
            said = _here(["train", "recipe.yaml"], folder)
            assert said.code == 0, said.message
            shutil.copytree(folder / "run", kept, symlinks=True)
        else:
            shutil.copytree(kept, folder / "run", symlinks=True)
        then(folder)

    return change


def unfinished(then: Callable[[Path], object] = lambda folder: None) -> Callable[[Path], object]:
    """The same run, killed before its last files were written."""

    def change(folder: Path) -> None:
        (folder / "run/summary.json").unlink()
        then(folder)

    return finished(change)


def each(*changes: Callable[[Path], object]) -> Callable[[Path], object]:
    """Several mistakes after each other."""

    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Another process trains into `run`."""
    (folder / "run").mkdir(exist_ok=True)
    holder = (
        "import fcntl, os, sys; f = open('run/.lock', 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
        "f.write('4711\\n'); f.flush(); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-S", "-c", holder]
    with subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        yield
        other.communicate()


@contextlib.contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """The disk is full once the second checkpoint is being written; the first must survive untouched."""
    real, first = os.write, folder / "run/checkpoint-000002"

    def write(descriptor: int, data: Any) -> int:
        if first.exists() and "/.aside-" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, os.strerror(28))
        return real(descriptor, data)

    with mock.patch("os.write", write):
        yield
    assert (first / "MANIFEST.json").is_file()


@contextlib.contextmanager
def without_energy_counters(folder: Path) -> Iterator[None]:
    """A machine that cannot measure energy, whatever this one can."""
    with (
        mock.patch("shoestring.train.building.energy_counters", return_value=[]),
        mock.patch("shoestring.plan.machine._watts_source", return_value=None),
    ):
        yield
