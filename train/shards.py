"""What earlier processes of a run have left, in memory and in shards, whatever their number: read, and taken
away when it is not needed any more.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ..checkpoint import ShardedSnapshot, Snapshot, newest_sharded
from ..checkpoint.looking import dismiss, look
from ..checkpoint.memory import Memory
from ..checkpoint.sharded_reading import SHARDS, shard_folder, shard_folders
from ..checkpoint.snapshot_reading import newest_snapshot
from ..checkpoint.whole import step_of

ALONE = "alone"
"""Stands for the snapshot of a single process where a random name stands for one of several."""


class Shards:
    """Those under `run_dir`. warn: told of what cannot be used."""

    def __init__(self, run_dir: Path, warn: Callable[[str], None]) -> None:
        self._run_dir, self._warn = run_dir, warn
        self._opened: ShardedSnapshot | None = None
        self._memory: Memory | None = None

    def newest(self, only: str | None = None) -> ShardedSnapshot | None:
        """The newest whole snapshot of several processes. only: the one that the main process has chosen."""
        self._opened = newest_sharded(self._run_dir, self._warn, only=only)
        return self._opened

    def alone(self) -> Snapshot | None:
        """The newest that a single process has left in memory."""
        self._memory = look(self._run_dir, self._warn)
        return None if self._memory is None else newest_snapshot(self._memory, self._warn)

    def done(self) -> None:
        """What was to be read is read: let go of the memory."""
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.close()
        memory, self._memory = self._memory, None
        if memory is not None:
            memory.close()

    def forget(self, rank: int, ranks: int) -> None:
        """A fresh start of process `rank`, whose keeper has been told: what was written goes too."""
        _prune(shard_folder(self._run_dir, rank, ranks), None)
        if rank == 0:
            self.clear(but=ranks)

    def remove(self, rank: int, ranks: int) -> None:
        """The run has saved what it had, and the keeper of process `rank` has ended: nothing is left."""
        shutil.rmtree(shard_folder(self._run_dir, rank, ranks), ignore_errors=True)
        if rank == 0:
            self.clear(but=ranks)
        with suppress(OSError):  # it is not there, or the others are not done
            (self._run_dir / SHARDS).rmdir()

    def clear(self, *, but: int | None = None, before: int | None = None) -> None:
        """End the keepers that no process trains with, and delete the folders; for the main process alone.

        but: the number of processes whose folders stay, with what they hold. before: of these, what was
        written of earlier steps goes.
        """
        dismiss(self._run_dir)  # of a process alone; one that has a trainer stays
        for ranks, folders in shard_folders(self._run_dir).items():
            for folder in folders.values():
                if ranks == but:
                    if before is not None:
                        _prune(folder, before)
                else:
                    dismiss(folder)
                    shutil.rmtree(folder)


def _prune(folder: Path, before: int | None) -> None:
    for path in folder.glob("checkpoint-*"):
        step = step_of(path.name)
        if step is not None and (before is None or step < before) and not path.is_symlink():
            shutil.rmtree(path)
