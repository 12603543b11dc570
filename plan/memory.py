"""Memory by part and by phase: pure arithmetic over sizes that were counted or measured elsewhere.

A run has three phases that may be its peak: loading, training at the longest batch, exporting. The
prediction is the largest of them, never a sum over phases.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..optimizers import Cost
from .defaults import (
    CUDA_CONTEXT_BYTES,
    HOST_SLACK_BYTES,
    HOST_SLACK_SHARE,
    HOST_SLACK_SHARE_4BIT,
    LOAD_BUFFER_BYTES,
)

Parts = dict[str, int]


@dataclass(frozen=True)
class Sizes:
    """Bytes that do not depend on the batch.

    weights: the base as it is held. unquantised: the base in its unquantised type (equal without 4 bits).
    adapter, gradients, optimizer: what training adds. trained: the trained weights, the adapter's too.
    largest: the largest tensor of the base. update: what a step of the optimizer moves and multiplies.
    libraries: resident memory of this process before anything of the model is loaded.
    merged: the model that the export writes and loads again to compare (0 where it exports an adapter).
    reference: a frozen copy of the trained weights. teacher: the weights of a second model, which with
    teacher_first is there before training only.
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
    reference: int = 0
    teacher: int = 0
    teacher_first: bool = False


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
    train: Parts = {
        "weights": sizes.weights + sizes.adapter,
        "gradients": sizes.gradients,
        "optimizer": sizes.optimizer,
        "activations": activations,
        "logits": logits,
        **beside,
    }
    # The optimizer's state still lives; the merged model is held once and loaded once more to be compared.
    export: Parts = {
        "weights": max(sizes.weights, sizes.merged) + sizes.adapter,
        "optimizer": sizes.optimizer,
        "exported copy": sizes.merged,
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
        phases = {"load": load, **first, "train": train, "export": export}
        for parts in phases.values():
            parts["libraries"] = sizes.libraries
        quantised = sizes.unquantised != sizes.weights
        share = HOST_SLACK_SHARE_4BIT if quantised else HOST_SLACK_SHARE
        train["other"] = int(HOST_SLACK_BYTES + share * (activations + logits))
        load["other"] = export["other"] = HOST_SLACK_BYTES
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
    phases = {"load": loading, **first, "train": train, "export": merging}
    peak = max(phases.values(), key=lambda parts: sum(parts.values()))
    host = {
        "libraries": sizes.libraries,
        # A checkpoint goes through host memory; the exported copy is compared there.
        "copies": max(
            sizes.adapter + sizes.optimizer + sizes.reference,
            2 * sizes.merged,
            sizes.unquantised,
            sizes.teacher,
        ),
        "other": HOST_SLACK_BYTES,
    }
    return Footprint(peak, host, {name: sum(parts.values()) for name, parts in phases.items()})


def _beside(sizes: Sizes) -> Parts:
    """What the objective holds from the start of training to the end of the process."""
    parts = {"reference": sizes.reference, "teacher": 0 if sizes.teacher_first else sizes.teacher}
    return {name: size for name, size in parts.items() if size}
