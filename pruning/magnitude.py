"""Importance from the weights alone: the Euclidean norm of all that leaves together. No calibration."""

from __future__ import annotations

import torch
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
    rows = ((block.q.weight, 1), (block.o.weight, 0), (block.k.weight, 1), (block.v.weight, 1))
    total = torch.zeros(block.groups, dtype=torch.float64)
    for weight, dim in rows:
        total += _squares(weight, dim).reshape(block.groups, -1).sum(dim=1)
    return total.sqrt()


def _squares(weight: Tensor, dim: int) -> Tensor:
    return weight.detach().double().square().sum(dim=dim).cpu()
