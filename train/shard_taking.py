"""Snapshots where several processes hold the state: each takes its shard of it."""

from __future__ import annotations

from typing import Any

from ..adapters import adapter_config
from ..checkpoint import ShardedSnapshotter, random_state
from ..checkpoint.pieces import share_of
from .parts import Run
from .pieces import pieces_of
from .saving import trainer_state
from .shards import Shards


class ShardTaker:
    """`Taker` of this process's shard. shards: what earlier processes have left."""

    def __init__(self, snapshotter: ShardedSnapshotter, shards: Shards) -> None:
        self._snapshotter, self._shards = snapshotter, shards
        self._first = snapshotter.rank == 0
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
        """See Taker; in all processes."""
        self._shards.done()  # a step has been made together, so all have read what they go on from
        pieces, settings = pieces_of(run.engine)
        reference = run.stage.objective.reference
        if reference is not None:
            rank, ranks = self._snapshotter.rank, self._snapshotter.ranks
            pieces = {**pieces, **share_of({"reference": reference.state_dict()}, rank, ranks)}
        json: dict[str, Any] = {"random": [random_state()]}
        if self._first:
            json |= {"trainer": trainer_state(run), **settings}
            config = adapter_config(run.engine.loss_module.model)
            if config is not None:
                json["adapter_config"] = config
        begun = self._snapshotter.begin(run.state.step, pieces=pieces, json=json)
        if begun and self._snapshotter.taken and not self._tidy:
            self._tidy = True  # all have published one of this run, since all began another
            if self._first:
                self._shards.clear(but=self._snapshotter.ranks, before=run.state.step)

    def wait(self) -> None:
        """See Taker."""
        self._snapshotter.wait()

    def forget(self) -> None:
        """See Taker."""
        self._snapshotter.forget()
        self._shards.forget(self._snapshotter.rank, self._snapshotter.ranks)

    def end(self) -> None:
        """See Taker."""
        self._snapshotter.close()

    def leave(self) -> None:
        """See Taker."""
        self._snapshotter.leave()
