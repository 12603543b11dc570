"""Carry out a cut: rows and columns leave, or are zeroed in place; the model stays an ordinary one.

Removal and zeroing compute the same function: an MLP neuron with zero rows gives act(0) · 0 = 0, a group with
zero v gives zeros, and a block whose o_proj and down_proj are zero adds nothing to its input.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .anatomy import Anatomy, Block, read_anatomy
from .cut import Cut, removed, spread
from .forms import check_biases
from .narrow import check_heads, cut_linear, mask_heads, narrow_heads
from .optimizer_state import Follower

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def remove(model: PreTrainedModel, cut: Cut, *, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Cut the model in place, its gradients, and the optimizer's states by the same slices.

    Parameters become new objects; the optimizer's groups get them in the same places, without those of
    removed blocks and with new biases at the end of the group of their weight. Layers may keep different
    numbers: the model then computes as it should, but no plain file holds it (save.py, pad.py). Gradients
    of v_proj and o_proj are dropped where their values are replaced.

    Raises:
        UserError: states that cannot be cut, or biases that no class of this family holds; nothing has
            changed then.
        ValueError: a cut of another model.
    """
    anatomy = read_anatomy(model)
    follower = _begin(anatomy, cut, optimizer)
    _update(anatomy, cut, follower)
    for index, block in enumerate(anatomy.blocks):
        narrow_heads(block, cut.pairs.get(index), cut.values.get(index), follower)
    anatomy = read_anatomy(model)
    for index, block in enumerate(anatomy.blocks):
        if block.pairs is not None:
            attention: Any = block.layer.self_attn
            attention.rotary_pairs = [list(block.pairs[group]) for group in cut.groups[index].tolist()]
        for linear, dim, kept in _slices(block, cut, index):
            cut_linear(linear, dim, kept, follower)
    gone = removed(torch.tensor(cut.blocks), len(anatomy.blocks)).tolist()
    if follower is not None:
        follower.drop([p for index in gone for p in anatomy.blocks[index].layer.parameters()])
    _configure(anatomy, cut)


@torch.no_grad()
def mask(model: PreTrainedModel, cut: Cut) -> None:
    """Zero in place what `remove` would take away, with the cut's updates: the same function.

    For looking at a cut before it is made; it saves neither memory nor time.
    """
    anatomy = read_anatomy(model)
    _update(anatomy, cut, _begin(anatomy, cut, None))
    for index, block in enumerate(anatomy.blocks):
        mask_heads(block, cut.pairs.get(index), cut.values.get(index))
        for linear, dim, kept in _slices(block, cut, index):
            gone = removed(kept, linear.weight.shape[dim]).to(linear.weight.device)
            linear.weight.index_fill_(dim, gone, 0)
            if dim == 0 and linear.bias is not None:
                linear.bias.index_fill_(0, gone, 0)
        if index not in cut.blocks:
            for linear in (block.o, block.down):
                linear.weight.zero_()
                if linear.bias is not None:
                    linear.bias.zero_()


def _begin(anatomy: Anatomy, cut: Cut, optimizer: torch.optim.Optimizer | None) -> Follower | None:
    """All refusals, before the first change."""
    layers = len(anatomy.blocks)
    if len(cut.neurons) != layers or len(cut.groups) != layers or not set(cut.blocks) <= set(range(layers)):
        raise ValueError(f"the cut is of {len(cut.neurons)} layers, the model has {layers}")
    check_biases(anatomy, down=bool(cut.down_bias), o=bool(cut.o_bias))
    check_heads(anatomy, cut, optimizer)
    if optimizer is None:
        return None
    return Follower(
        optimizer,
        [
            parameter
            for index, block in enumerate(anatomy.blocks)
            for linear in [each for each, _, _ in _slices(block, cut, index)]
            + [block.q, block.k] * (index in cut.pairs)
            for parameter in linear.parameters()
        ],
    )


def _update(anatomy: Anatomy, cut: Cut, follower: Follower | None) -> None:
    """New weights and biases of the cut, in the shapes of before."""
    for index, weight in cut.down_weight.items():
        target = anatomy.blocks[index].down.weight
        target[:, cut.neurons[index].to(target.device)] = weight.to(target)
    config: Any = anatomy.model.config
    for values, names, flag in (
        (cut.down_bias, ("gate", "up", "down"), "mlp_bias"),
        (cut.o_bias, ("q", "k", "v", "o"), "attention_bias"),
    ):
        if not values:
            continue
        # configs switch on all of these biases, in all layers, or none
        for block in anatomy.blocks:
            for name in names:
                _give_bias(getattr(block, name), follower)
        if hasattr(config, flag):
            setattr(config, flag, True)
        for index, value in values.items():
            bias = getattr(anatomy.blocks[index], names[-1]).bias
            bias += value.to(bias)


def _give_bias(linear: nn.Linear, follower: Follower | None) -> None:
    if linear.bias is None:
        zeros = torch.zeros(linear.out_features, dtype=linear.weight.dtype, device=linear.weight.device)
        linear.bias = nn.Parameter(zeros, requires_grad=linear.weight.requires_grad)
        if follower is not None:
            follower.add(linear.bias, linear.weight)


def _slices(block: Block, cut: Cut, index: int) -> Iterator[tuple[nn.Linear, int, Tensor]]:
    """(layer, dimension of its weight, indices that stay) of everything that this cut shortens."""
    neurons, groups = cut.neurons[index], cut.groups[index]
    if len(neurons) < block.neurons:
        yield from ((block.gate, 0, neurons), (block.up, 0, neurons), (block.down, 1, neurons))
    if len(groups) < block.groups:
        queries = spread(groups, block.heads_per_group * block.query_dim)
        yield from ((block.q, 0, queries), (block.k, 0, spread(groups, block.query_dim)))
        outputs = spread(groups, block.group_width)
        yield from ((block.v, 0, spread(groups, block.value_dim)), (block.o, 1, outputs))


def _configure(anatomy: Anatomy, cut: Cut) -> None:
    """Drop the blocks; the config says what the modules are (the widest, where layers differ)."""
    config: Any = anatomy.model.config
    kept = [anatomy.blocks[index] for index in cut.blocks]
    anatomy.base.layers = nn.ModuleList([block.layer for block in kept])
    for position, block in enumerate(kept):
        layer: Any = block.layer
        layer.layer_idx = layer.self_attn.layer_idx = position  # the cache is read by it
        layer.mlp.intermediate_size = block.neurons
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[index] for index in cut.blocks]
    config.head_dim = kept[0].head_dim  # where it was inferred, fewer heads would change it
    config.intermediate_size = max(block.neurons for block in kept)
    config.num_key_value_heads = max(block.groups for block in kept)
    config.num_attention_heads = max(block.groups * block.heads_per_group for block in kept)
