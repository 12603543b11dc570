"""How long a step takes when state is read from and written to a disk, and how much is written.

Two times of a step, for P parameters and N tokens:

    after backward      T = T_f + T_b + max(T_io, T_u, T_l) + fill
    inside backward     T = T_f + max(T_b, T_io, T_u, T_l) + tail

T_f = 2 P N / F; T_b = 4 P N / F, or 6 P N / F where every layer runs forward again; T_io = 2 b P / disk for b
bytes of state a parameter; T_u = P / U; T_l = bytes of a direction / rate of a direction. What the passes
themselves move (streamed weights) counts in T_f and T_b, where the slowest resource decides. The tail is the
fill: what the disk does alone at both ends. The first order is ZeRO-Infinity's (arXiv:2104.07857), the second
LoHan's (arXiv:2403.06504). Attention's own products are left out, so a long context computes longer than said
here, which hides more of the transfers.

The disk's rate is always that of reading and writing *together*: a drive that reads 3 GB/s and writes 3 GB/s
does not do both at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, inf

TERA = 1e12
FORWARD = 2.0
"""Floating-point operations for each parameter and token of a forward pass."""
BACKWARD = 4.0
"""Of a backward pass: gradients of the weights, and of what came in. A frozen weight needs but the latter: 2.
Where a layer runs forward again in it, 2 more."""
USUAL_ENDURANCE = 600 * TERA
"""Bytes that a usual consumer drive of 1 TB is rated to take in its life; data-centre drives take several
times that."""


@dataclass(frozen=True)
class Speeds:
    """Sustained rates. inf: not on the way.

    flops: floating-point operations a second of the device that computes. disk: bytes a second, read and
    written together under both loads at once. update: parameters a second of the optimizer's arithmetic.
    link: bytes a second between device and host, each way at the same time.
    """

    flops: float
    disk: float = inf
    update: float = inf
    link: float = inf


@dataclass(frozen=True)
class Moves:
    """Bytes for each parameter that one pass of one micro-batch moves: streamed weights, say.

    disk: read and written. link: in the busier direction.
    """

    disk: float = 0.0
    link: float = 0.0


@dataclass(frozen=True)
class StepLoad:
    """Work of one optimizer step.

    parameters: of the model, all trained where there is state. tokens: of the step, in `micro_batches` equal
    parts. state_bytes: of state on disk for each parameter, read and written once. link_bytes: for each
    parameter, once a step, in the busier direction. backward_flops: see BACKWARD. segment_bytes: what is read
    before the first update and written after the last, where the disk works alone.
    """

    parameters: float
    tokens: float
    state_bytes: float = 0.0
    link_bytes: float = 0.0
    backward_flops: float = BACKWARD
    segment_bytes: float = 0.0
    micro_batches: int = 1
    forward: Moves = field(default_factory=Moves)
    backward: Moves = field(default_factory=Moves)


@dataclass(frozen=True)
class Phase:
    """Seconds of each resource in a part of a step; they work at the same time."""

    compute: float = 0.0
    disk: float = 0.0
    update: float = 0.0
    link: float = 0.0

    def __add__(self, other: Phase) -> Phase:
        return Phase(
            self.compute + other.compute,
            self.disk + other.disk,
            self.update + other.update,
            self.link + other.link,
        )

    @property
    def seconds(self) -> float:
        """Of the slowest."""
        return max(self.compute, self.disk, self.update, self.link)


@dataclass(frozen=True)
class StepTime:
    """A step by its phases. fill: seconds in which only the disk works."""

    forward: Phase
    backward: Phase
    update: Phase
    fill: float

    @property
    def after_backward(self) -> float:
        """Seconds where the update follows the backward pass."""
        return self.forward.seconds + self.backward.seconds + self.update.seconds + self.fill

    @property
    def inside_backward(self) -> float:
        """Seconds where each segment is updated as its gradients come."""
        return self.forward.seconds + (self.backward + self.update).seconds + self.fill

    @property
    def bound_by(self) -> str:
        """What works longest: "compute", "disk", "update" or "link"."""
        whole = self.forward + self.backward + self.update
        return max(("compute", "disk", "update", "link"), key=lambda name: float(getattr(whole, name)))


def step_time(load: StepLoad, speeds: Speeds) -> StepTime:
    """Seconds by phase; the module's equations."""

    def one_pass(flops: float, moves: Moves) -> Phase:
        return Phase(
            compute=flops * load.parameters * load.tokens / speeds.flops,
            disk=load.micro_batches * moves.disk * load.parameters / speeds.disk,
            link=load.micro_batches * moves.link * load.parameters / speeds.link,
        )

    return StepTime(
        forward=one_pass(FORWARD, load.forward),
        backward=one_pass(load.backward_flops, load.backward),
        update=Phase(
            disk=2 * load.state_bytes * load.parameters / speeds.disk,
            update=load.parameters / speeds.update,
            link=load.link_bytes * load.parameters / speeds.link,
        ),
        fill=fill_seconds(load.segment_bytes, speeds.disk),
    )


