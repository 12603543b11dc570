"""What `pruning.json` says: what was asked for, what stayed, and hashes of what it was judged by."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .cut import Cut
from .latency import Latency


def describe(
    asked: Mapping[str, Any],
    cut: Cut,
    before: int,
    after: int,
    batches: Sequence[Tensor],
    latency: Latency | None,
) -> dict[str, Any]:
    """Plain values: `asked` as it is, counts of parameters, and the indices that stayed in each layer.

    `rotary_pairs` and `value_width` hold the layers whose heads were narrowed, by their index as text.
    """
    return {
        **asked,
        "ratio": 1 - after / before,
        "parameters_before": before,
        "parameters": after,
        "blocks": list(cut.blocks),
        "neurons": [kept.tolist() for kept in cut.neurons],
        "groups": [kept.tolist() for kept in cut.groups],
        "rotary_pairs": {str(index): kept.tolist() for index, kept in cut.pairs.items()},
        "value_width": {str(index): values.width for index, values in cut.values.items()},
        "latency": None if latency is None else dataclasses.asdict(latency),
        "calibration_sha256": digest(batches),
        "calibration_tokens": sum(ids.numel() for ids in batches),
    }


def digest(tensors: Sequence[Tensor]) -> str:
    """SHA-256 of shapes and values."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(str((tuple(tensor.shape), tensor.dtype)).encode())
        total.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()
