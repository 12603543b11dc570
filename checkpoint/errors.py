"""What can be wrong with a checkpoint, and how a disk's refusal is told to a person.

The errors for people are imported where they are made: the keeper (keeper.py) needs the rest of this file,
and the room that they come from brings pydantic.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..recipes.errors import ShoestringError, UserError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_FAILING = {errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV, errno.EREMOTEIO, errno.EFBIG}


class BrokenCheckpoint(Exception):
    """A checkpoint that must not be used. The text names the file and what is wrong with it."""


class NewerFormat(BrokenCheckpoint):
    """A checkpoint of a later version of the format: whole as far as we know, but not ours to judge."""


def format_bytes(count: int) -> str:
    """`1_610_000_000` -> `1.61 GB`, decimal units as disks are sold."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"


def no_room(folder: Path, step: int, *, needed: int) -> UserError:
    """The error for a checkpoint of at least `needed` bytes that does not fit on the disk of `folder`."""
    from ..recipes.errors import UserError

    free = shutil.disk_usage(folder).free
    room = f"{format_bytes(free)} is free on this disk"
    if needed <= free:
        room += ", but the system reports it full (a quota, no inodes left, or another writer)"
    return UserError(
        f"{folder}: the checkpoint of step {step} needs at least {format_bytes(needed)}; {room}.\n"
        "Nothing was deleted: all older checkpoints are as they were.\n"
        "Free some space, keep fewer (checkpoint.keep=1), or write elsewhere (output_dir=/other/disk/run);\n"
        "then give the same command again: it resumes from the newest checkpoint."
    )


def explain(error: Exception, folder: Path, step: int, *, needed: int) -> ShoestringError | None:
    """`error`, met while saving, as a message for a person; None when it is no affair of the disk."""
    from ..recipes.errors import ShoestringError, UserError

    # safetensors, which PEFT and transformers write with, reports the system's error as text, not as an
    # OSError.
    if "No space left on device" in str(error) or "Disk quota exceeded" in str(error):
        return no_room(folder, step, needed=needed)
    if not isinstance(error, OSError):
        return None
    if error.errno in _FULL:
        return no_room(folder, step, needed=needed)
    reason = error.strerror or str(error)
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in _FORBIDDEN:
        return UserError(
            f"{folder}: the checkpoint of step {step} cannot be written: {reason}{where}.\n"
            "Change the permissions of that directory, or set output_dir=another/folder."
        )
    if error.errno in _FAILING:
        return ShoestringError(
            f"{folder}: the disk failed while the checkpoint of step {step} was written: {reason}{where}.\n"
            "That checkpoint is given up; all older ones are as they were. Check the disk (see dmesg);\n"
            "then give the same command again: it resumes from the newest whole checkpoint."
        )
    return None


@contextmanager
def housekeeping(folder: Path, failure: str) -> Iterator[None]:
    """Tell an OSError of the work around the checkpoints: no data are at stake, only names and space."""
    from ..recipes.errors import ShoestringError, UserError

    try:
        yield
    except OSError as error:
        kind = UserError if error.errno in _FULL | _FORBIDDEN else ShoestringError
        raise kind(
            f"{folder}: {failure}: {error.strerror or error}.\n"
            "All checkpoints there are as they were: the same command resumes from the newest."
        ) from error
