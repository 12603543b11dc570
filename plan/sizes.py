"""Counts the bytes of a run that do not depend on the batch: weights, gradients, optimizer state, copies."""

from __future__ import annotations

from math import prod

import psutil
import torch

from ..models.facts import ModelFacts
from ..optimizers import state_bytes
from ..recipes import Recipe
from .memory import Sizes
from .precision import Precision
from .trained import Trained

_BLOCK = 64  # weights that share a scale in bitsandbytes' 4-bit types
_SCALES_TOGETHER = 256  # scales that share a scale of theirs with double quantisation


def count_sizes(
    recipe: Recipe, facts: ModelFacts, trained: Trained, precision: Precision, *, libraries: int
) -> Sizes:
    """Sizes in bytes. `libraries`: see `resident_bytes`."""
    itemsize = precision.dtype.itemsize
    unquantised = facts.parameters * itemsize
    own_bytes = itemsize * sum(prod(shape) for shape in trained.own)
    added_bytes = 4 * trained.added_parameters  # adapters are float32
    state_dtype = torch.float32 if trained.added else precision.dtype
    merged = 0 if recipe.export.final in ("adapter", "none") else unquantised
    # PEFT trains a copy of `modules_to_save` beside the frozen original; `own` names only those without one.
    return Sizes(
        weights=_four_bit_bytes(recipe, facts, itemsize) if recipe.model.load_in_4bit else unquantised,
        unquantised=unquantised,
        adapter=added_bytes,
        gradients=own_bytes + added_bytes,
        optimizer=state_bytes(recipe.optimizer, trained.shapes, state_dtype),
        largest=max(prod(shape) for _, shape in facts.parameter_shapes) * itemsize,
        libraries=libraries,
        merged=merged,
    )


def resident_bytes() -> int:
    """Resident memory of this process with a run's libraries imported: what is there before the model."""
    import peft  # noqa: F401 - imported for its weight in memory
    import transformers  # noqa: F401

    return int(psutil.Process().memory_info().rss)


def _four_bit_bytes(recipe: Recipe, facts: ModelFacts, itemsize: int) -> int:
    """A nibble a weight, and the scales; embeddings, norms and the output head stay as they are."""
    packed = sum(
        linear.in_features * linear.out_features * linear.count
        for linear in facts.linear_modules
        if linear.out_features != facts.vocab_size
    )
    scales = packed // _BLOCK
    scale_bytes = 4 * scales
    if recipe.model.bnb_4bit_use_double_quant:
        scale_bytes = scales + 4 * (scales // _SCALES_TOGETHER)
    return packed // 2 + scale_bytes + (facts.parameters - packed) * itemsize
