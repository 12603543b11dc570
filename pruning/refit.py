"""The best down_proj for the neurons that stay: least squares on the calibration tokens.

With C = Σ h hᵀ of all neurons' activations h and K the kept ones, the W' that minimises

    Σ_t ‖W h − W' h_K‖² + λ ‖W' − W_:,K‖²

is W_:,K + W_:,R C_RK (C_KK + λI)⁻¹ with R the removed ones. For λ = 0 it is W C_:,K C_KK⁻¹, the second half
of MoDeGPT's type I (Lin et al., arXiv 2408.09632), and it suits any selection. Since W' = W_:,K is allowed,
the error on the calibration tokens is never above that of slicing, for any λ; drawing towards the sliced
weight rather than towards zero is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cut import removed

# λ over the mean of C's diagonal. A few thousand tokens do not settle a thousand weights for each output: of
# 1e-6, 1e-3, 1e-2, 0.1 and 1 the last was best on text that the fit had not seen (docs/pruning.md).
RIDGE = 1.0


def refit_weight(weight: Tensor, covariance: Tensor, kept: Tensor, *, ridge: float = RIDGE) -> Tensor:
    """weight [d, D], covariance float64 [D, D], kept indices [k]: the new weight [d, k] in float64.

    On the host: k³/3 + D·k² operations, 8 · (D² + k²) bytes. Dead neurons (zero rows of C) change nothing.

    Raises:
        torch.linalg.LinAlgError: ridge is 0 and the kept neurons depend on each other on these tokens.
    """
    w = weight.detach().double().cpu()
    sliced = w[:, kept]
    gone = removed(kept, w.shape[1])
    scale = float(covariance.diagonal().mean())
    if len(gone) == 0 or scale == 0:
        return sliced
    inner = covariance[kept][:, kept].clone()
    inner.diagonal().add_(ridge * scale)
    right = covariance[kept][:, gone] @ w[:, gone].t()
    return sliced + torch.cholesky_solve(right, torch.linalg.cholesky(inner)).t()
