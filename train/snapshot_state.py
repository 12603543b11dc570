"""Snapshots of a run whose optimizer state is on disk: the state stays there, the snapshot says where.

What holds for all snapshots is in snapshots.py; here is what the scratch file adds. It outlives its process
as long as the keeper has a snapshot that names it, or a checkpoint does that the keeper wrote of one. The
next process takes it over, reads it into a file of its own, and deletes both when a snapshot of its own is
published.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import Checkpoint, Snapshot
from ..offload import OffloadedOptimizer, Stored
from ..offload.errors import OffloadError
from ..offload.frozen_reading import FrozenState, open_frozen
from ..offload.scratch import sweep
from ..offload.shadow import Shadow

NAME = "scratch"
"""Of the text in a snapshot that says where the state is."""


class SnapshotState:
    """run_dir: of the run. folder: of its scratch files. warn: told of a snapshot whose state is lost."""

    def __init__(self, run_dir: Path, folder: Path, warn: Callable[[str], None]) -> None:
        self._run_dir, self._folder, self._warn = run_dir, folder, warn
        self._shadow: Shadow | None = None
        self._adopted: FrozenState | None = None
        self.is_frozen = False
        """Whether a snapshot was begun that something here waits for."""

    def open(self, saved: Checkpoint | Snapshot) -> Checkpoint | Snapshot | None:
        """What was saved, with its state. None: what lies on the disk is not the state of that step.

        A checkpoint of which that is said is deleted: it will never be whole again.
        """
        if f"{NAME}.json" not in (saved.files if isinstance(saved, Snapshot) else saved.manifest.files):
            return saved
        try:
            self._adopted = open_frozen(saved.json(NAME))
        except OffloadError as error:
            self._warn(f"{saved.name} is skipped: {error}")
            if isinstance(saved, Checkpoint):
                shutil.rmtree(saved.path)
            return None
        return _WithState(saved, self._adopted.tensors)

    def sweep(self) -> None:
        """Delete what earlier processes of this run have left, but for what `open` has opened."""
        adopted = None if self._adopted is None else self._adopted.scratch.path
        if self._folder.is_dir() and not self._folder.is_symlink():
            sweep(self._folder, run=self._run_dir, but=adopted)
        if adopted is None:
            for text in self._run_dir.glob(f"checkpoint-*/{NAME}.json"):
                with suppress(FileNotFoundError):  # several processes start at once
                    shutil.rmtree(text.parent)

    def freeze(
        self, optimizer: torch.optim.Optimizer, tensors: dict[str, Any], json: dict[str, Any], keeper: int
    ) -> None:
        """Replace the state among the parts of a snapshot by where it lies, if it is on disk.

        keeper: process that will hold the snapshot. OffloadError: there is no room, or the disk failed.
        """
        if not isinstance(optimizer, OffloadedOptimizer):
            self.is_frozen = self._adopted is not None  # it has moved into memory
            return
        if optimizer.shadow is None:
            raise OffloadError("the optimizer's state is elsewhere, and was not made for snapshots")
        self._shadow = optimizer.shadow
        self._shadow.keep(self._run_dir, keeper)
        try:
            frozen = self._shadow.freeze(tensors["optimizer"])
        except OffloadError:
            if self._adopted is None:
                raise
            self._drop_adopted()  # its room may be what is missing
            frozen = self._shadow.freeze(tensors["optimizer"])
        tensors["optimizer"], tensors[NAME], json[NAME] = frozen
        self.is_frozen = True

    def release(self) -> None:
        """The snapshot is published."""
        if self._shadow is not None:
            self._shadow.release()
        self.is_frozen = False
        self._drop_adopted()

    def thaw(self) -> None:
        """It will not be."""
        if self._shadow is not None:
            self._shadow.thaw()
        self.is_frozen = False

    def drop(self) -> None:
        """The run has saved what it had: all files go."""
        self._drop_adopted()
        if self._shadow is not None:
            self._shadow.drop()
            self._shadow = None

    def _drop_adopted(self) -> None:
        adopted, self._adopted = self._adopted, None
        if adopted is not None:
            adopted.close()
            adopted.scratch.drop()
            self.sweep()


class _WithState(Snapshot):
    """`held`, with the state of its optimizer that lies in a scratch file.

    Of a checkpoint too it is no checkpoint: it is not whole on the disk for as long as there is a use for it.
    """

    def __init__(self, held: Checkpoint | Snapshot, state: Mapping[str, Stored]) -> None:
        self.step = held.step
        self._held, self._state = held, state

    @property
    def name(self) -> str:
        """See Snapshot."""
        return self._held.name

    def json(self, name: str) -> Any:
        """See Snapshot."""
        return self._held.json(name)

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """See Snapshot; without the state on disk."""
        return self._held.tensors(name)

    def open_tensors(self, name: str) -> dict[str, Any]:
        """See Snapshot. Those of the optimizer may be read until a snapshot of this process is published."""
        held = self._held.open_tensors(name)
        return {**held, **self._state} if name == "optimizer" else {**held}
