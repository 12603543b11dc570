"""What the short measurement on a shallow copy of the model found, as lines over layers and tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .curves import Line, Plane, Polyline
from .precision import Precision


@dataclass(frozen=True)
class Setting:
    """How the copies run. tokens: the two lengths measured; row_length: of the rows that fill them."""

    precision: Precision
    packed: bool
    checkpointing: bool
    tokens: tuple[int, int]
    row_length: int
    trained_share: float
    repeats: int = 2


@dataclass(frozen=True)
class Measurement:
    """Bytes and seconds of one micro-batch of T tokens, N of them trained, through L decoder layers.

    saved, peak: bytes kept for the backward pass, and the most alive at once in forward and backward.
    seconds, forward_seconds: both passes, and forward alone as in evaluation.
    head_*: the output head with its loss, over N. head_peak bends where the loss begins to work in chunks,
    and holds the gradient of the head's weight where that is trained; head_held: what of it stays until the
    end of the backward pass, because the embedding is the same matrix.
    tokens: the two lengths that were measured.
    """

    saved: Plane
    peak: Plane
    seconds: Plane
    forward_seconds: Plane
    head_peak: Polyline
    head_held: int
    head_seconds: Line
    head_forward_seconds: Line
    tokens: tuple[int, int]

    def micro_seconds(self, layers: int, tokens: float, targets: float) -> float:
        """Forward and backward of one micro-batch."""
        return self.seconds.at(layers, tokens) + self.head_seconds.at(targets)

    def eval_seconds(self, layers: int, tokens: float, targets: float) -> float:
        """Forward of one micro-batch without gradients."""
        return self.forward_seconds.at(layers, tokens) + self.head_forward_seconds.at(targets)

    def activation_bytes(self, layers: int, tokens: int, targets: int) -> tuple[int, int]:
        """(activations, logits): the worse of the moment in the head and the moment in the last layer.

        In the head all layers' activations are kept and the head's own buffers come on top; in the last
        layer's backward pass its temporaries do. Both moments are near the end of the forward pass.
        """
        saved = self.saved.at(layers, tokens)
        head = self.head_peak.at(targets)
        activations = max(saved, self.peak.at(layers, tokens) + self.head_held - head)
        return int(activations), int(head)


def mixed(kept: Measurement, again: Measurement, share: float) -> Measurement:
    """Where `share` of the layers, the first ones, are computed again in backward and the last is kept.

    kept, again: measured without and with all layers computed again. What belongs to no layer is as without:
    the worst moments are in the head and in the last layer.
    """

    def mix(one: Plane, other: Plane) -> Plane:
        per_layer = one.per_layer + share * (other.per_layer - one.per_layer)
        per_layer_token = one.per_layer_token + share * (other.per_layer_token - one.per_layer_token)
        return replace(one, per_layer=per_layer, per_layer_token=per_layer_token)

    return replace(
        kept,
        saved=mix(kept.saved, again.saved),
        peak=mix(kept.peak, again.peak),
        seconds=mix(kept.seconds, again.seconds),
    )
