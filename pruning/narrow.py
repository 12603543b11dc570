"""Heads made narrower in a loaded model: pairs of q and k leave, values of v and o are replaced.

The attention of such a layer is that of modeling_pruned.py. `mask_heads` writes the same function in the old
shapes: zero channels of q and k add nothing to a score, zero channels of v nothing to an output.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..recipes.errors import UserError
from .anatomy import Anatomy, Block
from .cut import Cut, Values, pair_channels, removed
from .optimizer_state import Follower

# q and k of these are divided by the norm over a whole head, which fewer channels would change.
NORMALISED = ("qwen3", "gemma3_text")


def check_heads(anatomy: Anatomy, cut: Cut, optimizer: torch.optim.Optimizer | None) -> None:
    """Refuse what cannot be narrowed, before the first change.

    Raises:
        UserError: pairs of a family that normalises q and k, or values with an optimizer that knows v or o.
        ValueError: a cut of other shapes.
    """
    if cut.pairs:
        check_pairs(anatomy.family)
    for index, kept in cut.pairs.items():
        block = anatomy.blocks[index]
        if len(kept) != block.groups or int(kept.max()) >= block.query_dim // 2:
            raise ValueError(f"the cut of layer {index} is of other heads than the model's")
    for index, values in cut.values.items():
        block = anatomy.blocks[index]
        expected = (block.groups * values.width, block.v.in_features)
        if tuple(values.v.shape) != expected or (values.bias is None) != (block.v.bias is None):
            raise ValueError(f"the cut of layer {index} is of other heads than the model's")
        parameters = [*block.v.parameters(), *block.o.parameters()]
        if optimizer is not None and any(parameter in optimizer.state for parameter in parameters):
            raise UserError(
                f"pruning.parts: values mix the channels of v_proj and o_proj, and the states of "
                f"{type(optimizer).__name__} cannot follow.\n  Prune before the optimizer has made a step."
            )


def check_pairs(family: str) -> None:
    """Refuse families whose heads of q and k cannot lose channels.

    Raises:
        UserError: with what can be pruned instead.
    """
    if family in NORMALISED:
        raise UserError(
            f"pruning.parts: {family} models divide q and k by their norm over a whole head, which fewer "
            "channels would change; queries is not possible.\n  Leave it out: neurons, values."
        )


def narrow_heads(
    block: Block, pairs: Tensor | None, values: Values | None, follower: Follower | None
) -> None:
    """Carry out one block's `pairs` and `values`."""
    if pairs is None and values is None:
        return
    from .modeling_pruned import narrow_heads as compute_narrow  # imports every family

    kept = [list(each) for each in block.pairs] if block.pairs is not None else None
    if pairs is not None:
        whole = range(block.head_dim // 2)
        present = kept or [list(whole)] * block.groups
        kept = [[have[i] for i in wanted] for have, wanted in zip(present, pairs.tolist(), strict=True)]
        for linear, heads in ((block.q, block.heads_per_group), (block.k, 1)):
            index = pair_channels(pairs.repeat_interleave(heads, dim=0), block.query_dim)
            cut_linear(linear, 0, index, follower)
    width = block.value_dim
    if values is not None:
        width = values.width
        _put(block.v, values.v, follower)
        if values.bias is not None:
            _replace(block.v, "bias", values.bias, follower)
        _put(block.o, values.o, follower)
    compute_narrow(block.layer.self_attn, width, kept)


def mask_heads(block: Block, pairs: Tensor | None, values: Values | None) -> None:
    """Zero in place what `narrow_heads` would take away."""
    if pairs is not None:
        for linear, heads in ((block.q, block.heads_per_group), (block.k, 1)):
            stays = pair_channels(pairs.repeat_interleave(heads, dim=0), block.query_dim)
            gone = removed(stays, linear.out_features).to(linear.weight.device)
            linear.weight.index_fill_(0, gone, 0)
            if linear.bias is not None:
                linear.bias.index_fill_(0, gone, 0)
    if values is not None:
        wide = widened(values, block.value_dim)
        block.v.weight.copy_(wide.v)
        block.o.weight.copy_(wide.o)
        if wide.bias is not None:
            block.v.bias.copy_(wide.bias)


def widened(values: Values, width: int) -> Values:
    """The same function with `width` channels a head, the last of them zero."""
    rows = len(values.v) // values.width
    heads = values.o.shape[1] // values.width

    def rows_of(x: Tensor) -> Tensor:
        wide = x.new_zeros((rows, width, *x.shape[1:]))
        wide[:, : values.width] = x.reshape(rows, values.width, *x.shape[1:])
        return wide.flatten(0, 1)

    o = values.o.new_zeros((len(values.o), heads, width))
    o[:, :, : values.width] = values.o.reshape(len(values.o), heads, values.width)
    return Values(
        width, rows_of(values.v), o.flatten(1), None if values.bias is None else rows_of(values.bias)
    )


def cut_linear(linear: nn.Linear, dim: int, kept: Tensor, follower: Follower | None) -> None:
    """Rows (dim 0, with the bias) or columns (1) of a layer stay; parameters become new objects."""
    for name in ("weight", "bias") if dim == 0 else ("weight",):
        old = getattr(linear, name)
        if old is None:
            continue
        index = kept.to(old.device)
        new = nn.Parameter(old.detach().index_select(dim, index), requires_grad=old.requires_grad)
        if old.grad is not None:
            new.grad = old.grad.index_select(dim, index)
        setattr(linear, name, new)
        if follower is not None:
            follower.replace(old, new, index, dim)
    linear.out_features, linear.in_features = linear.weight.shape


def _put(linear: nn.Linear, weight: Tensor, follower: Follower | None) -> None:
    _replace(linear, "weight", weight, follower)
    linear.out_features, linear.in_features = linear.weight.shape


def _replace(linear: nn.Linear, name: str, value: Tensor, follower: Follower | None) -> None:
    old = getattr(linear, name)
    new = nn.Parameter(value.to(old), requires_grad=old.requires_grad)
    setattr(linear, name, new)
    if follower is not None:  # without states: check_heads
        follower.replace(old, new, torch.arange(0), 0)
