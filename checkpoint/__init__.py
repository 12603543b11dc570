"""Checkpoints that survive a crash at any moment, and what a run needs to go on as if it never stopped."""

from .describe import CheckpointFacts, describe_checkpoints
from .errors import BrokenCheckpoint
from .identity import check_identity, differences, run_identity
from .random_state import random_state, set_random_state
from .reading import Checkpoint, name_of, newest, open_checkpoint
from .retention import best, prune, set_best
from .state import load_optimizer_state, optimizer_state
from .store import save

__all__ = [
    "BrokenCheckpoint",
    "Checkpoint",
    "CheckpointFacts",
    "best",
    "check_identity",
    "describe_checkpoints",
    "differences",
    "load_optimizer_state",
    "name_of",
    "newest",
    "open_checkpoint",
    "optimizer_state",
    "prune",
    "random_state",
    "run_identity",
    "save",
    "set_best",
    "set_random_state",
]
