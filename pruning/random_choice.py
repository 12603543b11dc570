"""Scores drawn at random: what a criterion has to beat."""

from __future__ import annotations

import torch

from .anatomy import Anatomy
from .cut import Scores


def random_scores(anatomy: Anatomy, seed: int) -> Scores:
    """Uniform draws for neurons and groups, the same on every device; float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> torch.Tensor:
        return torch.rand(count, generator=generator, dtype=torch.float64)

    return Scores(
        tuple(draw(block.neurons) for block in anatomy.blocks),
        tuple(draw(block.groups) for block in anatomy.blocks),
    )


def random_blocks(anatomy: Anatomy, keep: int, seed: int) -> tuple[int, ...]:
    """Which `keep` layers stay, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(anatomy.blocks), generator=generator)
    return tuple(sorted(order[:keep].tolist()))
