"""Snapshots where one process holds the whole state."""

from __future__ import annotations

from ..adapters import adapter_config
from ..checkpoint import Snapshotter, random_state
from .parts import Run
from .saving import trainer_state
from .shards import Shards
from .snapshot_state import SnapshotState


class WholeTaker:
    """`Taker` of a process alone. state: of its optimizer, where it is on disk; shards: what earlier
    processes have left.
    """

    def __init__(self, snapshotter: Snapshotter, state: SnapshotState, shards: Shards) -> None:
        self._snapshotter, self._state, self._shards = snapshotter, state, shards
        self._tidy = False

    @property
    def waited_seconds(self) -> float:
        """See Taker."""
        return self._snapshotter.waited_seconds

    @property
    def copy_seconds(self) -> float:
        """See Taker."""
        return self._snapshotter.copy_seconds

    def take(self, run: Run) -> None:
        """See Taker."""
        self._shards.done()
        tensors, settings = run.engine.state_dict()
        reference = run.stage.objective.reference
        if reference is not None:
            tensors["reference"] = reference.state_dict()
        json = {"trainer": trainer_state(run), "random": [random_state()], **settings}
        config = adapter_config(run.engine.loss_module.model)
        if config is not None:
            json["adapter_config"] = config
        self._state.freeze(run.engine.optimizer, tensors, json, self._snapshotter.keeper_pid)
        if not self._snapshotter.begin(run.state.step, tensors=tensors, json=json):
            self._state.thaw()
        if self._snapshotter.taken and not self._tidy:
            self._tidy = True
            self._shards.clear()  # there is a newer one now

    def wait(self) -> None:
        """See Taker."""
        self._snapshotter.wait()
        if self._state.is_frozen:
            self._snapshotter.flush()  # the state that the one before names is overwritten only then
            self._state.release()

    def forget(self) -> None:
        """See Taker."""
        self._snapshotter.forget()
        self._shards.clear()

    def end(self) -> None:
        """See Taker."""
        self._snapshotter.close()

    def leave(self) -> None:
        """See Taker."""
        self._snapshotter.leave()
