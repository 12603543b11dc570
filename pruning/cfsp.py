"""CFSP (Wang et al., arXiv 2409.13199): each MLP is cut by what its block does.

Coarse: block l moves the hidden state by the angle d_l = mean_t arccos(cos(x_in, x_out))/π;
s_l = sigmoid(a · 13.1072 · (d_l − mean d)) and it keeps k_l = (1 − p) · s_l / mean s of its
neurons. The paper's code sums d over tokens and divides by 10⁴; with its 128 · 1024 tokens that is the factor
13.1072, here free of the number of tokens.

Fine: with a_j = √(Σ_t h_j² / sequences) of down_proj's input and G_ij = |W_down[i,j]| · a_j,

    score_j = a_j · mean_i( G_ij/Σ_i G_ij + |W_up[j,i]|/Σ_i |W_up[j,i]| + |W_gate[j,i]|/Σ_i |W_gate[j,i]| )

Each quotient sums to 1 over i, so its mean is 1/d whatever the weights are, and the score is 3 · a_j / d: a
ranking by activation alone. `cfsp_weighted_scores` is ours: each of the three matrices is divided by its mean
over all entries instead, so that a neuron with larger weights counts more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .anatomy import Anatomy, Block
from .cut import Scores
from .statistics import BlockStats

# 128 sequences · 1024 tokens / 10⁴.
TOKENS_OVER_SCALE = 13.1072
# What the published code divides by when the largest share has to come down to 1.
MARGIN = 1.05


def cfsp_scores(anatomy: Anatomy, stats: Sequence[BlockStats]) -> Scores:
    """The fine score as published, per block [D], float64. Heads are not judged."""
    return Scores(tuple(_published(b, s) for b, s in zip(anatomy.blocks, stats, strict=True)))


def cfsp_weighted_scores(anatomy: Anatomy, stats: Sequence[BlockStats]) -> Scores:
    """The fine score with weights that count, per block [D], float64. Heads are not judged."""
    return Scores(tuple(_weighted(b, s) for b, s in zip(anatomy.blocks, stats, strict=True)))


def cfsp_shares(angles: Sequence[float], share: float, *, a: float = 1.0) -> list[float]:
    """The share of its neurons that each block keeps when `share` of all goes; their mean is 1 − share.

    `angles` are d_l. Where a share would reach 1, all deviations from the mean of s shrink by one factor so
    that the largest is 1/1.05 of the way there.
    """
    d = torch.tensor(angles, dtype=torch.float64)
    s = torch.sigmoid(a * TOKENS_OVER_SCALE * (d - d.mean()))
    mean = s.mean()
    if float(((1 - share) * s / mean).max()) >= 1:
        s = mean + (mean * (1 / (1 - share) - 1) / (s.max() - mean)) / MARGIN * (s - mean)
    kept: list[float] = ((1 - share) * s / mean).tolist()
    return kept


def cfsp_counts(neurons: int, shares: Sequence[float], *, multiple: int = 1) -> list[int]:
    """Neurons that each layer keeps: share · D to the nearest multiple, at least one multiple, at most D."""
    return [min(neurons, max(multiple, round(share * neurons / multiple) * multiple)) for share in shares]


def _activity(stats: BlockStats) -> Tensor:
    return (stats.mlp.squares / stats.sequences).sqrt()


def _sizes(block: Block, activity: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """G, |W_up|ᵀ and |W_gate|ᵀ, each [d, D] in float64 on the host."""
    down, up, gate = (
        linear.weight.detach().double().abs().cpu() for linear in (block.down, block.up, block.gate)
    )
    return down * activity, up.t(), gate.t()


def _published(block: Block, stats: BlockStats) -> Tensor:
    activity = _activity(stats)
    parts = [sizes / _positive(sizes.sum(dim=0)) for sizes in _sizes(block, activity)]
    return activity * torch.stack([part.mean(dim=0) for part in parts]).sum(dim=0)


def _weighted(block: Block, stats: BlockStats) -> Tensor:
    activity = _activity(stats)
    parts = [sizes.mean(dim=0) / _positive(sizes.mean()) for sizes in _sizes(block, activity)]
    return activity * torch.stack(parts).sum(dim=0)


def _positive(value: Tensor) -> Tensor:
    """1 where the divisor is zero: the numerator is zero there too."""
    return torch.where(value > 0, value, torch.ones_like(value))
