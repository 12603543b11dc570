"""Importance from the weights alone: the Euclidean norm of all that leaves together. No calibration."""

from __future__ import annotations

from torch import Tensor

from .anatomy import Anatomy, Block
from .cut import Scores


def magnitude_scores(anatomy: Anatomy) -> Scores:
    """Per block: neurons [D] and groups [G], float64."""
    return Scores(
        tuple(_neurons(block) for block in anatomy.blocks), tuple(_groups(block) for block in anatomy.blocks)
    )


def _neurons(block: Block) -> Tensor:
    rows = _squares(block.gate.weight, 1) + _squares(block.up.weight, 1)
    return (rows + _squares(block.down.weight, 0)).sqrt()


def _groups(block: Block) -> Tensor:
    shape = (block.groups, -1)
    queries = _squares(block.q.weight, 1) + _squares(block.o.weight, 0)
    keys = _squares(block.k.weight, 1) + _squares(block.v.weight, 1)
    return (queries.reshape(shape).sum(dim=1) + keys.reshape(shape).sum(dim=1)).sqrt()


def _squares(weight: Tensor, dim: int) -> Tensor:
    return weight.detach().double().square().sum(dim=dim).cpu()
