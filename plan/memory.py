"""Memory by part and by phase: pure arithmetic over sizes that were counted or measured elsewhere.

A run has three phases that may be its peak: loading, training at the longest batch, exporting. The
prediction is the largest of them, never a sum over phases.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..offload.model import Traffic
from ..optimizers import Cost
from ..recipes.offload import Tier
from .defaults import (
    CUDA_CONTEXT_BYTES,
    HOST_SLACK_BYTES,
    HOST_SLACK_SHARE,
    HOST_SLACK_SHARE_4BIT,
    LOAD_BUFFER_BYTES,
)
from .engines import Held

Parts = dict[str, int]


@dataclass(frozen=True)
class Moved:
    """Where the optimizer's state lives, in bytes. Nothing but the tier where that is the device.

    ring: buffers in host memory that state on disk passes through. resident: tensors too small to move.
    elsewhere: of the segments, in host memory or on disk. step: read from disk and written back in a step.
    updated_on_host: whether the CPU updates what an accelerator trains; then the state does not cross over.
    """

    tier: Tier = "device"
    ring: int = 0
    resident: int = 0
    elsewhere: int = 0
    step: Traffic = field(default_factory=Traffic)
    updated_on_host: bool = False


@dataclass(frozen=True)
class Sizes:
    """Bytes that do not depend on the batch.

    weights: the base as it is held. unquantised: the base in its unquantised type (equal without 4 bits).
    adapter, gradients, optimizer: what training adds. trained: the trained weights, the adapter's too.
    largest: the largest tensor of the base. update: what a step of the optimizer moves and multiplies.
    libraries: resident memory of this process before anything of the model is loaded.
    merged: the model that the export writes and loads again to compare (0 where it exports an adapter).
    compared: logits of the two models that the export compares.
    reference: a frozen copy of the trained weights. teacher: the weights of a second model, which with
    teacher_first is there before training only. moved: what of the optimizer's state is not on the device.
    streamed: of the layers whose weights are on `weights_tier` and come when they are needed; weights and
    unquantised are then what is in memory of the base. exported: of the model that the export writes layer by
    layer, and that is never in memory at once. decoding: host memory that decoding streamed layers takes.
    adapter_file: of the adapter as it is exported. held: what an engine that shards holds while it trains, in
    place of weights, gradients and optimizer.
    """

    weights: int
    unquantised: int
    adapter: int
    trained: int
    gradients: int
    optimizer: int
    update: Cost
    largest: int
    libraries: int
    merged: int
    compared: int = 0
    reference: int = 0
    teacher: int = 0
    teacher_first: bool = False
    moved: Moved = field(default_factory=Moved)
    weights_tier: Tier = "device"
    streamed: int = 0
    decoding: int = 0
    exported: int = 0
    adapter_file: int = 0
    held: Held | None = None

    @property
    def state(self) -> int:
        """Bytes of the optimizer's state on the device; of one that is in shards what it is at the end."""
        if self.held is not None:
            return self.held.saved
        return self.optimizer if self.moved.tier == "device" else self.moved.resident


@dataclass(frozen=True)
class Footprint:
    """Predicted peaks by part. device is empty on a CPU. phases: totals on the tier that computes."""

    device: Parts
    host: Parts
    phases: dict[str, int]

    @property
    def device_total(self) -> int:
        """Bytes on the accelerator at the peak."""
        return sum(self.device.values())

    @property
    def host_total(self) -> int:
        """Bytes in host memory at the peak."""
        return sum(self.host.values())


