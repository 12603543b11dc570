"""Layers of different widths padded with zeros to the widest: exact, and loads anywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .anatomy import read_anatomy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def pad(model: PreTrainedModel) -> int:
    """Give all layers the widest one's neurons and groups, zeros for those that they lack; the zeros added.

    The function computed is the same. Memory and time are those of the widest layer, so this is for
    evaluating an uneven cut with tools that want plain files.
    """
    anatomy = read_anatomy(model)
    before = anatomy.parameters
    neurons = max(block.neurons for block in anatomy.blocks)
    groups = max(block.groups for block in anatomy.blocks)
    for block in anatomy.blocks:
        queries, keys = groups * block.group_width, groups * block.head_dim
        for linear, dim, width in (
            (block.gate, 0, neurons),
            (block.up, 0, neurons),
            (block.down, 1, neurons),
            (block.q, 0, queries),
            (block.k, 0, keys),
            (block.v, 0, keys),
            (block.o, 1, queries),
        ):
            _widen(linear, dim, width)
    return anatomy.parameters - before


def _widen(linear: nn.Linear, dim: int, width: int) -> None:
    missing = width - linear.weight.shape[dim]
    if missing == 0:
        return
    linear.weight = _grown(linear.weight, dim, missing)
    if dim == 0 and linear.bias is not None:
        linear.bias = _grown(linear.bias, 0, missing)
    linear.out_features, linear.in_features = linear.weight.shape


def _grown(old: Tensor, dim: int, missing: int) -> nn.Parameter:
    shape = list(old.shape)
    shape[dim] = missing
    wider: Tensor = torch.cat([old.detach(), old.new_zeros(shape)], dim=dim)
    return nn.Parameter(wider, requires_grad=old.requires_grad)
