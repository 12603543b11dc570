"""The rows of one step as micro-batches: bins of rows in sequence, or padded rectangles of rows of like
length.
"""

import bisect
import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def split_rows(
    lengths: Sequence[int],
    *,
    packed: bool,
    micro_tokens: int | None,
    micro_rows: int | None,
    multiple: int = 1,
) -> list[list[int]]:
    """Positions into `lengths`, as micro-batches, the most expensive first.

    Packed: the tokens of a micro-batch are at most `micro_tokens`; padded: its rows times its longest row
    are. A single row above the limit is a micro-batch of its own. `micro_rows` limits the rows of each. With
    neither limit there is one micro-batch for each of `multiple`.

    Their number is a multiple of `multiple` (the number of processes). None is empty, except where the rows
    do not go round (fewer rows than processes; nine rows of which no two fit together, for eight): then the
    last ones are `[]`, which collate turns into one token without a target.
    """
    if not lengths:
        return [[] for _ in range(multiple)]
    order = sorted(range(len(lengths)), key=lambda k: (-lengths[k], k))
    most = micro_rows or len(lengths)
    if packed:
        batches = _bins([lengths[k] for k in order], micro_tokens or sum(lengths), most, multiple)
        batches = [[order[k] for k in batch] for batch in batches]
    else:
        batches = _rectangles(order, lengths, micro_tokens or lengths[order[0]] * len(lengths), most)
    _divide(batches, multiple)

    def cost(batch: list[int]) -> tuple[int, int]:
        sizes = [lengths[k] for k in batch]
        return sum(sizes) if packed else len(sizes) * max(sizes, default=0), max(sizes, default=0)

    return sorted(batches, key=cost, reverse=True)


def _bins(sizes: Sequence[int], capacity: int, most: int, multiple: int) -> list[list[int]]:
    """Bins of equal load if that fits, else as few as best-fit needs. `sizes` descend."""
    fewest = max(-(-sum(sizes) // capacity), -(-len(sizes) // most))
    if (bins := _balanced(sizes, _round_up(fewest, multiple), capacity, most)) is not None:
        return bins
    fitted = _best_fit(sizes, capacity, most)
    return _balanced(sizes, _round_up(len(fitted), multiple), capacity, most) or fitted


def _balanced(sizes: Sequence[int], count: int, capacity: int, most: int) -> list[list[int]] | None:
    """Longest first, each into the least loaded bin; None if one overflows."""
    bins: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, number) for number in range(count)]
    for k, size in enumerate(sizes):
        load, number = heapq.heappop(heap)
        if load and load + size > capacity:
            return None
        bins[number].append(k)
        if len(bins[number]) < most:
            heapq.heappush(heap, (load + size, number))
        elif not heap and k + 1 < len(sizes):
            return None
    return [batch for batch in bins if batch]


def _best_fit(sizes: Sequence[int], capacity: int, most: int) -> list[list[int]]:
    """Longest first, each into the fullest bin that has room."""
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room, bin), ascending
    for k, size in enumerate(sizes):
        place = bisect.bisect_left(free, (size, -1))
        if place < len(free):
            room, number = free.pop(place)
            bins[number].append(k)
        else:
            room, number = capacity, len(bins)
            bins.append([k])
        if room > size and len(bins[number]) < most:
            bisect.insort(free, (room - size, number))
    return bins


def _rectangles(order: Sequence[int], lengths: Sequence[int], capacity: int, most: int) -> list[list[int]]:
    batches: list[list[int]] = []
    start = 0
    while start < len(order):
        count = min(most, max(1, capacity // lengths[order[start]]))
        batches.append(list(order[start : start + count]))
        start += count
    return batches


def _divide(batches: list[list[int]], multiple: int) -> None:
    """Halve the batches with the most rows until their number is a multiple."""
    while len(batches) % multiple:
        largest = max(batches, key=len)
        if len(largest) < 2:
            batches.append([])
            continue
        batches.remove(largest)
        # Neighbours stay together, so that halves of a padded rectangle need no more padding than the whole.
        batches += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def costliest(lengths: NDArray[np.int32], *, packed: bool, capacity: float, most: float) -> NDArray[np.int64]:
    """Rows of the worst micro-batch that `capacity` tokens and `most` rows allow, the longest row in it if
    possible.

    Packed: the longest row, then always the longest that still fits. Padded: the rectangle with the largest
    area, and of those within 3 % of it the one with the longest rows (attention grows with their square).
    """
    order = np.argsort(-lengths, kind="stable")
    sizes = lengths[order].astype(np.int64)
    if not packed:
        counts = np.minimum(np.maximum(1, capacity // sizes), min(most, len(sizes)))
        # The rows of a rectangle are those from its longest on.
        counts = np.minimum(counts, len(sizes) - np.arange(len(sizes))).astype(np.int64)
        areas = counts * sizes
        start = int(np.argmax(areas >= 0.97 * areas.max()))
        return order[start : start + counts[start]]
    chosen = [0]
    room = capacity - sizes[0]
    while len(chosen) < most:
        # `sizes` descend: the first one that fits, and comes after the last one taken.
        place = max(chosen[-1] + 1, int(np.searchsorted(-sizes, -room)))
        if place >= len(sizes) or room <= 0:
            break
        chosen.append(place)
        room -= sizes[place]
    return order[chosen]
