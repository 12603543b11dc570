"""The held-out split: by the hash of a row's content, so that duplicates never stand on both sides.

The order of the hashes depends on content and seed alone, so that rows added later hardly move others.
"""

import json

import numpy as np
import xxhash
from numpy.typing import NDArray

from .formats import Messages


def content_hash(row: Messages | str, seed: int) -> int:
    """64 bits of a row's content."""
    text = row if isinstance(row, str) else json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"), seed=seed & (2**64 - 1))


def held_out(hashes: NDArray[np.uint64], share: float, at_most: int | None = None) -> NDArray[np.bool_]:
    """Which rows are held out: contents in the order of their hash, until `share` of the rows (or `at_most`)
    is reached.

    A content with more copies than there is room left for stays in training. One content at least is held out
    if there are two different ones.
    """
    contents, counts = np.unique(hashes, return_counts=True)
    if len(contents) < 2:
        return np.zeros(len(hashes), dtype=np.bool_)
    wanted = max(1, round(share * len(hashes)))
    room = wanted if at_most is None else min(wanted, at_most)
    chosen = []
    for content, count in zip(contents, counts, strict=True):
        if count <= room:
            chosen.append(content)
            room -= count
        if room == 0:
            break
    # Every content has many copies: the one with the fewest.
    held = np.array(chosen or [contents[np.argmin(counts)]], dtype=np.uint64)
    return np.isin(hashes, held)
