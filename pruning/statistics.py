"""What one pass over calibration tokens leaves of a linear layer's input: mean, variance, sums of squares."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .modegpt_heads import HeadStats

# Rows that are converted to float64 at once: bounds the copy at 4096 · 8 bytes a channel.
ROWS = 4096


@dataclass
class Channels:
    """Moments of n channels over the tokens seen so far, in float64.

    `deviations` is Σ_t (x_t − mean)², joined batch by batch (Chan, Golub and LeVeque 1979): a variance that
    is small beside its mean keeps its digits, which E[x²] − E[x]² would lose.
    """

    mean: Tensor
    deviations: Tensor
    count: int = 0

    @classmethod
    def empty(cls, channels: int, device: torch.device) -> Channels:
        """No tokens yet."""
        zeros = torch.zeros(channels, dtype=torch.float64, device=device)
        return cls(zeros, zeros.clone())

    def add(self, x: Tensor) -> None:
        """Take in tokens: x [tokens, n] of any floating type."""
        for part in torch.split(x, ROWS):
            rows = part.double()
            mean = rows.mean(dim=0)
            deviations = (rows - mean).square().sum(dim=0)
            total = self.count + len(rows)
            shift = mean - self.mean
            self.deviations += deviations + shift.square() * (self.count * len(rows) / total)
            self.mean += shift * (len(rows) / total)
            self.count = total

    @property
    def variance(self) -> Tensor:
        """Σ (x − mean)² / tokens, [n]."""
        return self.deviations / self.count

    @property
    def squares(self) -> Tensor:
        """Σ x², [n]."""
        return self.deviations + self.count * self.mean.square()

    @property
    def norm(self) -> Tensor:
        """√Σ x², [n]."""
        return self.squares.sqrt()

    def to(self, device: torch.device) -> Channels:
        """The same on another device."""
        return Channels(self.mean.to(device), self.deviations.to(device), self.count)


@dataclass(frozen=True)
class BlockStats:
    """What the methods ask about one block, on the host.

    `mlp` and `attention` describe the inputs of down_proj and of o_proj. `angular` is the mean over tokens of
    arccos(cos(x_in, x_out))/π and `influence` the mean of 1 − cos (Block Influence, arXiv 2403.03853), of the
    block's input and output. `covariance` is Σ_t h_t h_tᵀ of down_proj's input, float64 [D, D], uncentred;
    None when it was not asked for, and so is `heads`.
    """

    index: int
    sequences: int
    mlp: Channels
    attention: Channels
    angular: float
    influence: float
    covariance: Tensor | None
    heads: HeadStats | None = None
