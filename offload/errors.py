"""The error of this room: the disk behind the training state failed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from ..recipes.errors import ShoestringError


class OffloadError(ShoestringError):
    """The disk failed under a scratch file: what was tried, where, the system's answer, what to do."""


def disk_error(verb: str, path: Path, offset: int, nbytes: int, number: int) -> OffloadError:
    """The message for errno `number` from `verb` ("read", "write", ...) of nbytes at offset of path."""
    name = errno.errorcode.get(number, str(number))
    return OffloadError(
        f"offload.disk_path  cannot {verb} {nbytes:,} bytes at {offset:,} of {path}: "
        f"{os.strerror(number)} ({name}).\n"
        f"                   {_advice(number)}"
    )


def end_of_file(path: Path, offset: int, nbytes: int) -> OffloadError:
    """The message for a file that ends at `offset` although nbytes more were stored there."""
    return OffloadError(
        f"offload.disk_path  {path} ends at {offset:,}, {nbytes:,} bytes too early: cut while in use.\n"
        "                   Leave the folder to the run alone and start the run again: it goes on from its "
        "last checkpoint."
    )


def damaged(path: Path, offset: int, reason: str) -> OffloadError:
    """The message for bytes at `offset` of path that are not those that were written."""
    return OffloadError(
        f"offload.disk_path  {path} holds other bytes at {offset:,} than were written: {reason}.\n"
        f"                   {_advice(errno.EIO)}"
    )


def _advice(number: int) -> str:
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "Free space there, or choose another disk: offload.disk_path=PATH"
    if number == errno.EFBIG:
        return (
            "Files may not grow so large here: `ulimit -f unlimited`, or another disk: offload.disk_path=PATH"
        )
    if number == errno.EINVAL:
        return "The file system refuses this transfer; choose a local disk: offload.disk_path=PATH"
    return (
        "Look at the disk (`dmesg | tail`), then start the run again: it goes on from its last checkpoint; "
        "or choose another disk: offload.disk_path=PATH"
    )
