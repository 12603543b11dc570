"""One cut of a model by a recipe: the training rows that its criterion looks at, and the call."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import Prepared, TokenRows
from ..pruning import Amounts, Anatomy, Pruned, amounts_for, prune
from ..recipes import PruningConfig

LENGTH = 512
_TOKENS = {"cpu": 8192}
_TOKENS_ON_GPU = 131_072
_TOGETHER = 4096  # tokens in one forward pass


def calibration_tokens(given: int | None, device: torch.device) -> int:
    """The recipe's number, or for auto what the device reads in some seconds."""
    return _TOKENS.get(device.type, _TOKENS_ON_GPU) if given is None else given


def calibration_batches(rows: TokenRows, tokens: int, longest: int) -> list[Tensor]:
    """Batches [sequences, length] of about `tokens` ids, cut from the rows one after the other as they lie.

    length: 512, or `longest` where the model reads less. The pieces are spread evenly over all rows; fewer
    where the rows have fewer. A row may begin or end within a piece, as rows do that are packed.
    """
    first, last = int(rows.offsets[0]), int(rows.offsets[-1])
    length = max(1, min(LENGTH, longest, tokens, last - first))
    most = (last - first) // length
    wanted = max(1, min(tokens // length, most))
    starts = first + length * (np.arange(wanted) * most // wanted)
    pieces = np.stack([np.asarray(rows.tokens[start : start + length]) for start in starts])
    ids = torch.from_numpy(pieces.astype(np.int64))
    return list(torch.split(ids, max(1, _TOGETHER // length)))


def amounts_wanted(anatomy: Anatomy, pruning: PruningConfig) -> Amounts:
    """What stays in the end. UserError where the model cannot lose as much."""
    return amounts_for(
        anatomy,
        pruning.ratio,
        parts=pruning.chosen_parts,
        multiple=pruning.multiple,
        compensate=pruning.compensate,
    )


def refits(pruning: PruningConfig) -> bool:
    """Whether down_proj is fitted again, which is worth more than the choice of the criterion."""
    if pruning.refit is None:
        return "neurons" in pruning.chosen_parts and not pruning.compensate
    return pruning.refit


def prune_now(
    model: Any,
    pruning: PruningConfig,
    data: Prepared,
    device: torch.device,
    longest: int,
    *,
    seed: int,
    ratio: float | None = None,
    tokens: int | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Pruned:
    """One cut of `model` in place by the recipe's section. ratio, tokens: others than the recipe's."""
    wanted = calibration_tokens(pruning.calibration_tokens, device) if tokens is None else tokens
    return prune(
        model,
        calibration_batches(data.train, wanted, longest),
        method=pruning.name,
        ratio=pruning.ratio if ratio is None else ratio,
        parts=pruning.chosen_parts,
        multiple=pruning.multiple,
        refit=refits(pruning),
        ridge=pruning.ridge,
        compensate=pruning.compensate,
        ratio_of=pruning.ratio_of,
        latency_tokens=pruning.latency_tokens,
        seed=seed,
        device=device,
        optimizer=optimizer,
    )
