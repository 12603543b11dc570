"""Where the optimizer's state may live, and what it holds and moves there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..offload.model import Traffic, step_traffic
from ..offload.place import LEAST_BUFFERS
from ..offload.segments import cut_into_segments
from ..offload.support import supports
from ..optimizers import adamw, state_bytes
from ..optimizers.build import asks_for_own_adamw
from ..optimizers.roles import Slot
from ..recipes import AdamW, DpoObjective, Lion, LoraAdapter, OffloadConfig, OptimizerConfig, QApollo, Recipe
from ..recipes.errors import UserError, in_columns
from ..recipes.offload import Tier
from .memory import Moved, Sizes
from .sizes import steps_in_backward

SCRATCH = ".offload"
"""Folder of the scratch files in output_dir, where the recipe names none."""

_STARTS_FROM_WEIGHTS = ("pissa", "olora", "loftq", "corda")


def scratch_folder(recipe: Recipe) -> Path:
    """Where the scratch files lie."""
    return Path(recipe.offload.disk_path or Path(recipe.output_dir) / SCRATCH)


def tiers_to_try(recipe: Recipe, device: str, on_disk: Callable[[], Sizes]) -> tuple[Tier, ...]:
    """Tiers of the optimizer's state: the one given, else those that may save memory, the quickest first.

    device: "cpu", where host memory is the device, or "cuda". on_disk: sizes with the state there.
    UserError: the tier given is none to which this optimizer's state can go.
    """
    if recipe.engine.name != "native":  # which has its own ways to move state
        return ("device",)
    given = recipe.offload.optimizer
    if given == "host" and device == "cpu":
        given = "device"
    reason = supports(recipe.optimizer)
    if given in ("host", "disk") and reason is not None:
        raise UserError(
            in_columns(
                [
                    (
                        "offload.optimizer",
                        f"{given} was given, but the state of optimizer.name={recipe.optimizer.name} stays:\n"
                        f"{reason}.\nLeave it out: offload.optimizer=auto",
                    )
                ]
            )
        )
    if given is not None:
        return (given,)
    if reason is not None:
        return ("device",)
    tiers: list[Tier] = ["device"]
    sizes = on_disk()
    if device != "cpu" and sizes.state < sizes.optimizer:
        tiers.append("host")
    if saves_on_disk(sizes):
        tiers.append("disk")
    return tuple(tiers)


def saves_on_disk(sizes: Sizes) -> bool:
    """Whether state that is on disk leaves some memory free, its buffers counted."""
    return sizes.moved.step.written > 0 and sizes.moved.ring + sizes.moved.resident < sizes.optimizer


def tier_of_weights(recipe: Recipe, device: str) -> Tier:
    """Where the layers' weights are. UserError: these weights cannot be streamed."""
    given = recipe.offload.weights
    if given == "device" or (given == "host" and device == "cpu"):
        return "device"
    reason = _why_not_streamed(recipe)
    if reason is None:
        return given
    raise UserError(
        in_columns([("offload.weights", f"{given} was given, but {reason}, or offload.weights=device")])
    )


def _why_not_streamed(recipe: Recipe) -> str | None:
    """What of the recipe needs all weights at once, and what to set in its place."""
    adapter = recipe.adapter
    if recipe.model.load_in_4bit:
        return "packed 4-bit weights are not streamed.\nLeave one out: model.load_in_4bit=false"
    if isinstance(recipe.optimizer, QApollo):
        return "its int8 weights are not streamed.\nTake another optimizer: optimizer=apollo"
    if recipe.train.wta_crs_ratio is not None:
        return "sampled weight gradients are not streamed.\nSet train.wta_crs_ratio=null"
    if adapter is not None and not isinstance(adapter, LoraAdapter):
        return f"adapter={adapter.name} needs all weights at once at its start.\nSet adapter=lora"
    if adapter is not None:
        if adapter.use_dora:
            return "DoRA starts from the norms of all weights.\nSet adapter.use_dora=false"
        if str(adapter.init_lora_weights).startswith(_STARTS_FROM_WEIGHTS):
            return (
                f"adapter.init_lora_weights={adapter.init_lora_weights} starts from all weights.\n"
                "Set adapter.init_lora_weights=true"
            )
        return None
    if isinstance(recipe.objective, DpoObjective):
        return "preferences need a copy of the trained weights.\nTrain an adapter: adapter=lora"
    if not steps_in_backward(recipe):
        return (
            "a weight that is trained must take its step while it is there, in the backward pass of one\n"
            "micro-batch. Set optimizer.step_in_backward=true and leave train.gradient_accumulation_steps at "
            "auto,\nor train an adapter: adapter=lora"
        )
    return None


