"""Hostile files, made when a test runs: pickles that leave a trace, bombs, links and pipes, forged manifests.

Each case has a name, what it does to a sound file or directory, and words that the refusal must have.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import socket
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

SECONDS, BYTES = 3.0, 64 << 20  # what a refusal may take at most, traced: of the processor, of memory
DEEP = b"[" * 200_000


@dataclass(frozen=True)
class Evil:
    """One attack. make: changes the file or directory that it is given; says: words of the refusal."""

    name: str
    make: Callable[[Path], object]
    says: str

    def __str__(self) -> str:
        return self.name


@contextmanager
def bounded(seconds: float = SECONDS, peak: int = BYTES) -> Iterator[None]:
    """What is inside must be quick and small; what waits for ever ends no test at all."""
    tracemalloc.start()
    began = time.process_time()
    try:
        yield
        took, most = time.process_time() - began, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert took < seconds, f"{took:.1f} s"
    assert most < peak, f"{most:,} bytes"


class _Runs:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def payload(canary: Path) -> bytes:
    """A pickle that makes the directory `canary` when it is loaded."""
    return pickle.dumps(_Runs(canary))


def torch_payload(canary: Path, file: Path) -> None:
    """The same in torch's archive of a state dict."""
    import torch

    torch.save({"weight": _Runs(canary)}, file)


# Checkpoints


def reseal(checkpoint: Path, change: Callable[[dict[str, Any]], object] = lambda body: None) -> None:
    """Change the manifest as an attacker would: with its own checksum made right again."""
    body = json.loads((checkpoint / "MANIFEST.json").read_text())
    body.pop("sha256", None)
    change(body)
    text = json.dumps(body, indent=1).encode()
    seal(checkpoint, text)


def seal(checkpoint: Path, text: bytes) -> None:
    """`text` as the manifest, with the checksum that belongs to it."""
    text = text.removesuffix(b"\n}")
    end = b',\n "sha256": "' + hashlib.sha256(text).hexdigest().encode() + b'"\n}\n'
    (checkpoint / "MANIFEST.json").write_bytes(text + end)


def forged(checkpoint: Path, name: str, content: bytes) -> None:
    """Another content of a file, which the manifest vouches for."""
    (checkpoint / name).write_bytes(content)
    entry = {"bytes": len(content), "xxh3_128": xxhash.xxh3_128(content).hexdigest()}
    reseal(checkpoint, lambda body: body["files"].update({name: entry}))


def named(name: str) -> Evil:
    """A manifest that lists a file of that name."""
    return Evil(
        f"a name such as {name[:20]!r}",
        lambda folder: reseal(
            folder, lambda body: body["files"].update({name: {"bytes": 1, "xxh3_128": "0"}})
        ),
        "is not a name that a file in a checkpoint may have",
    )


def numbers(**values: Any) -> Callable[[Path], object]:
    """Other numbers in the manifest."""
    return lambda folder: reseal(folder, lambda body: body.update(values))


def spliced(old: bytes, new: bytes) -> Callable[[Path], object]:
    """A part of the manifest's text replaced, for what Python's JSON would not write."""

    def make(folder: Path) -> None:
        text = (folder / "MANIFEST.json").read_bytes()
        assert old in text
        seal(folder, text[: text.index(b',\n "sha256"')].replace(old, new))

    return make


NAMES = [
    "../checkpoint-000001/trainer.json",
    "/etc/passwd",
    "a/../../x",
    "nested/..",
    "a\0b",
    "x" * 300,
    "\N{RIGHT-TO-LEFT OVERRIDE}txt.exe",
    "\x9b31mred",  # begins a terminal's command in one character
    "\ud800",
    "a\N{LINE SEPARATOR}b",
    "MANIFEST.json",
    "C:/x",
    "..\\x",
]
MANIFESTS = [
    *map(named, NAMES),
    Evil("a size of 400 digits", lambda folder: resized(folder, 10**400), "is not a size and a checksum"),
    Evil("a size below zero", lambda folder: resized(folder, -1), "is not a size and a checksum"),
    Evil("a size that is no number", lambda folder: resized(folder, True), "is not a size and a checksum"),
    Evil("a size that does not match", lambda folder: resized(folder, 5), "5 were written"),
    Evil("a time of 400 digits", numbers(saved_at=10**400), "lacks step or saved_at"),
    Evil("a step of 400 digits", numbers(step=10**400), "lacks step"),
    Evil("a format of 400 digits", numbers(format=10**400), "has no format version"),
    Evil("format 0", numbers(format=0), "has no format version"),
    Evil(
        "a writer that colours the terminal", numbers(writer="\x1b[31m", format=2), "does not name its writer"
    ),
    Evil("a number without end", spliced(b'"step": 2', b'"step": ' + b"9" * 10_000_000), "is not valid JSON"),
    Evil("a number that overflows", spliced(b'"step": 2', b'"step": 2, "x": 1e999'), "is not valid JSON"),
    Evil("not-a-number", spliced(b'"step": 2', b'"step": 2, "x": NaN'), "is not valid JSON"),
    Evil("a key twice", spliced(b'"step": 2', b'"step": 2, "step": 2'), "a key appears twice"),
    Evil(
        "a float that is a list", spliced(b'"step": 2', b'"step": 2, "x": {"$float": []}'), "is not a float"
    ),
    Evil("nested without end", lambda folder: seal(folder, DEEP), "is not valid JSON"),
    Evil("100,000 files", lambda folder: reseal(folder, _many), "must list at most 10,000 files"),
]


