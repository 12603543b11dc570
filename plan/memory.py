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


@dataclass(frozen=True)
class Footprint:
    """Predicted peaks. device is empty on a CPU. phases: totals on the tier that computes."""

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


def footprint(device: str, sizes: Sizes, activations: int, logits: int) -> Footprint:
    """Peaks of a run on `device` ("cpu" or "cuda") whose longest batch needs `activations` + `logits`."""
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
    }
    # The optimizer's state still lives; the merged model is held once and loaded once more to be compared.
    export: Parts = {
        "weights": max(sizes.weights, sizes.merged) + sizes.adapter,
        "optimizer": sizes.optimizer,
        "exported copy": sizes.merged,
    }
    if device == "cpu":
        phases = {"load": load, "train": train, "export": export}
        for parts in phases.values():
            parts["libraries"] = sizes.libraries
        quantised = sizes.unquantised != sizes.weights
        share = HOST_SLACK_SHARE_4BIT if quantised else HOST_SLACK_SHARE
        train["other"] = int(HOST_SLACK_BYTES + share * (activations + logits))
        load["other"] = export["other"] = HOST_SLACK_BYTES
        peak = max(phases.values(), key=lambda parts: sum(parts.values()))
        return Footprint({}, peak, {name: sum(parts.values()) for name, parts in phases.items()})

    train["other"] = int(CUDA_CONTEXT_BYTES + 0.05 * (activations + logits))
    merging = {"weights": sizes.weights + sizes.adapter, "merged": sizes.merged, "other": CUDA_CONTEXT_BYTES}
    phases = {"load": {"weights": sizes.weights, "loading": sizes.largest}, "train": train, "export": merging}
    peak = max(phases.values(), key=lambda parts: sum(parts.values()))
    host = {
        "libraries": sizes.libraries,
        # A checkpoint goes through host memory; the exported copy is compared there.
        "copies": max(sizes.adapter + sizes.optimizer, 2 * sizes.merged, sizes.unquantised),
        "other": HOST_SLACK_BYTES,
    }
    return Footprint(peak, host, {name: sum(parts.values()) for name, parts in phases.items()})
