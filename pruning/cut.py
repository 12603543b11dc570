"""What is kept: the same number in every layer, or a number for each, by scores within the layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .anatomy import Anatomy


@dataclass(frozen=True)
class Scores:
    """Importance, float64, higher stays: of each block `neurons` [D] and `groups` [G].

    A method that does not judge one of the two leaves its tuple empty; nothing of it is removed then.
    """

    neurons: tuple[Tensor, ...] = ()
    groups: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Values:
    """Narrower heads of v and o: `v` [G·r, d], `bias` [G·r] where v_proj has one, `o` [d, G·g·r]; float64."""

    width: int
    v: Tensor
    o: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class Cut:
    """Indices that stay, ascending int64, of each block of the model before the removal.

    `blocks` are the layers that stay. `down_weight[l]` [d, kept neurons] replaces what slicing would leave of
    block l's down_proj; `down_bias[l]` and `o_bias[l]` [d] are added to the biases. `pairs[l]` [G, p] are the
    rotary pairs that each group's heads of q and k keep, ascending, and `values[l]` replaces v_proj and
    o_proj; layers without an entry keep all.
    """

    neurons: tuple[Tensor, ...]
    groups: tuple[Tensor, ...]
    blocks: tuple[int, ...]
    down_weight: Mapping[int, Tensor] = field(default_factory=dict)
    down_bias: Mapping[int, Tensor] = field(default_factory=dict)
    o_bias: Mapping[int, Tensor] = field(default_factory=dict)
    pairs: Mapping[int, Tensor] = field(default_factory=dict)
    values: Mapping[int, Values] = field(default_factory=dict)


def everything(anatomy: Anatomy) -> Cut:
    """The cut that removes nothing."""
    return Cut(
        tuple(torch.arange(block.neurons) for block in anatomy.blocks),
        tuple(torch.arange(block.groups) for block in anatomy.blocks),
        tuple(range(len(anatomy.blocks))),
    )


def highest(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores, ascending; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def keep_counts(anatomy: Anatomy, scores: Scores, neurons: Sequence[int], groups: Sequence[int]) -> Cut:
    """The highest of each block, `neurons[l]` and `groups[l]` of them."""
    whole = everything(anatomy)
    return Cut(
        tuple(highest(s, n) for s, n in zip(scores.neurons, neurons, strict=True)) or whole.neurons,
        tuple(highest(s, n) for s, n in zip(scores.groups, groups, strict=True)) or whole.groups,
        whole.blocks,
    )


def keep_uniform(anatomy: Anatomy, scores: Scores, neurons: int, groups: int) -> Cut:
    """The highest of each block, the same number in all.

    Plain configs hold one width, so this is the form that any loader reads. What it gives up: an allocation
    that would keep more in important layers and less in others is lost.
    """
    return keep_counts(anatomy, scores, [neurons] * len(scores.neurons), [groups] * len(scores.groups))


def removed(kept: Tensor, total: int) -> Tensor:
    """The indices that are not kept, ascending."""
    stays = torch.zeros(total, dtype=torch.bool)
    stays[kept] = True
    return (~stays).nonzero().flatten()


def pair_channels(kept: Tensor, width: int) -> Tensor:
    """Pairs [H, p] of H heads that are `width` wide: their channels among H · width, [H · 2p]."""
    start = torch.arange(len(kept))[:, None] * width
    return torch.cat([start + kept, start + kept + width // 2], dim=1).flatten()


def spread(groups: Tensor, width: int) -> Tensor:
    """Rows or columns of groups that are `width` wide each: [n] -> [n · width]."""
    return (groups[:, None] * width + torch.arange(width)).flatten()
