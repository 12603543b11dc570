"""Which layers keep their activations, compute them again or swap them: bytes and seconds, no tensors.

All decoder layers of a model are taken to be alike, as the plan measures them. Of the bytes K = a + b that a
layer keeps, b belong to its feed-forward block, of whose tokens a share s is saved and the rest computed
again (MEMO's idea, arXiv:2407.12117), so that it keeps K(s) = a + s b. With t seconds for a layer's forward
pass, f of them in the block, and a link of B bytes a second each way:

    added = n_recompute t + (1 - s) (n_keep + n_swap) f + max(0, S/B - L t) + max(0, S/B - 2 L t - r) + K(s)/B
    S = n_swap K(s),   r = the first two terms

Copies out run beside L layers' forward passes, copies back beside backward passes of twice that and what is
computed again; the copy that backward begins with runs beside nothing. For given counts `added` is convex and
piecewise linear in s, and bytes are linear: the least lies at one of few values, and all are looked at. Where
all layers swap and a byte's copy costs more than its computing, that is MEMO's share, min(1, t B / bytes of a
layer, host memory / bytes of all).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, floor
from typing import Literal

Fate = Literal["keep", "recompute", "swap"]

_STEPS = 1 << 20  # shares are multiples of its inverse, so that rounding never puts one past a limit


@dataclass(frozen=True)
class ActivationChoice:
    """What happens to the activations of each decoder layer, from the input to the output.

    token_share: of the layers that keep or swap, the share of tokens for which their feed-forward block's are
    saved; for the others it is computed again.
    """

    layers: tuple[Fate, ...]
    token_share: float = 1.0

    def __post_init__(self) -> None:
        unknown = sorted(set(self.layers) - {"keep", "recompute", "swap"})
        if unknown:
            raise ValueError(f"unknown fate {unknown[0]!r} of a layer; allowed: 'keep', 'recompute', 'swap'")
        if not 0.0 <= self.token_share <= 1.0:
            raise ValueError(f"token_share is {self.token_share}, and must be between 0 and 1")

    def __str__(self) -> str:
        words = {"keep": "kept", "recompute": "computed again", "swap": "swapped to host memory"}
        counts = [(self.layers.count(fate), word) for fate, word in words.items()]
        text = ", ".join(f"{count} {word}" for count, word in counts if count)
        if self.token_share < 1.0:
            text += f", feed-forward blocks for {self.token_share:.0%} of the tokens"
        return f"activations of {len(self.layers)} layers: {text}"


def recompute_first(count: int, layers: int, *, others: Fate = "keep") -> ActivationChoice:
    """The first `count` of `layers` computed again, the others kept or swapped."""
    return ActivationChoice(tuple("recompute" if layer < count else others for layer in range(layers)))


@dataclass(frozen=True)
class LayerCost:
    """One decoder layer under one micro-batch.

    kept: bytes saved for its backward pass, its input among them. input: bytes of that, all that computing
    again keeps. seconds: of its forward pass. block_*: of both, the part of the feed-forward block.
    """

    kept: int
    input: int
    seconds: float
    block_kept: int = 0
    block_seconds: float = 0.0

    def saved(self, share: float) -> float:
        """Bytes kept or swapped where the block is saved for `share` of the tokens."""
        return self.kept - (1.0 - share) * self.block_kept


@dataclass(frozen=True)
class HostLink:
    """rate: bytes a second each way, both at once. bytes: of host memory for what is swapped."""

    rate: float
    bytes: int


@dataclass(frozen=True)
class Chosen:
    """A choice with what it costs. seconds: added to a micro-batch over keeping all."""

    choice: ActivationChoice
    seconds: float
    device_bytes: int
    host_bytes: int
    line: str


def choose_activations(
    layer: LayerCost,
    layers: int,
    device_bytes: int,
    *,
    head_bytes: int = 0,
    link: HostLink | None = None,
    split: bool = False,
) -> Chosen | None:
    """The quickest choice for `layers` such layers whose bytes stay within `device_bytes`, None without one.

    head_bytes: of the output head at work, when all layers have been saved and none is at work. link: to host
    memory, None where the host is the device: then nothing is swapped. split: whether a share of tokens other
    than 1 may be chosen, which changes sums in their last bits (`activations.py`). Of choices of equal time
    the one that swaps least.
    """
    best: tuple[float, float, float, ActivationChoice] | None = None
    for fates in _counts(layers, link is not None):
        for share in _shares(layer, fates, device_bytes, head_bytes, link) if split else (1.0,):
            choice = ActivationChoice(fates, share)
            needed = peak_bytes(layer, choice, head_bytes)
            host = swapped_bytes(layer, choice)
            if needed > device_bytes or (link is not None and host > link.bytes):
                continue
            found = (added_seconds(layer, choice, link), host, needed, choice)
            if best is None or found[:3] < best[:3]:
                best = found
    if best is None:
        return None
    seconds, host, needed, choice = best
    line = f"{choice}; {needed / 1e9:.2f} of {device_bytes / 1e9:.2f} GB, "
    line += f"{seconds:.3g} s a micro-batch" if seconds else "at no cost"
    if seconds:
        line += f" (computing all again: {layers * layer.seconds:.3g} s)"
    return Chosen(choice, seconds, ceil(needed), ceil(host), line)


def added_seconds(layer: LayerCost, choice: ActivationChoice, link: HostLink | None) -> float:
    """Seconds that `choice` adds to a micro-batch: see the module. ValueError: it swaps without a link."""
    count = choice.layers.count
    again = count("recompute") * layer.seconds
    again += (1.0 - choice.token_share) * (count("keep") + count("swap")) * layer.block_seconds
    if not count("swap"):
        return again
    if link is None:
        raise ValueError("layers are swapped, and there is no link")
    one_way = swapped_bytes(layer, choice) / link.rate
    forward = len(choice.layers) * layer.seconds
    hidden = max(0.0, one_way - forward) + max(0.0, one_way - 2 * forward - again)
    return again + hidden + layer.saved(choice.token_share) / link.rate


def swapped_bytes(layer: LayerCost, choice: ActivationChoice) -> float:
    """Bytes in host memory at the end of the forward pass."""
    return choice.layers.count("swap") * layer.saved(choice.token_share)


def peak_bytes(layer: LayerCost, choice: ActivationChoice, head_bytes: int = 0) -> float:
    """Bytes on the device at the worst moment: in the output head, or in backward through the last layer.

    In the head there are the activations of layers that keep, the inputs of those that compute again, and the
    activations of one swapped layer, which are leaving. Then the last layer needs all of its own in any case.
    """
    moments = _moments(layer, choice.layers, head_bytes)
    return max(fixed + per_share * choice.token_share for fixed, per_share in moments)


def _moments(layer: LayerCost, fates: Sequence[Fate], head_bytes: int) -> list[tuple[int, int]]:
    """(c, d) of both moments: at share s there are c + d s bytes."""

    def held(part: Sequence[Fate], beside: int) -> tuple[int, int]:
        saved = part.count("keep") + ("swap" in part)
        fixed = saved * (layer.kept - layer.block_kept) + part.count("recompute") * layer.input
        return fixed + beside, saved * layer.block_kept

    return [held(fates, head_bytes), held(fates[:-1], layer.kept if fates else 0)]


def _counts(layers: int, swap: bool) -> Iterator[tuple[Fate, ...]]:
    """One order for each split into kept, swapped and recomputed layers: see `spread`."""
    for swapped in range(layers + 1 if swap else 1):
        for recomputed in range(layers - swapped + 1):
            yield spread(layers, swapped, recomputed)


def spread(layers: int, swapped: int, recomputed: int) -> tuple[Fate, ...]:
    """Swapped layers evenly spread, for copies to run beside the layers between; of the rest kept ones last.

    The last layer's activations are all there when backward begins with it: to keep them takes nothing more.
    """
    fates: list[Fate] = ["keep"] * layers
    for k in range(swapped):
        fates[k * layers // swapped] = "swap"
    rest = [place for place, fate in enumerate(fates) if fate == "keep"]
    for place in rest[:recomputed]:
        fates[place] = "recompute"
    return tuple(fates)


def _shares(
    layer: LayerCost, fates: tuple[Fate, ...], device_bytes: int, head_bytes: int, link: HostLink | None
) -> Iterator[float]:
    """Every share at which the least may lie: the ends, a limit that is met, copies that begin to show."""
    fixed, block = layer.kept - layer.block_kept, layer.block_kept
    candidates = [0.0, 1.0]
    candidates += [(device_bytes - c) / d for c, d in _moments(layer, fates, head_bytes) if d]
    swapped = fates.count("swap")
    if link is not None and swapped and block:
        forward = len(fates) * layer.seconds
        for seconds in (link.bytes / link.rate, forward):
            candidates.append((seconds * link.rate / swapped - fixed) / block)
        # S/B = 2 L t + r, where r falls with the share
        again = (len(fates) - fates.count("recompute")) * layer.block_seconds
        most = 2 * forward + fates.count("recompute") * layer.seconds + again
        candidates.append((most - swapped * fixed / link.rate) / (swapped * block / link.rate + again))
    for share in candidates:
        if 0.0 <= share <= 1.0:
            yield floor(share * _STEPS) / _STEPS
            yield ceil(share * _STEPS) / _STEPS