def fill_seconds(segment_bytes: float, disk: float) -> float:
    """Seconds in which no update runs: the first segment is read, the last is written."""
    return 2 * segment_bytes / disk


def break_even_tokens(
    bytes_moved: float, flops: float, rate: float, *, backward_flops: float = BACKWARD
) -> float:
    """Tokens of a step from which the backward pass hides a transfer; the model's size cancels out.

    bytes_moved: for each parameter, over `rate` bytes a second: 2 b for a disk that reads and writes b bytes
    of state for each parameter, 2 for a link that takes bfloat16 gradients down.
    """
    return bytes_moved * flops / (backward_flops * rate)


def gpu_stride(gpu_seconds: float, cpu_seconds: float) -> int:
    """Every k-th part of the update goes to the accelerator while the CPU does the others: k.

    gpu_seconds: of a part's whole round trip; cpu_seconds: of a part on the CPU, its conversion and upload
    too. In one round trip the CPU finishes k - 1 parts, so neither waits for long.
    ValueError: a time is not above zero.
    """
    if gpu_seconds <= 0 or cpu_seconds <= 0:
        raise ValueError(f"seconds of a part are {gpu_seconds} and {cpu_seconds}; both must be above 0")
    return 1 + ceil(gpu_seconds / cpu_seconds)


@dataclass(frozen=True)
class Traffic:
    """Bytes read from and written to the disk."""

    read: float = 0.0
    written: float = 0.0

    def seconds(self, disk: float) -> float:
        """At `disk` bytes a second, both together."""
        return (self.read + self.written) / disk


def kept_bytes(segments: Sequence[int], buffers: int, *, same_way: bool = False) -> float:
    """Bytes that stay in memory from one step to the next, so that they are neither written nor read again.

    A step goes over the segments in order and the next one backwards, so the last `buffers` of each are the
    first of the next: the mean of both ends. Where all steps go the same way (inside the backward pass),
    half of the buffers read ahead, and what stays in the others are any segments.
    """
    kept = min(buffers, len(segments))
    if same_way and buffers < len(segments):
        return (buffers - buffers // 2) * sum(segments) / len(segments)
    return (sum(segments[:kept]) + sum(segments[len(segments) - kept :])) / 2


def step_traffic(segments: Sequence[int], buffers: int, *, same_way: bool = False) -> Traffic:
    """Bytes of one step: all segments but those that are kept, each way. same_way: see `kept_bytes`."""
    moved = sum(segments) - kept_bytes(segments, buffers, same_way=same_way)
    return Traffic(moved, moved)


def run_traffic(step: Traffic, *, steps: int, saves: int = 0) -> Traffic:
    """Bytes of a whole run: the first step begins with no state, a checkpoint reads what is not in memory."""
    return Traffic(max(0, steps - 1 + saves) * step.read if steps else 0.0, steps * step.written)


@dataclass(frozen=True)
class Wear:
    """What writing costs a drive. share: of what it is rated to take in its life."""

    terabytes: float
    share: float


def wear(written: float, endurance: float = USUAL_ENDURANCE) -> Wear:
    """Wear of `written` bytes on a drive rated for `endurance` bytes, its own amplification left out.

    ValueError: an endurance that is not above zero.
    """
    if endurance <= 0:
        raise ValueError(f"endurance is {endurance} bytes; it must be above 0")
    return Wear(written / TERA, written / endurance)
