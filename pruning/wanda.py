"""Wanda-sp: mean size of a channel's weights times the norm of what flows through it.

    score_j = mean_i |W_ij| · ‖X_j‖₂

for the columns j of down_proj and of o_proj; the columns of a group are summed. The score is Wanda's (Sun et
al., arXiv 2306.11695), the structured form that of the FLAP paper (arXiv 2312.11983). Every layer loses the
same share.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .anatomy import Anatomy
from .cut import Scores
from .statistics import BlockStats, Channels


def wanda_scores(anatomy: Anatomy, stats: Sequence[BlockStats]) -> Scores:
    """Per block: neurons [D] and groups [G], float64."""
    neurons, groups = [], []
    for block, seen in zip(anatomy.blocks, stats, strict=True):
        neurons.append(_columns(block.down, seen.mlp))
        groups.append(_columns(block.o, seen.attention).reshape(block.groups, -1).sum(dim=1))
    return Scores(tuple(neurons), tuple(groups))


def _columns(linear: nn.Linear, inputs: Channels) -> Tensor:
    return linear.weight.detach().double().abs().mean(dim=0).cpu() * inputs.norm
