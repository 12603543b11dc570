"""Which directories are checkpoints, and whether every byte is as written: judged without knowing a tensor.

Apart from reading.py because the keeper, which imports no torch, asks the same questions.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from .errors import BrokenCheckpoint
from .files import hash_inside
from .manifest import Manifest, read_manifest

_NAME = re.compile(r"checkpoint-(\d{6,18})")


def step_of(name: str) -> int | None:
    """`checkpoint-001200` -> 1200; None for any other name."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match and name == name_of(int(match[1])) else None


def name_of(step: int) -> str:
    """1200 -> `checkpoint-001200`."""
    return f"checkpoint-{step:06d}"


def candidates(folder: Path) -> Iterator[tuple[int, Path]]:
    """(step, path) of all in `folder` that is named like a checkpoint, highest step first. Not verified."""
    found = [(step, path) for path in folder.iterdir() if (step := step_of(path.name)) is not None]
    yield from sorted(found, reverse=True)


def verify_files(path: Path) -> Manifest:
    """Read every byte of the checkpoint at `path`. BrokenCheckpoint names the file and what is wrong."""
    step = step_of(path.name)
    if step is None:
        raise BrokenCheckpoint("is not named like a checkpoint (checkpoint-001200)")
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        raise BrokenCheckpoint("is a link or a file, not a directory")
    manifest = read_manifest(path)
    if manifest.step != step:
        raise BrokenCheckpoint(f"holds step {manifest.step}, not the step of its name")
    for name, expected in manifest.files.items():
        if hash_inside(path, name, size=expected.bytes) != expected:
            raise BrokenCheckpoint(f"{name} is damaged: its checksum is not the one that was written")
    return manifest
