"""Counts the bytes of a run that do not depend on the batch: weights, gradients, optimizer state, copies."""

from __future__ import annotations

from math import prod

import psutil
import torch

from ..models.facts import ModelFacts
from ..offload.layer_layout import predicted_bytes
from ..optimizers import gradient_elements, state_bytes, update_cost
from ..optimizers.q_apollo import int8_bytes
from ..recipes import QApollo, Recipe, SvfitAdapter
from ..recipes.offload import Tier
from .engines import Counts, held_by
from .memory import Sizes
from .objectives import Extra
from .precision import Precision
from .trained import Trained
from .weights_code import decoding_bytes

PROBE_TOKENS = 256
"""On which the exported model must agree with the trained one."""
_BLOCK = 64  # weights that share a scale in bitsandbytes' 4-bit types
_SCALES_TOGETHER = 256  # scales that share a scale of theirs with double quantisation


def count_sizes(
    recipe: Recipe,
    facts: ModelFacts,
    trained: Trained,
    precision: Precision,
    *,
    libraries: int,
    extra: Extra | None = None,
    weights_tier: Tier = "device",
    world_size: int = 1,
    accelerated: bool = False,
) -> Sizes:
    """Sizes in bytes. `libraries`: see `resident_bytes`; `extra`: what the objective adds.

    world_size, accelerated: processes, and whether they compute on an accelerator, for engines that shard.
    """
    extra = extra or Extra()
    itemsize = precision.dtype.itemsize
    whole = facts.parameters * itemsize
    stream = None
    if weights_tier != "device":
        stream = predicted_bytes(facts.parameter_shapes, itemsize=itemsize)
    held = _held_bytes(recipe, facts, trained, itemsize) if stream is None else stream.memory
    factor_bytes = (itemsize if isinstance(recipe.adapter, SvfitAdapter) else 4) * trained.factors
    held += factor_bytes
    own_bytes = itemsize * sum(slot.elements for slot in trained.own)
    added_bytes = 4 * trained.added_parameters  # adapters are float32
    merged = 0 if recipe.export.final in ("adapter", "none") else whole
    # PEFT trains a copy of `modules_to_save` beside the frozen original; `own` names only those without one.
    return Sizes(
        weights=held,
        unquantised=whole + factor_bytes if stream is None else held,
        adapter=added_bytes,
        adapter_file=added_bytes + 4 * trained.factors,
        trained=own_bytes + added_bytes,
        gradients=gradient_bytes(recipe, trained, itemsize),
        optimizer=state_bytes(recipe.optimizer, trained.slots, state_dtype(trained, precision)),
        update=update_cost(recipe.optimizer, trained.slots, state_dtype(trained, precision)),
        largest=max(prod(shape) for _, shape in facts.parameter_shapes) * itemsize,
        libraries=libraries,
        merged=merged if stream is None else 0,
        compared=0 if recipe.export.final == "none" else 2 * PROBE_TOKENS * facts.vocab_size * itemsize,
        reference=own_bytes + added_bytes if extra.reference else 0,
        teacher=extra.teacher.bytes if extra.teacher is not None else 0,
        teacher_first=extra.teacher is not None and extra.teacher.stored,
        weights_tier=weights_tier,
        streamed=0 if stream is None else stream.store,
        decoding=decoding_bytes(recipe, weights_tier, precision.weights),
        exported=0 if stream is None else merged,
        held=held_by(
            recipe,
            _counts(recipe, facts, trained, precision, weights=held + added_bytes),
            world_size=world_size,
            accelerated=accelerated,
        ),
    )


def _counts(
    recipe: Recipe, facts: ModelFacts, trained: Trained, precision: Precision, *, weights: int
) -> Counts:
    """What an engine that shards is counted from."""
    outside = [slot.elements for slot in trained.slots if slot.role in ("embedding", "head")]
    return Counts(
        weights=weights,
        elements=facts.parameters + trained.added_parameters,
        trained=trained.parameters,
        itemsize=state_dtype(trained, precision).itemsize,
        largest=max((slot.elements for slot in trained.slots), default=0),
        layers=facts.layers,
        root=precision.dtype.itemsize * facts.embedding_parameters,
        root_trained=sum(outside),
        accumulates=accumulates(recipe),
    )


def state_dtype(trained: Trained, precision: Precision) -> torch.dtype:
    """Type of the trained weights, which the optimizer's state follows: adapters are float32."""
    return torch.float32 if trained.added else precision.dtype


def checkpoint_bytes(sizes: Sizes) -> int:
    """A checkpoint: the trained weights twice (trained, best or exported), the optimizer, the reference."""
    return 2 * sizes.trained + sizes.optimizer + sizes.reference


def gradient_bytes(recipe: Recipe, trained: Trained, itemsize: int) -> int:
    """Bytes of the gradients that are alive together."""
    own = gradient_elements(recipe.optimizer, trained.own, accumulates=accumulates(recipe))
    added = gradient_elements(recipe.optimizer, trained.added, accumulates=accumulates(recipe))
    return itemsize * own + 4 * added


def accumulates(recipe: Recipe) -> bool:
    """Whether a step may have several micro-batches; with step_in_backward only where the recipe says so."""
    steps = recipe.train.gradient_accumulation_steps
    return steps != 1 and (steps is not None or not getattr(recipe.optimizer, "step_in_backward", False))


def steps_in_backward(recipe: Recipe) -> bool:
    """Whether each weight takes its step as soon as its gradient is known."""
    return bool(getattr(recipe.optimizer, "step_in_backward", False)) and not accumulates(recipe)


def measures_first(recipe: Recipe) -> bool:
    """Whether a step runs forward and backward once more, to know the gradient's norm before it steps."""
    optimizer = recipe.optimizer
    exact = getattr(optimizer, "clipping", None) == "exact" and optimizer.max_grad_norm is not None
    return steps_in_backward(recipe) and exact


def resident_bytes() -> int:
    """Resident memory of this process with a run's libraries imported: what is there before the model."""
    import peft  # noqa: F401 - imported for its weight in memory
    import transformers  # noqa: F401

    return int(psutil.Process().memory_info().rss)


def _held_bytes(recipe: Recipe, facts: ModelFacts, trained: Trained, itemsize: int) -> int:
    """Bytes of the weights as they are held while training."""
    if recipe.model.load_in_4bit:
        return _four_bit_bytes(recipe, facts, itemsize)
    whole = facts.parameters * itemsize
    if not isinstance(recipe.optimizer, QApollo):
        return whole
    coded = [slot for slot in trained.own if slot.role == "matrix" and len(slot.shape) == 2]
    saved = sum(itemsize * s.elements - int8_bytes(s.shape, recipe.optimizer.group_size) for s in coded)
    return whole - saved


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