def move_state(
    tier: Tier,
    config: OptimizerConfig,
    slots: Sequence[Slot],
    dtype: torch.dtype,
    offload: OffloadConfig,
    *,
    accelerated: bool,
    same_way: bool = False,
) -> Moved:
    """What it takes to hold the state of `slots`, trained in `dtype`, on `tier`.

    accelerated: an accelerator computes, and host memory is another tier than the device. same_way: it steps
    inside the backward pass.
    """
    if tier == "device" or not slots:
        return Moved()
    segments = cut_into_segments(
        [
            (torch.empty(slot.shape, dtype=dtype, device="meta"), {"slot": slot})
            for slot in _by_group(config, slots)
        ],
        lambda weight, group: _layout(config, group["slot"], weight),
        lambda _, group: _is_elementwise(config, group["slot"]),
        int(offload.buffer_size),
    )
    sizes = [segment.nbytes for segment in segments]
    count = max(LEAST_BUFFERS, min(offload.buffer_count, len(sizes)))
    has_master = isinstance(config, AdamW) and config.weights == "master" and dtype.itemsize == 2
    payload = sum(
        field.numel * field.dtype.itemsize
        for segment in segments
        for piece in segment.pieces
        for field in piece.fields
    )
    return Moved(
        tier,
        ring=count * max(sizes, default=0) if tier == "disk" else 0,
        resident=max(0, state_bytes(config, slots, dtype) - payload),
        elsewhere=sum(sizes),
        step=step_traffic(sizes, count, same_way=same_way) if tier == "disk" else Traffic(),
        updated_on_host=accelerated and has_master and offload.update != "device",
    )


def _by_group(config: OptimizerConfig, slots: Sequence[Slot]) -> Iterator[Slot]:
    """In the order of the optimizer's groups: by rule and by weight decay."""
    groups: dict[tuple[bool, bool], list[Slot]] = {}
    for slot in slots:
        groups.setdefault((_is_elementwise(config, slot), len(slot.shape) >= 2), []).append(slot)
    for group in groups.values():
        yield from group


def _layout(config: OptimizerConfig, slot: Slot, weight: Tensor) -> dict[str, Tensor]:
    """State of one trained tensor on the meta device: exact where it can be cut, else as one run of bytes."""
    if not _is_elementwise(config, slot):
        whole = state_bytes(config, [slot], weight.dtype)
        return {"state": torch.empty(whole, dtype=torch.uint8, device="meta")}
    if isinstance(config, AdamW) and not asks_for_own_adamw(config, weight.dtype):
        return {"exp_avg": weight, "exp_avg_sq": weight}
    state: dict[str, Any] = {}
    rule = "lion" if isinstance(config, Lion) else "adamw"
    adamw.new_state(state, weight, config.model_dump(include={"state_bits", "weights"}) | {"rule": rule})
    return state


def _is_elementwise(config: OptimizerConfig, slot: Slot) -> bool:
    """Whether AdamW or Lion steps the tensor, element by element, and ranges of it can be stepped alone."""
    by_element = isinstance(config, AdamW | Lion) or slot.role != "matrix"
    return by_element and getattr(config, "state_bits", 32) != 4
