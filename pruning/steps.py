"""Pruning in steps: how much has gone by when, and one record for all cuts made so far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .cut import Cut


def ramp(ratio: float, number: int, steps: int) -> float:
    """Share of the first parameters that is gone after step `number` of `steps` (from 1).

    ratio · (1 - (1 - number/steps)^3), the cubic ramp of arXiv:1710.01878, equation 1: most leaves early,
    while there is training left to repair it.
    """
    return ratio * (1 - (1 - number / steps) ** 3)


def followed_by(first: Cut, second: Cut) -> Cut:
    """One cut of the first model that does what `first` and then `second`, of the smaller one, do.

    Of neurons, groups and blocks; weights and biases that a cut brings are not carried over.
    """
    neurons, groups = list(first.neurons), list(first.groups)
    for position, index in enumerate(first.blocks):
        neurons[index] = first.neurons[index][second.neurons[position]]
        groups[index] = first.groups[index][second.groups[position]]
    return Cut(tuple(neurons), tuple(groups), tuple(first.blocks[position] for position in second.blocks))


def cut_to_json(cut: Cut, widths: Mapping[str, int]) -> dict[str, Any]:
    """Plain values: what stays as one hexadecimal number a layer, bit i for unit i of `widths` before."""
    return {
        "blocks": list(cut.blocks),
        "neurons": [_to_hex(kept) for kept in cut.neurons],
        "groups": [_to_hex(kept) for kept in cut.groups],
        "widths": dict(widths),
    }


def cut_from_json(value: Mapping[str, Any]) -> Cut:
    """What `cut_to_json` gave. ValueError or a kin: it is nothing of the kind."""
    widths = value["widths"]
    return Cut(
        tuple(_from_hex(text, int(widths["neurons"])) for text in value["neurons"]),
        tuple(_from_hex(text, int(widths["groups"])) for text in value["groups"]),
        tuple(int(index) for index in value["blocks"]),
    )


def _to_hex(kept: Tensor) -> str:
    return f"{sum(1 << index for index in kept.tolist()):x}"


def _from_hex(text: str, width: int) -> Tensor:
    bits = int(text, 16)
    if not 0 <= bits < 1 << width:
        raise ValueError(f"more than {width} units")
    return torch.tensor([index for index in range(width) if bits >> index & 1], dtype=torch.int64)
