"""FLAP (An et al., arXiv 2312.11983): remove what fluctuates least, and put its mean into a bias.

Score of an input channel j of down_proj or o_proj (WIFV): Var(X_j) · ‖W_:,j‖². A channel that hardly varies
can be replaced by its mean x̄_j, whose effect is the constant W_:,j · x̄_j:

    b ← b + Σ_{j removed} W_:,j · x̄_j

For attention the score is squared, standardised over the layer's channels and averaged over a group; for the
MLP it is standardised over the layer. Standardised scores of all layers are compared with each other, each
unit counted by its parameters (`flap_counts`). With grouped queries the unit is the group.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from .anatomy import Anatomy
from .cut import Cut, Scores, removed, spread
from .statistics import BlockStats, Channels


def flap_scores(anatomy: Anatomy, stats: Sequence[BlockStats]) -> Scores:
    """Per block: neurons [D] and groups [G], float64, comparable between layers."""
    neurons, groups = [], []
    for block, seen in zip(anatomy.blocks, stats, strict=True):
        neurons.append(_standard(_fluctuation(block.down, seen.mlp)))
        heads = _standard(_fluctuation(block.o, seen.attention).square())
        groups.append(heads.reshape(block.groups, -1).mean(dim=1))
    return Scores(tuple(neurons), tuple(groups))


def flap_counts(
    anatomy: Anatomy, scores: Scores, share: float, parts: Collection[str]
) -> tuple[list[int], list[int]]:
    """Neurons and groups that each layer keeps when `share` of their parameters goes (AL-AM).

    All units of all layers stand in one list, the highest score first, and stay while the parameters so far
    are at most 1 − share of the list's. Every layer keeps at least its best unit (ours).
    `parts` says which of "neurons" and "groups" are in the list.
    """
    kinds = (
        ("neurons", scores.neurons, [block.neuron_parameters for block in anatomy.blocks]),
        ("groups", scores.groups, [block.group_parameters for block in anatomy.blocks]),
    )
    listed = [kind for kind in kinds if kind[0] in parts]
    values = torch.cat([layer for _, layers, _ in listed for layer in layers])
    costs = torch.cat(
        [
            torch.full((len(layer),), float(cost), dtype=torch.float64)
            for _, layers, prices in listed
            for layer, cost in zip(layers, prices, strict=True)
        ]
    )
    order = values.argsort(descending=True, stable=True)
    stays = torch.zeros(len(values), dtype=torch.bool)
    stays[order[costs[order].cumsum(0) <= costs.sum() * (1 - share)]] = True
    counts = {
        "neurons": [block.neurons for block in anatomy.blocks],
        "groups": [block.groups for block in anatomy.blocks],
    }
    start = 0
    for name, layers, _ in listed:
        for index, layer in enumerate(layers):
            counts[name][index] = max(1, int(stays[start : start + len(layer)].sum()))
            start += len(layer)
    return counts["neurons"], counts["groups"]


def flap_compensation(
    anatomy: Anatomy, stats: Sequence[BlockStats], cut: Cut
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """What is added to the biases of down_proj and o_proj, [d] in float64, of layers that lose something."""
    down, o = {}, {}
    for index, (block, seen) in enumerate(zip(anatomy.blocks, stats, strict=True)):
        gone = removed(cut.neurons[index], block.neurons)
        if len(gone):
            down[index] = compensation(block.down.weight, seen.mlp.mean, gone)
        gone = spread(removed(cut.groups[index], block.groups), block.group_width)
        if len(gone):
            o[index] = compensation(block.o.weight, seen.attention.mean, gone)
    return down, o


def compensation(weight: Tensor, mean: Tensor, gone: Tensor) -> Tensor:
    """weight [out, in], mean [in], removed inputs `gone`: their mean effect, [out], float64."""
    columns = weight.detach()[:, gone.to(weight.device)].double()
    return (columns @ mean[gone].to(columns.device)).cpu()


def _fluctuation(linear: nn.Linear, inputs: Channels) -> Tensor:
    return inputs.variance * linear.weight.detach().double().square().sum(dim=0).cpu()


def _standard(values: Tensor) -> Tensor:
    """(x − mean) / std, std with n − 1; zeros when all are equal."""
    centred = values - values.mean()
    deviation = values.std() if len(values) > 1 else torch.zeros(())
    return centred / deviation if float(deviation) > 0 else centred
