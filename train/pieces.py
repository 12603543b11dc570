"""What one process saves of a state that several hold: nothing is gathered, and together it is the whole.

The files and names are those of a checkpoint, so that any number of processes reads it back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checkpoint import Piece, optimizer_state
from ..checkpoint.pieces import Pieces, share_of, whole_piece
from .engine import NativeEngine
from .sharded import MASTER, MOMENTS, ShardedEngine


def pieces_of(engine: NativeEngine) -> tuple[Pieces, dict[str, Any]]:
    """Pieces by file and name, and the JSON that `state_dict` gives; after a step at least.

    No copies, but of weights that a sharded engine holds wider than the model has them.
    """
    rank, ranks = engine.accelerator.process_index, engine.accelerator.num_processes
    if isinstance(engine, ShardedEngine) and engine.sharding and engine.state_in_shards:
        return _own_pieces(engine, first=rank == 0)
    if isinstance(engine, ShardedEngine) and engine.sharding:
        tensors, settings = engine.replicated_state()
    else:
        tensors, settings = engine.state_dict()
    return share_of(tensors, rank, ranks), settings


def _own_pieces(engine: ShardedEngine, *, first: bool) -> tuple[Pieces, dict[str, Any]]:
    trained: dict[str, Piece] = {}
    state: dict[str, Piece] = {}
    shapes = engine.shapes()
    for name, weight, own in engine.own_pieces():
        if weight is not None:
            trained[name] = weight
        state.update({f"{name}/{key}": piece for key, piece in own.items()})
    if first:
        step = engine.steps()
        state.update({f"{name}/step": whole_piece(step.clone()) for name in shapes})
    return {"trained": trained, "optimizer": state}, {"optimizer": _settings(engine, shapes)}


def _settings(engine: ShardedEngine, shapes: dict[str, torch.Size]) -> dict[str, Any]:
    """The optimizer's JSON as a checkpoint has it, from tensors that have shapes and no memory."""

    def shaped(shape: torch.Size) -> Tensor:
        return torch.zeros(()).expand(shape)

    for name, parameter in engine.parameters.items():
        keys = MOMENTS if parameter.dtype == torch.float32 else (*MOMENTS, MASTER)
        state = {"step": torch.zeros(()), **{key: shaped(shapes[name]) for key in keys}}
        engine.optimizer.state[parameter] = state
    try:
        _, settings = optimizer_state(engine.optimizer, engine.parameters)
    finally:
        engine.optimizer.state.clear()
    for name, shape in shapes.items():
        settings["parameters"][name]["shape"] = list(shape)
    return settings
