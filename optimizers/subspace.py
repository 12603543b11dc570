"""The subspace that a gradient lives in, found without stalls and without crashes.

A singular value decomposition of every matrix every 200 steps stops a run for minutes at 7B
(arXiv:2412.05270, table 7) and fails on some gradients. One step of subspace iteration from the last basis, P
← qr(GᵀG P), costs two products and a small QR, follows the gradient as it drifts, and comes to the same
subspace; matrices take turns (`turn`), so that no step refreshes all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .products import fast_dtype


def turn(step: int, gap: int, place: int, places: int) -> tuple[int, int]:
    """(steps since the last refresh, 0 at one; number of the refresh) for matrix `place` of `places`.

    Everyone refreshes at step 1; from then on the matrices take turns within each `gap` steps.
    """
    offset = place * gap // places
    return min((step - 1 + offset) % gap, step - 1), (step - 1 + offset) // gap


def tall(matrix: Tensor) -> Tensor:
    """[..., m, n] with the larger side first: itself or its transposed view."""
    return matrix if matrix.shape[-2] >= matrix.shape[-1] else matrix.mT


def random_basis(k: int, r: int, *, seed: int, like: Tensor) -> Tensor:
    """Orthonormal columns [k, r], the same on every rank and device."""
    generator = torch.Generator().manual_seed(seed & 0x7FFF_FFFF_FFFF)
    drawn = torch.randn(k, r, generator=generator, dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(drawn)[0]
    return basis.to(device=like.device, dtype=_exact(like))


def leading_basis(grad: Tensor, previous: Tensor | None, r: int, *, seed: int, exact: bool) -> Tensor:
    """Orthonormal columns [k, r] near the leading singular vectors of the smaller side of grad [m, n].

    previous: the last basis, from which one iteration suffices; without one there are three, from a random
    start. exact takes a full decomposition. Where the gradient is not finite or a decomposition fails, the
    previous basis stays (a random one at the start): a refresh never stops a run.
    """
    upright = tall(grad)
    k = upright.shape[1]
    if exact:
        try:
            left, _, right = torch.linalg.svd(grad.to(_exact(grad)), full_matrices=False)
            leading: Tensor = right[:r].mT if upright is grad else left[:, :r]
            return leading.contiguous()
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # torch does not list it
            pass  # iterate instead
    basis = random_basis(k, r, seed=seed, like=grad) if previous is None else previous.to(_exact(grad))
    fast = upright.to(fast_dtype(grad))
    for _ in range(3 if previous is None else 1):
        seen = (fast.mT @ (fast @ basis.to(fast.dtype))).to(basis.dtype)
        # Only the direction counts: scaled, a tiny gradient does not vanish in the products of float32.
        seen = seen / seen.abs().max().clamp(min=torch.finfo(seen.dtype).tiny)
        try:
            found = torch.linalg.qr(seen)[0]
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # torch does not list it
            return basis
        if not bool(torch.isfinite(found).all()):
            return basis
        basis = found
    return basis


def _exact(like: Tensor) -> torch.dtype:
    return torch.float64 if like.dtype == torch.float64 else torch.float32