def footprint(
    device: str, sizes: Sizes, activations: int, logits: int, teacher_activations: int = 0
) -> Footprint:
    """Peaks of a run on `device` ("cpu" or "cuda") whose longest batch needs `activations` + `logits`.

    teacher_activations: of a teacher that runs before training.
    """
    beside = _beside(sizes)
    load: Parts = {"weights": sizes.weights, "loading": LOAD_BUFFER_BYTES}
    if sizes.unquantised != sizes.weights:
        # The unquantised weights are read whole before bitsandbytes packs them.
        load["loading"] += sizes.unquantised
    passes: Parts = {"activations": activations, "logits": logits, **beside}
    train: Parts = {
        "weights": sizes.weights + sizes.adapter,
        "gradients": sizes.gradients,
        "optimizer": sizes.state,
        **passes,
    }
    gather: dict[str, Parts] = {}
    if sizes.held is not None:
        train = {**sizes.held.device, **passes}
        gather["gather"] = {**_gathering(sizes.held), **beside}
    # The optimizer still lives, and with it what it trains; the frozen base is freed before the merged model
    # is loaded and compared.
    export: Parts = {
        "weights": max(sizes.weights, sizes.merged) + sizes.adapter,
        "optimizer": sizes.state,
        "exported copy": min(sizes.merged, sizes.trained - sizes.adapter),
        "compared": sizes.compared,
        **beside,
    }
    first: dict[str, Parts] = {}
    if sizes.teacher_first:
        first["teacher"] = {
            "weights": sizes.weights + sizes.adapter,
            "teacher": sizes.teacher,
            "activations": teacher_activations,
        }
    if device == "cpu":
        if sizes.held is not None:  # host memory is the device
            train = _sum(train, sizes.held.host)
            gather["gather"] = _sum(gather["gather"], sizes.held.host, {"state to save": sizes.held.saved})
        phases = {"load": load, **first, "train": train, **gather, "export": export}
        for parts in phases.values():
            parts["libraries"] = sizes.libraries
            parts["other"] = HOST_SLACK_BYTES
        quantised = sizes.unquantised != sizes.weights
        share = HOST_SLACK_SHARE_4BIT if quantised else HOST_SLACK_SHARE
        train["other"] = int(HOST_SLACK_BYTES + share * (activations + logits))
        if sizes.moved.ring:
            train["ring"] = export["ring"] = sizes.moved.ring
        if sizes.decoding:
            load["decoding"] = train["decoding"] = export["decoding"] = sizes.decoding
        for parts in first.values():
            parts["other"] = int(HOST_SLACK_BYTES + share * teacher_activations)
        peak = max(phases.values(), key=lambda parts: sum(parts.values()))
        return Footprint({}, peak, {name: sum(parts.values()) for name, parts in phases.items()})

    train["other"] = int(CUDA_CONTEXT_BYTES + 0.05 * (activations + logits))
    merging = {
        "weights": sizes.weights + sizes.adapter,
        "merged": sizes.merged,
        **beside,
        "other": CUDA_CONTEXT_BYTES,
    }
    for parts in first.values():
        parts["other"] = int(CUDA_CONTEXT_BYTES + 0.05 * teacher_activations)
    loading = {"weights": sizes.weights, "loading": sizes.largest}
    for parts in gather.values():
        parts["other"] = CUDA_CONTEXT_BYTES
    phases = {"load": loading, **first, "train": train, **gather, "export": merging}
    peak = max(phases.values(), key=lambda parts: sum(parts.values()))
    host = {"libraries": sizes.libraries, **_on_host(sizes), "other": HOST_SLACK_BYTES}
    return Footprint(peak, host, {name: sum(parts.values()) for name, parts in phases.items()})


def _on_host(sizes: Sizes) -> Parts:
    """What a run on an accelerator keeps in host memory."""
    read_or_compared = max(2 * sizes.merged, sizes.unquantised, sizes.teacher)
    if sizes.held is not None:
        saved = {"state to save": sizes.held.saved}
        training = {**sizes.held.host, **saved, "copies": sizes.adapter + sizes.reference}
        return max(training, {**saved, "copies": read_or_compared}, key=lambda parts: sum(parts.values()))
    host = {
        # A checkpoint goes through host memory, but for state that is elsewhere, which is copied piece by
        # piece; the exported copy is compared there.
        "copies": max(sizes.adapter + sizes.state + sizes.reference, read_or_compared),
    }
    if sizes.weights_tier == "host":
        host["weights"] = sizes.streamed
    if sizes.moved.tier == "host":
        host["optimizer"] = sizes.moved.elsewhere
    if sizes.moved.ring:
        host["ring"] = sizes.moved.ring
    if sizes.decoding:
        host["decoding"] = sizes.decoding
    return host


def _gathering(held: Held) -> Parts:
    """On the device when weights are brought together: between two steps, so without gradients."""
    return {
        "weights": held.device["weights"],
        "gathered": held.whole,
        "optimizer": held.device["optimizer"],
    }


def _sum(*all_parts: Parts) -> Parts:
    """Parts added up by name."""
    names = dict.fromkeys(name for parts in all_parts for name in parts)
    return {name: sum(parts.get(name, 0) for parts in all_parts) for name in names}


def _beside(sizes: Sizes) -> Parts:
    """What the objective holds from the start of training to the end of the process."""
    parts = {"reference": sizes.reference, "teacher": 0 if sizes.teacher_first else sizes.teacher}
    return {name: size for name, size in parts.items() if size}
