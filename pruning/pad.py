"""Layers of different widths padded with zeros to the widest: exact, and loads anywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .anatomy import Block, read_anatomy
from .cut import Values, pair_channels
from .narrow import widened

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def pad(model: PreTrainedModel) -> int:
    """Give all layers the widest one's neurons and groups, zeros for those that they lack; the zeros added.

    Heads that were narrowed become whole ones, with zeros where channels left. The function computed is the
    same. Memory and time are those of the widest layer, so this is for evaluating an uneven cut with tools
    that want plain files.
    """
    anatomy = read_anatomy(model)
    before = anatomy.parameters
    for block in anatomy.blocks:
        if hasattr(block.layer.self_attn, "value_width"):
            _whole_heads(block)
    anatomy = read_anatomy(model)
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


def _whole_heads(block: Block) -> None:
    """Heads of q, k, v and o as wide as the config says, and the stock attention."""
    from .modeling_pruned import NARROW  # imports every family

    if block.pairs is not None:
        kept = torch.tensor(block.pairs)
        for linear, heads in ((block.q, block.heads_per_group), (block.k, 1)):
            index = pair_channels(kept.repeat_interleave(heads, dim=0), block.head_dim)
            rows = block.groups * heads * block.head_dim
            linear.weight = _spread(linear.weight, index, rows)
            if linear.bias is not None:
                linear.bias = _spread(linear.bias, index, rows)
            linear.out_features = rows
    if block.value_dim != block.head_dim:
        bias = None if block.v.bias is None else block.v.bias.detach()
        now = Values(block.value_dim, block.v.weight.detach(), block.o.weight.detach(), bias)
        wide = widened(now, block.head_dim)
        block.v.weight = nn.Parameter(wide.v, requires_grad=block.v.weight.requires_grad)
        block.o.weight = nn.Parameter(wide.o, requires_grad=block.o.weight.requires_grad)
        if wide.bias is not None:
            block.v.bias = nn.Parameter(wide.bias, requires_grad=block.v.bias.requires_grad)
        block.v.out_features, block.o.in_features = len(wide.v), wide.o.shape[1]
    attention: Any = block.layer.self_attn
    attention.__class__ = {narrow: stock for stock, narrow in NARROW.items()}[type(attention)]
    del attention.value_width, attention.rotary_pairs


def _spread(old: Tensor, index: Tensor, rows: int) -> nn.Parameter:
    whole = old.detach().new_zeros((rows, *old.shape[1:]))
    whole[index.to(old.device)] = old.detach()
    return nn.Parameter(whole, requires_grad=old.requires_grad)


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
