"""What it takes to let activations wait in host memory, and whether that is considered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..offload.activation_model import (
    ActivationChoice,
    HostLink,
    LayerCost,
    added_seconds,
    spread,
    swapped_bytes,
)
from ..recipes import Recipe
from ..recipes.offload import Tier
from .measurement import Measurement


@dataclass(frozen=True)
class Swap:
    """What swapping takes.

    seconds: added to a micro-batch, with what is computed again. leaving: bytes on the device of the layer
    whose activations are on their way. host_bytes: of all that wait in host memory.
    """

    seconds: float
    leaving: int
    host_bytes: int


def when_to_swap(
    recipe: Recipe, device: str, weights_tier: Tier, link: float
) -> Literal["never", "auto", "always"]:
    """Whether activations may go to host memory: where that is another memory than the device's.

    link: bytes a second between the two, 0 where that is not known; then only the recipe's word counts.
    """
    given = recipe.offload.activations
    if device == "cpu" or weights_tier != "device" or recipe.engine.name != "native" or given == "device":
        return "never"
    if given == "host":
        return "always"
    return "auto" if link else "never"


def swap_cost(
    kept: Measurement,
    again: Measurement,
    *,
    layers: int,
    recomputed: int,
    swapped: int,
    micro: int,
    worst: int,
    link: float,
) -> Swap:
    """By the model of `offload.activation_model`, with a layer as it was measured.

    kept, again: measured without and with all layers computed again. micro, worst: tokens of the usual
    micro-batch and of the largest one. link: bytes a second each way; with 0 copies are taken to be free.
    """

    def layer(tokens: int) -> LayerCost:
        seconds = (again.seconds.at(layers, tokens) - kept.seconds.at(layers, tokens)) / layers
        return LayerCost(
            kept=int(kept.saved.per_layer + kept.saved.per_layer_token * tokens),
            input=int(again.saved.per_layer + again.saved.per_layer_token * tokens),
            seconds=max(0.0, seconds),
        )

    choice = ActivationChoice(spread(layers, swapped, recomputed))
    host = int(swapped_bytes(layer(worst), choice))
    seconds = added_seconds(layer(micro), choice, HostLink(link, host)) if link else 0.0
    return Swap(seconds, layer(worst).kept, host)
