"""The search for what fits: micro-batch and activation checkpointing within the memory of the machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..recipes.offload import Tier
from . import defaults
from .memory import Footprint, Sizes, footprint
from .objectives import Work
from .swapping import Swap


@dataclass(frozen=True)
class Limits:
    """Bytes that one process may use; device is 0 on a CPU. *_source says where the figure comes from."""

    host: int
    device: int
    host_source: str
    device_source: str

    def fits(self, needed: Footprint, margin: float) -> bool:
        """Whether the prediction stays below both limits with `margin` of them left free."""
        room = 1.0 - margin
        host = needed.host_total <= self.host * room
        return host and (not self.device or needed.device_total <= self.device * room)


@dataclass(frozen=True)
class Candidate:
    """One way to run a micro-batch. worst_tokens: of the largest micro-batch that can come.

    recomputed: layers whose activations are computed again; swapped: those whose wait in host memory,
    swapped_bytes of them. tier: of the optimizer's state.
    """

    micro_tokens: int
    worst_tokens: int
    recomputed: int
    footprint: Footprint
    seconds_per_token: float
    tier: Tier = "device"
    swapped: int = 0
    swapped_bytes: int = 0


WorkOf = Callable[[int], Work]
SwapOf = Callable[[int, int, int, int], Swap]
"""Of (recomputed, swapped) layers for a micro-batch of that many tokens, whose longest has so many."""


def candidates(
    *,
    device: str,
    sizes: Sizes,
    work_of: WorkOf,
    micro_tokens: Sequence[int],
    longest: int,
    recomputed: int,
    trained_share: float,
    dense_share: Callable[[int], float],
    always_whole: bool = False,
    swapped: int = 0,
    swap: SwapOf | None = None,
) -> list[Candidate]:
    """Footprint and speed of each micro-batch size.

    A row longer than the micro-batch is one of its own, so the worst micro-batch has at least `longest`
    tokens. `always_whole`: the micro-batch is given in rows, its worst is what `micro_tokens` says.
    swapped: further layers whose activations go to host memory; `swap` says what that takes.
    """
    work = work_of(recomputed + swapped)
    found = []
    for micro in micro_tokens:
        worst = micro if always_whole else max(micro, longest)
        targets = int(worst * dense_share(worst))
        activations, logits = work.memory(worst, targets)
        needed = footprint(device, sizes, activations, logits, work.teacher_memory(worst))
        seconds = work.train_seconds(micro, micro * trained_share)
        there = 0
        if swapped and swap is not None:
            taken = swap(recomputed, swapped, micro, worst)
            there = taken.host_bytes
            needed = replace(
                needed,
                device={**needed.device, "activations": needed.device["activations"] + taken.leaving},
                host={**needed.host, "activations": there},
            )
            seconds = work_of(0).train_seconds(micro, micro * trained_share) + taken.seconds
        per_token = seconds / micro
        found.append(Candidate(micro, worst, recomputed, needed, per_token, sizes.moved.tier, swapped, there))
    return found


def choose(found: Sequence[Candidate], limits: Limits) -> Candidate | None:
    """The largest that fits with the margin, else the smallest that fits at all, else None.

    Not the quickest measured: a run with a counted budget would then change its micro-batches, and with them
    the last bits of its sums, whenever another process disturbed the measurement.
    """
    comfortable = [c for c in found if limits.fits(c.footprint, defaults.MEMORY_MARGIN)]
    if comfortable:
        return max(comfortable, key=lambda c: c.micro_tokens)
    tight = [c for c in found if limits.fits(c.footprint, 0.0)]
    return min(tight, key=lambda c: c.micro_tokens, default=None)
