"""Parity over the snapshots of several processes: of n of them, any one can be lost and computed again.

As in RAID 5 (Patterson, Gibson, Katz 1988), over memories instead of disks: the bytes of each process are cut
into n - 1 blocks; process j holds the exclusive or of one block of every other process, its stripe. A process
that is lost takes its n - 1 blocks with it, and each of them is the exclusive or of a stripe that another one
holds with the blocks of the rest. It costs 1 / (n - 1) of the bytes that it protects.

Shorter processes count as if zeros came after their last byte. Pure arithmetic on bytes, without torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

ALIGN = 64
Bytes = NDArray[np.uint8]
Runs = Sequence[tuple[int, Bytes]]
"""The bytes of a process: where each run of them begins, zeros in between and after."""


def stripe_bytes(most: int, ranks: int) -> int:
    """Bytes of a block, and of a stripe, where no process has more than `most`: a multiple of ALIGN."""
    each = -(-most // (ranks - 1))
    return -(-each // ALIGN) * ALIGN


def block_held_by(holder: int, rank: int) -> int:
    """Which block of `rank` is in the stripe of `holder`, another one."""
    if holder == rank:
        raise ValueError("no process holds blocks of its own")
    return holder if holder < rank else holder - 1


def fold(into: Bytes, runs: Runs, start: int) -> None:
    """`into` ^= bytes [start, start + len(into)) of a process."""
    for offset, data in runs:
        low, high = max(start, offset), min(start + len(into), offset + len(data))
        if low < high:
            target = into[low - start : high - start]
            np.bitwise_xor(target, data[low - offset : high - offset], out=target)


def rebuild(lost: int, size: int, data: Mapping[int, Runs], stripes: Mapping[int, Bytes]) -> Bytes:
    """The `size` bytes of process `lost`. data, stripes: of every other process.

    ValueError when one of them is missing, or the stripes do not have the size of blocks of so many bytes.
    """
    ranks = len(data) + 1
    others = sorted(set(range(ranks)) - {lost})
    if sorted(data) != others or sorted(stripes) != others:
        raise ValueError(f"to compute process {lost} again, all of {others} are needed")
    length = len(stripes[others[0]])
    if any(len(stripe) != length for stripe in stripes.values()) or not 0 <= size <= length * (ranks - 1):
        raise ValueError("the stripes are not of one snapshot")
    result = np.zeros(length * (ranks - 1), np.uint8)
    for holder in others:
        start = block_held_by(holder, lost) * length
        block = result[start : start + length]
        block[:] = stripes[holder]
        for rank in others:
            if rank != holder:
                fold(block, data[rank], block_held_by(holder, rank) * length)
    return result[:size]
