"""Checkpoints that survive a crash at any moment, and what a run needs to go on as if it never stopped.

What is named here is imported when it is first asked for: the keeper of snapshots, a process of this room,
starts without torch.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .describe import CheckpointFacts, describe_checkpoints
    from .errors import BrokenCheckpoint
    from .generators import random_state, set_random_state
    from .identity import check_identity, differences, run_identity
    from .interval import snapshot_interval
    from .keeper_settings import KeeperSettings
    from .pieces import Piece
    from .reading import Checkpoint, name_of, newest, open_checkpoint
    from .retention import best, prune, set_best
    from .sharded_reading import ShardedSnapshot, newest_sharded
    from .sharded_snapshot import ShardedSnapshotter
    from .snapshot import Snapshotter
    from .snapshot_reading import Snapshot
    from .state import load_optimizer_state, optimizer_state
    from .store import save
    from .trainer_callback import SnapshotCallback

__all__ = [
    "BrokenCheckpoint",
    "Checkpoint",
    "CheckpointFacts",
    "KeeperSettings",
    "Piece",
    "ShardedSnapshot",
    "ShardedSnapshotter",
    "Snapshot",
    "SnapshotCallback",
    "Snapshotter",
    "best",
    "check_identity",
    "describe_checkpoints",
    "differences",
    "load_optimizer_state",
    "name_of",
    "newest",
    "newest_sharded",
    "open_checkpoint",
    "optimizer_state",
    "prune",
    "random_state",
    "run_identity",
    "save",
    "set_best",
    "set_random_state",
    "snapshot_interval",
]

_HOMES = {
    "BrokenCheckpoint": "errors",
    "Checkpoint": "reading",
    "CheckpointFacts": "describe",
    "KeeperSettings": "keeper_settings",
    "Piece": "pieces",
    "ShardedSnapshot": "sharded_reading",
    "ShardedSnapshotter": "sharded_snapshot",
    "Snapshot": "snapshot_reading",
    "SnapshotCallback": "trainer_callback",
    "Snapshotter": "snapshot",
    "best": "retention",
    "check_identity": "identity",
    "describe_checkpoints": "describe",
    "differences": "identity",
    "load_optimizer_state": "state",
    "name_of": "reading",
    "newest": "reading",
    "newest_sharded": "sharded_reading",
    "open_checkpoint": "reading",
    "optimizer_state": "state",
    "prune": "retention",
    "random_state": "generators",
    "run_identity": "identity",
    "save": "store",
    "set_best": "retention",
    "set_random_state": "generators",
    "snapshot_interval": "interval",
}


def __getattr__(name: str) -> object:
    """Import a public name's home only when it is asked for."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
