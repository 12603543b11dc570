"""Which part of a matrix FRUGAL gives state to (arXiv:2411.07837)."""

from __future__ import annotations

import torch


def active_shape(shape: tuple[int, ...], density: float, projection: str) -> tuple[int, ...]:
    """Shape [E, ...] of the part of a matrix [E, m, n] that has state (`blocks`: when it is active)."""
    stack, m, n = shape
    if projection == "columns":
        return stack, m, int(density * n)
    if projection == "randk":
        return stack, int(density * m * n)
    if projection == "blocks":
        return (stack, m, n) if density > 0 else (stack, 0, n)
    return stack, max(m, n), round(density * min(m, n))


def columns_of(n: int, count: int, seed: int) -> list[slice]:
    """`count` neighbouring columns of n from a random one on, round the end where need be: one or two slices.

    Neighbours, since columns picked one by one would each cost a cache line for four bytes.
    """
    first = int(torch.randint(n, (), generator=torch.Generator().manual_seed(seed)))
    if first + count <= n:
        return [slice(first, first + count)]
    return [slice(0, first + count - n), slice(first, n)]


def seed_of(seed: int, period: int, index: int) -> int:
    """What tensor `index` draws its part of this period from."""
    return ((seed * 1_000_003 + period) * 65_537 + index * 257) & 0x7FFF_FFFF_FFFF
