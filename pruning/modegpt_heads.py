"""MoDeGPT's types II and III (Lin et al., arXiv 2408.09632): narrower heads of q and k, and of v and o.

Type II keeps of Q Kᵀ = Σ_i q_i k_iᵀ the terms of highest ‖C_Q^½[:,i]‖ · ‖C_K^½[:,i]‖, with C_Q = Σ_t q qᵀ and
C_K = Σ_t k kᵀ (a CR decomposition). A column of a square root has the norm √C[i,i], so the score is the
product of the norms of q_i and of k_i over the tokens. Rotary positions turn channels i and i + h/2 together:
the pair stays or goes with its frequency, judged by the norms of its two channels, which no rotation changes.

Type III replaces X W_V W_O by the product of rank r that is nearest on the tokens, ‖X W_V W_O − X W_V' W_O'‖:
the SVD of C^½ W_V W_O with C = Σ_t x xᵀ. With V_r its first r right vectors, W_V' = W_V W_O V_r and
W_O' = V_rᵀ. The same V_r are the right vectors of G^½ W_O, where G = W_Vᵀ C W_V = Σ_t v vᵀ has the size of a
head, so nothing of the size of the model is decomposed, and biases of v_proj are carried along.

With grouped queries (the forms below are ours, by the same bounds) the queries of a group stand below each
other, ‖q_i‖² is the sum over its heads, and their W_O stand beside each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .anatomy import Block
from .cut import Values, highest

# Of the mean of G's diagonal, added to it: channels that no token reached keep an order, by their weights.
DAMPING = 1e-10


@dataclass(frozen=True)
class HeadStats:
    """Of one block, float64 on the host: Σ_t q² [G·g·h], Σ_t k² [G·h], Σ_t v vᵀ of each head [G, h, h]."""

    queries: Tensor
    keys: Tensor
    values: Tensor


def pair_scores(block: Block, heads: HeadStats) -> Tensor:
    """Type II: ‖q‖ · ‖k‖ of each group's pairs, [G, pairs]."""
    half = block.query_dim // 2
    queries = heads.queries.reshape(block.groups, block.heads_per_group, 2, half).sum(dim=(1, 2))
    keys = heads.keys.reshape(block.groups, 2, half).sum(dim=1)
    return (queries * keys).sqrt()


def kept_pairs(block: Block, heads: HeadStats, keep: int) -> Tensor:
    """Type II: the `keep` pairs of highest score of each group, ascending, [G, keep]."""
    return torch.stack([highest(scores, keep) for scores in pair_scores(block, heads)])


def value_factors(block: Block, heads: HeadStats, width: int) -> Values:
    """Type III: v_proj and o_proj with heads of `width` channels; h³ + h² · g · d operations a group."""
    groups, per_group, wide = block.groups, block.heads_per_group, block.value_dim
    v = block.v.weight.detach().double().cpu().reshape(groups, wide, -1)
    o = block.o.weight.detach().double().cpu().reshape(-1, groups, per_group, wide)
    bias = None if block.v.bias is None else block.v.bias.detach().double().cpu().reshape(groups, wide)
    rows, biases, columns = [], [], []
    for group in range(groups):
        right, mix = _factor(heads.values[group], o[:, group], width)
        rows.append(mix.t() @ v[group])
        columns.append(right)
        if bias is not None:
            biases.append(bias[group] @ mix)
    new_o = torch.stack(columns, dim=1).flatten(1)
    return Values(width, torch.cat(rows), new_o, torch.cat(biases) if biases else None)


def _factor(gram: Tensor, o: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """gram [h, h], o [d, g, h] of one group: V_r as columns of o [d, g, r], and W_O V_r [h, r]."""
    out, per_group, wide = o.shape
    beside = o.permute(2, 1, 0).reshape(wide, per_group * out)
    shift = DAMPING * float(gram.diagonal().mean()) or 1.0
    values, vectors = torch.linalg.eigh(gram)
    root = vectors * (values.clamp(min=0) + shift).sqrt() @ vectors.t()
    right = torch.linalg.svd(root @ beside, full_matrices=False).Vh[:width].t()
    return right.reshape(per_group, out, width).transpose(0, 1), beside @ right