def resized(folder: Path, size: Any) -> None:
    """Another size of trainer.json in the manifest."""
    reseal(folder, lambda body: body["files"]["trainer.json"].update(bytes=size))


def _many(body: dict[str, Any]) -> None:
    body["files"] |= {f"f{index}": {"bytes": 0, "xxh3_128": "0"} for index in range(100_000)}


def blob(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """The bytes of a safetensors file."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def spec(shape: list[Any], offsets: list[Any], dtype: Any = "F32") -> dict[str, Any]:
    """One tensor of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


ONE = json.dumps(spec([1], [0, 4])).encode()
TENSORS: dict[str, bytes] = {
    "a header longer than the file": blob({}, length=2**63 - 1),
    "a header of all that fits in eight bytes": blob({}, length=2**64 - 1),
    "overlapping tensors": blob({"a": spec([1], [0, 4]), "b": spec([1], [2, 6])}, bytes(6)),
    "a hole between tensors": blob({"a": spec([1], [0, 4]), "b": spec([1], [8, 12])}, bytes(12)),
    "bytes after the last tensor": blob({"a": spec([1], [0, 4])}, bytes(8)),
    "offsets below zero": blob({"a": spec([1], [-4, 0])}, bytes(4)),
    "offsets that run backwards": blob({"a": spec([1], [4, 0])}, bytes(4)),
    "offsets that overflow": blob({"a": spec([1], [2**63, 2**63 + 4])}, bytes(4)),
    "a size that overflows": blob({"a": spec([2**32, 2**32], [0, 0])}),
    "a size that overflows beside a zero": blob({"a": spec([0, 2**62, 2**62], [0, 0])}),
    "a dimension below zero": blob({"a": spec([-1], [0, 4])}, bytes(4)),
    "a dimension that is a text": blob({"a": spec(["1"], [0, 4])}, bytes(4)),
    "an unknown type": blob({"a": spec([1], [0, 4], "PICKLE")}, bytes(4)),
    "a type that is no word": blob({"a": spec([1], [0, 4], ["F32"])}, bytes(4)),
    "a type that nothing of ours has": blob({"a": spec([4], [0, 4], "F8_E8M0")}, bytes(4)),
    "a tensor twice": blob(b'{"a":' + ONE + b',"a":' + ONE + b"}", bytes(4)),
    "a header that is a list": blob([]),
    "a header nested without end": blob(DEEP),
    "notes nested without end": blob(b'{"__metadata__":' + DEEP + b"}"),
    "a number without end": blob(b'{"a":{"dtype":"F32","shape":[' + b"9" * 1_000_000 + b"]}}"),
}

WRONG_JSON: dict[str, bytes] = {
    "nested without end": DEEP,
    "an object nested without end": b'{"a":' * 200_000,
    "a number without end": b'{"step": ' + b"9" * 10_000_000 + b"}",
    "a number that overflows": b'{"step": -1e999}',
    "a key twice": b'{"step": 1, "step": 2}',
    "not-a-number": b'{"step": NaN}',
    "a float that is none": b'{"step": {"$float": {}}}',
    "text that is not UTF-8": b'{"step": "\xff"}',
    "nothing": b"",
}

# In place of a file


def pipe(path: Path) -> None:
    """A named pipe without a writer: reading it waits for ever."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def endless(path: Path) -> None:
    """A link to a device without an end."""
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def listener(path: Path) -> None:
    """A socket. Bound by a short name: the system allows about 100 characters."""
    path.unlink(missing_ok=True)
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def link_to(target: Path) -> Callable[[Path], None]:
    """A symbolic link to something else."""

    def make(path: Path) -> None:
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    return make


def state_of(folder: Path) -> dict[str, Any]:
    """Everything in a folder: (kind, permissions, content), to see whether anything was touched."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        facts = path.lstat()
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(folder))] = (facts.st_mode, facts.st_mtime_ns, content)
    return found
