"""ShortGPT (Men et al., arXiv 2403.03853): remove the blocks whose output points where their input pointed.

Block Influence is BI_l = 1 − mean_t cos(x_in, x_out), of `BlockStats.influence`.
"""

from __future__ import annotations

from collections.abc import Sequence

from .statistics import BlockStats


def shortgpt_blocks(stats: Sequence[BlockStats], keep: int) -> tuple[int, ...]:
    """The `keep` blocks of highest influence, ascending; of equal ones the first."""
    return highest_blocks([seen.influence for seen in stats], keep)


def highest_blocks(values: Sequence[float], keep: int) -> tuple[int, ...]:
    """Indices of the `keep` highest values, ascending; of equal ones the first."""
    order = sorted(range(len(values)), key=lambda index: -values[index])
    return tuple(sorted(order[:keep]))
