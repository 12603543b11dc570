"""MoDeGPT's type I (Lin et al., arXiv 2408.09632): neurons by ridge leverage, down_proj refitted to them.

    ℓ_j = [C (C + λI)⁻¹]_jj,   C = Σ_t h h^T

is how much of neuron j the others cannot say: of two equal neurons each has about half. λ is the mean of C's
diagonal here (the scale-free choice is ours). The kept neurons get the least-squares down_proj of refit.py.

Types II and III, which narrow the heads, are in modegpt_heads.py.
"""

from __future__ import annotations

import torch
from torch import Tensor


def leverage_scores(covariance: Tensor) -> Tensor:
    """covariance float64 [D, D] -> ℓ [D] in [0, 1); D³ operations, 16 · D² bytes beside it."""
    ridge = covariance.diagonal().mean()
    if float(ridge) == 0:
        return torch.zeros(len(covariance), dtype=torch.float64)
    damped = covariance.clone()
    damped.diagonal().add_(ridge)
    # C (C + λI)⁻¹ = I − λ (C + λI)⁻¹
    return 1 - ridge * torch.cholesky_inverse(torch.linalg.cholesky(damped)).diagonal()
