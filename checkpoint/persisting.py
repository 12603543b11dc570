"""From a slot in memory to an ordinary checkpoint directory, as store.py writes them, without torch.

A file that could not be written or fsynced is never tried again: its directory is given up, and a later try
writes new files.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from .. import __version__
from .aside import aside, publish
from .errors import BrokenCheckpoint, format_bytes
from .files import FileFacts, sync_directory, write_file
from .manifest import MANIFEST, Manifest, encode
from .memory import Memory
from .slots import CONSTANT, Header, Slot, chunks
from .whole import candidates, name_of, verify_files

_MARGIN = 1 << 20  # bytes for directories, the manifest and the file system's own


class Stopped(Exception):
    """The keeper is told to end: what is half written is removed."""


class Persister:
    """Writes the newest snapshot to `folder`, one at a time, in a thread.

    `persisted`: generation and step of the last one that is on the disk. `failure`: why the last try failed,
    "" after one that did not. `busy`: one is being written. `wake` is called, from the thread, when a try
    ends; `say` gets lines.
    """

    def __init__(self, folder: Path, say: Callable[[str], None], wake: Callable[[], None]) -> None:
        self.folder = folder
        self.persisted: tuple[int, int] = (0, -1)
        self.failure = ""
        self._say, self._wake = say, wake
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.busy = False

    def start(self, memory: Memory, rate: float, *, look: bool) -> None:
        """Begin, unless one is being written. rate: bytes a second at most, 0 for no cap.

        look: compare with what is on the disk even when the newest has been written before.
        """
        if not self.busy:
            self.busy = True
            self._thread = threading.Thread(target=self._work, args=(memory, rate, look), name="persist")
            self._thread.start()

    def stop(self, seconds: float) -> bool:
        """End what is being written; False when it does not within `seconds` (a disk that hangs)."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(seconds)
        self._stop.clear()
        return not self.busy

    def _work(self, memory: Memory, rate: float, look: bool) -> None:
        try:
            for header in memory.headers():
                if not look and header.generation == self.persisted[0]:
                    break
                if self._one(memory, header, rate):
                    break
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            self.failure = f"{self.folder}: {error.strerror or error}{where}"
            self._say(f"the snapshot in memory could not be written to the disk: {self.failure}")
        except Stopped:
            pass
        finally:
            self.busy = False
            self._wake()

    def _one(self, memory: Memory, header: Header, rate: float) -> bool:
        """Whether this slot is on the disk now, or need not be."""
        if not memory.lock(header.index, exclusive=False):
            return False  # being written by the trainer, so no longer what its header said
        try:
            slot, constant = memory.tables(header.index)
            step = slot.header.step
            if not self._is_there(step):
                path = write_slot(memory.fd, slot, constant, self.folder, rate=rate, stop=self._stop)
                self._say(f"{path.name} written from memory")
            self.persisted, self.failure = (slot.header.generation, step), ""
            return True
        except BrokenCheckpoint as error:
            self._say(f"the snapshot of step {header.step} in memory is skipped: {error}")
            return False
        finally:
            memory.unlock(header.index)

    def _is_there(self, step: int) -> bool:
        """Whether the disk has a whole checkpoint of this step or a later one."""
        for found, path in candidates(self.folder):
            if found < step:
                return False
            try:
                verify_files(path)
            except (BrokenCheckpoint, FileNotFoundError):
                continue
            return True
        return False


def write_slot(
    fd: int,
    slot: Slot,
    constant: Slot | None,
    folder: Path,
    *,
    rate: float = 0.0,
    stop: threading.Event | None = None,
) -> Path:
    """Write the files of a slot as folder/checkpoint-<step>, durably; every chunk is verified on the way.

    rate: bytes a second at most, 0 for no cap. Raises OSError (ENOSPC before anything is written when there
    is no room), BrokenCheckpoint for damaged memory, Stopped; then nothing is left in `folder`.
    """
    parts = [part for part in (constant, slot) if part is not None]
    needed = sum(extent.bytes for part in parts for extent in part.files.values())
    free = shutil.disk_usage(folder).free
    if free < needed + _MARGIN:
        room = f"No space left on device: {format_bytes(needed)} needed, {format_bytes(free)} free"
        raise OSError(errno.ENOSPC, room)
    pace = _Pace(rate, stop or threading.Event())
    with aside(folder) as private:
        new = private / "new"
        os.mkdir(new, 0o700)
        files: dict[str, FileFacts] = {}
        for part in parts:
            for name, extent in part.files.items():
                data = chunks(fd, part, extent.offset, extent.offset + extent.bytes)
                files[name] = write_file(new / name, pace.through(data))
                if part.header.index == CONSTANT and files[name].xxh3_128 != extent.xxh3_128:
                    raise BrokenCheckpoint(f"{name} is not the constant part that was stored")
        manifest = Manifest(slot.header.step, f"shoestring {__version__}", time.time(), files)
        write_file(new / MANIFEST, [encode(manifest)])
        sync_directory(new)
        final = folder / name_of(slot.header.step)
        publish(private, new, final)
    return final


class _Pace:
    """Lets bytes through at no more than `rate` a second, counted from its start."""

    def __init__(self, rate: float, stop: threading.Event) -> None:
        self._rate, self._stop = rate, stop
        self._began, self._passed = time.monotonic(), 0

    def through(self, data: Iterator[memoryview]) -> Iterator[memoryview]:
        for piece in data:
            due = self._passed / self._rate if self._rate else 0.0
            if self._stop.wait(max(0.0, self._began + due - time.monotonic())):
                raise Stopped
            yield piece
            self._passed += len(piece)
