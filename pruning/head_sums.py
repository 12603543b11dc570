"""Sums over calibration tokens of what q_proj, k_proj and v_proj give: what narrower heads are chosen by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .anatomy import Block
from .modegpt_heads import HeadStats
from .statistics import ROWS


class HeadSums:
    """Hooks on the three projections of one block, until the caller removes them; sums in float64.

    Before rotary positions: these turn a pair, whose norm stays.
    """

    def __init__(self, block: Block, device: torch.device) -> None:
        self.block = block
        shape = (block.groups, block.value_dim, block.value_dim)
        self.queries = torch.zeros(block.q.out_features, dtype=torch.float64, device=device)
        self.keys = torch.zeros(block.k.out_features, dtype=torch.float64, device=device)
        self.values = torch.zeros(shape, dtype=torch.float64, device=device)
        self.hooks = [
            block.q.register_forward_hook(self._queries),
            block.k.register_forward_hook(self._keys),
            block.v.register_forward_hook(self._values),
        ]

    def result(self) -> HeadStats:
        """The sums, on the host."""
        return HeadStats(self.queries.cpu(), self.keys.cpu(), self.values.cpu())

    def _queries(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        for rows in torch.split(output.flatten(0, -2), ROWS):
            self.queries += rows.double().square().sum(dim=0)

    def _keys(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        for rows in torch.split(output.flatten(0, -2), ROWS):
            self.keys += rows.double().square().sum(dim=0)

    def _values(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        for rows in torch.split(output.flatten(0, -2), ROWS):
            heads = rows.double().reshape(len(rows), self.block.groups, -1).transpose(0, 1)
            self.values += heads.transpose(1, 2) @ heads
