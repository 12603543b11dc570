"""What one process holds of the training state under an engine that shards: bytes by part, and one line why.

Counted in trained elements E, W processes and b bytes of a trained weight (4, or 2 in bfloat16):

    DeepSpeed's ZeRO (arXiv:1910.02054, section 5)     a process holds
      optimizer, from stage 1                          12 E / W: float32 weight and two moments
      gradients, from stage 2                          b E / W
      weights, from stage 3                            all weights / W, and those gathered for the passes
      buckets, from stage 1                            b min(5e8, E): gradients on their way to the others
    FSDP2 (arXiv:2304.11277)
      weights, gradients, optimizer                    weights with trained ones in float32, 4 E, 8 E; all / W

DeepSpeed 0.19 steps a float32 copy also where the weights are float32. State in host memory brings gradients
there: float32 ones to step, and those that add up. ZenFlow has moments and gradients of the columns that it
has chosen on the device, in every process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

from ..recipes import DeepSpeedConfig, Fsdp2Config, NativeEngineConfig, Recipe

BUCKET = 500_000_000
"""Elements that DeepSpeed reduces together at most; its own default."""
LIVE = 1_000_000_000
"""Elements that DeepSpeed's stage 3 holds gathered at most (stage3_max_live_parameters), its own default."""
FLOAT = 4


@dataclass(frozen=True)
class Counts:
    """Of the whole model. weights: bytes as loaded, the adapter's too; elements: of all of it.

    trained: elements, each of `itemsize` bytes; largest: of them in the largest tensor. root: bytes of the
    weights outside the decoder layers, root_trained: elements trained there.
    """

    weights: int
    elements: int
    trained: int
    itemsize: int
    largest: int
    layers: int
    root: int
    root_trained: int
    accumulates: bool


@dataclass(frozen=True)
class Held:
    """Bytes of one process. device, host: by part, while it trains; on a CPU both are the same memory.

    whole: the weights when they are brought together again, for a checkpoint or at the end, beside the
    shards. saved: this process's share of the whole optimizer state, which the main process then holds in
    host memory until it exits. disk: state on the disk.
    """

    device: dict[str, int]
    host: dict[str, int]
    whole: int
    saved: int
    disk: int
    reason: str


def held_by(recipe: Recipe, counts: Counts, *, world_size: int, accelerated: bool) -> Held | None:
    """What the recipe's engine holds in each of `world_size` processes; None for the native one.

    accelerated: an accelerator computes, so that DeepSpeed overlaps reductions with the backward pass.
    """
    match recipe.engine:
        case NativeEngineConfig():
            return None
        case DeepSpeedConfig() as engine:
            return _deepspeed(engine, counts, world_size, accelerated)
        case Fsdp2Config() as engine:
            return _fsdp2(engine, counts, world_size)
        case _ as other:
            assert_never(other)


def _deepspeed(engine: DeepSpeedConfig, counts: Counts, world_size: int, accelerated: bool) -> Held:
    stage, b = engine.zero_stage, counts.itemsize
    shard = -(-counts.trained // world_size)
    away = engine.offload_optimizer
    master = FLOAT if b < FLOAT else 0
    device = {"weights": counts.weights, "gradients": b * counts.trained}
    host: dict[str, int] = {}
    if stage == 0:
        device["optimizer"] = (8 + master) * counts.trained
    else:
        buffers = 2 if accelerated and stage == 2 else 1
        device["buckets"] = buffers * b * min(BUCKET, counts.trained)
    if stage >= 2:
        device["gradients"] = b * shard
    if stage == 3:
        device["weights"] = -(-counts.weights // world_size)
        if engine.zero_hpz_partition_size > 1:
            device["weights"] += counts.weights // engine.zero_hpz_partition_size
        device["gathered"] = int(counts.weights * min(1.0, LIVE / counts.elements))
        if engine.offload_param == "cpu":
            host["weights"] = device.pop("weights")
    if away == "none":
        if stage:
            device["optimizer"] = 12 * shard
    elif away == "cpu":
        host["optimizer"] = 12 * shard
        adding_up = 2 if stage == 2 and counts.accumulates else 1
        host["gradients"] = (FLOAT + adding_up * b) * shard
        if stage >= 2:
            device["gradients"] = 0
        if stage <= 2:
            device["buckets"] += 2 * b * counts.largest
        if engine.zenflow is not None:
            chosen = int(engine.zenflow.topk_ratio * counts.trained)
            device["optimizer"] = 8 * chosen
            device["gradients"] += 2 * b * chosen
            # The bucket, and at a selection its matrices once more.
            device["buckets"] = 2 * b * (counts.trained + counts.largest)
    else:
        host["gradients"] = device.pop("gradients")
        host["buffers"] = engine.buffer_count * FLOAT * min(engine.sub_group_size, shard)
    disk = (12 + FLOAT) * shard if away == "nvme" else 0
    return Held(
        {"weights": 0, "gradients": 0, "optimizer": 0} | device,
        host,
        whole=counts.weights,
        saved=-(-(8 + master) * counts.trained // world_size),
        disk=disk,
        reason=_line(_ZERO[stage], world_size, _STEPS[away]) + (_ZENFLOW if engine.zenflow else ""),
    )


def _fsdp2(engine: Fsdp2Config, counts: Counts, world_size: int) -> Held:
    b, layers = counts.itemsize, max(1, counts.layers)
    whole = counts.weights + (FLOAT - b) * counts.trained
    layer = (counts.weights - counts.root) // layers
    layer_trained = (counts.trained - counts.root_trained) // layers
    shards = {
        "weights": -(-whole // world_size),
        "gradients": -(-FLOAT * counts.trained // world_size),
        "optimizer": -(-8 * counts.trained // world_size),
    }
    # The next layer is gathered while one runs; the unit of the whole stays to the end of the step.
    gathered = counts.root + layer * (2 if engine.reshard_after_forward else layers)
    reduced = (b + FLOAT) * max(layer_trained, counts.root_trained)
    passing = {"gathered": gathered, "buckets": reduced}
    nothing = dict.fromkeys(shards, 0)
    return Held(
        {**nothing, **passing} if engine.cpu_offload else {**shards, **passing},
        shards if engine.cpu_offload else {},
        whole=whole,
        saved=-(-(8 + (FLOAT if b < FLOAT else 0)) * counts.trained // world_size),
        disk=0,
        reason=_line("weights, gradients and optimizer state", world_size, _STEPS["cpu"])
        if engine.cpu_offload
        else _line("weights, gradients and optimizer state", world_size, ""),
    )


_ZERO = {
    0: "",
    1: "optimizer state",
    2: "optimizer state and gradients",
    3: "optimizer state, gradients and weights",
}
_STEPS = {"none": "", "cpu": "; stepped in host memory", "nvme": "; optimizer state on disk, through buffers"}

_ZENFLOW = (
    "; zenflow: nothing is clipped, and divergence shows in the loss alone; moments of the chosen columns "
    "are in no checkpoint: a run that goes on chooses anew"
)


def _line(what: str, world_size: int, steps: str) -> str:
    if not what:
        divided = "each process holds all"
    elif world_size == 1:
        divided = f"{what} in one part: one process divides nothing"
    else:
        divided = f"{what} in {world_size} parts, one a process"
    return f"{divided}{steps}; loaded whole before, brought together at the end"
