"""On paper: full tuning and LoRA of models near and beyond the card's memory, by the performance model alone.

    python benchmarks/offload_paper.py

Nothing is measured. Every assumption is printed with the tables: a sustained rate is what a card gives in
training and not the one on its box, the disk's is that of reading and writing together. Each row takes the
largest micro-batch that its memory allows and steps inside the backward pass, so that one step is one
micro-batch and no two gradients are alive together. Memory of the card: weights, one gradient, saved inputs
of all layers (each layer runs forward again), one layer's inside. State with master weights is updated on the
CPU: gradients go down and weights come up; other state goes up and comes back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf

from shoestring.offload.model import (
    BACKWARD,
    FORWARD,
    Moves,
    Speeds,
    StepLoad,
    break_even_tokens,
    step_time,
    wear,
)

GIGA = 1e9
STEPS = 1000
SEGMENT = 16 << 20
OTHER = 2.5 * GIGA  # CUDA context, the loss in chunks, fragmentation
LAYER_INSIDE = 40  # values for each token and hidden unit that one layer holds in its backward pass
FROZEN = BACKWARD / 2 + FORWARD  # no gradient of the base; each layer runs forward again
TRAINED = BACKWARD + FORWARD


@dataclass(frozen=True)
class Model:
    """Shape of a Llama of this size. Parameters, layers, hidden units, largest tensor in elements."""

    name: str
    parameters: float
    layers: int
    hidden: int
    largest: int


@dataclass(frozen=True)
class Machine:
    """Bytes of the card and of host memory (None: not said), sustained rates."""

    name: str
    device: float
    host: float | None
    speeds: Speeds


@dataclass(frozen=True)
class Way:
    """A way to train. state: bytes a trained parameter, on `tier`; weights: tier of the base's weights.

    link: bytes a trained parameter that cross the link for the update, each way.
    """

    name: str
    state: float
    tier: str
    weights: str
    link: float = 0.0
    full: bool = True


SMALL = Model("7B", 6.7e9, 32, 4096, 32_000 * 4096)
LARGE = Model("70B", 69e9, 80, 8192, 32_000 * 8192)
LINK, DISK, UPDATE = 24e9, 6e9, 2e9
CARD_24 = Machine("24 GB card, 32 GB host", 24e9, 32e9, Speeds(150e12, disk=DISK, update=UPDATE, link=LINK))
CARD_80 = Machine(
    "80 GB card, host not said", 80e9, None, Speeds(400e12, disk=DISK, update=UPDATE, link=LINK)
)

FULL_32 = "full, AdamW, float32 moments and master"
FULL_8M = "full, AdamW, 8-bit moments, float32 master"
FULL_8 = "full, AdamW, 8-bit moments, stochastic rounding"
MOMENTS_8 = 2 * (1 + 4 / 256)
MASTER = 2.0
"""Link bytes of an update on the CPU: a bfloat16 gradient down, a bfloat16 weight up."""
CASES = (
    (
        SMALL,
        CARD_24,
        (
            Way(FULL_32, 12, "disk", "device", MASTER),
            Way(FULL_32, 12, "disk", "host", MASTER),
            Way(FULL_8M, 4 + MOMENTS_8, "disk", "device", MASTER),
            Way(FULL_8, MOMENTS_8, "disk", "device", MOMENTS_8),
            Way(FULL_8, MOMENTS_8, "host", "device", MOMENTS_8),
            Way("LoRA", 0, "device", "device", full=False),
            Way("LoRA", 0, "device", "host", full=False),
        ),
    ),
    (
        LARGE,
        CARD_80,
        (
            Way(FULL_32, 12, "disk", "disk", MASTER),
            Way(FULL_8M, 4 + MOMENTS_8, "disk", "disk", MASTER),
            Way(FULL_8, MOMENTS_8, "disk", "disk", MOMENTS_8),
            Way("LoRA", 0, "device", "disk", full=False),
            Way("LoRA", 0, "device", "host", full=False),
        ),
    ),
)


@dataclass(frozen=True)
class Row:
    """A way on a machine: bytes by tier, tokens and seconds of a step, bytes written in it.

    enough: tokens of a step from which nothing but arithmetic takes time.
    """

    way: Way
    device: float
    host: float
    disk: float
    tokens: int
    seconds: float
    bound_by: str
    enough: float
    written: float


def row(model: Model, machine: Machine, way: Way) -> Row:
    speeds = machine.speeds
    weights, state = 2 * model.parameters, way.state * model.parameters
    # Where weights are streamed: two layers' buffers, embedding and output head.
    fixed = weights if way.weights == "device" else 2 * weights / model.layers + 4 * model.largest
    fixed += OTHER + (2 * model.largest if way.full else 0.0)
    token = 2 * model.hidden * (model.layers + LAYER_INSIDE)
    tokens = max(0, int((machine.device - fixed) / token)) // 1024 * 1024
    # Streamed weights are read in both passes; trained ones are written back in the second.
    away, on_disk = way.weights != "device", way.weights == "disk"
    forward = Moves(disk=2.0 * on_disk, link=2.0 * away)
    backward = Moves(disk=(4.0 if way.full else 2.0) * on_disk, link=2.0 * away)
    load = StepLoad(
        model.parameters,
        tokens,
        state_bytes=way.state if way.tier == "disk" else 0.0,
        link_bytes=way.link,
        backward_flops=TRAINED if way.full else FROZEN,
        segment_bytes=SEGMENT if way.tier == "disk" else 0.0,
        forward=forward,
        backward=backward,
    )
    time = step_time(load, speeds if way.link == MASTER else replace(speeds, update=inf))
    enough = [
        break_even_tokens(moved, speeds.flops, rate, backward_flops=flops)
        for moved, rate, flops in (
            (forward.disk, speeds.disk, FORWARD),
            (forward.link, speeds.link, FORWARD),
            (backward.disk + 2 * load.state_bytes, speeds.disk, load.backward_flops),
            (backward.link + load.link_bytes, speeds.link, load.backward_flops),
            (1.0 if way.link == MASTER else 0.0, speeds.update, load.backward_flops),
        )
    ]
    return Row(
        way,
        device=fixed + tokens * token,
        host=(weights if way.weights == "host" else 0.0) + (state if way.tier == "host" else 0.0),
        disk=(weights if on_disk else 0.0) + (state if way.tier == "disk" else 0.0),
        tokens=tokens,
        seconds=time.inside_backward,
        bound_by=time.bound_by,
        enough=max(enough),
        written=(state if way.tier == "disk" else 0.0) + (weights if way.full and on_disk else 0.0),
    )


def assumptions(model: Model, machine: Machine) -> str:
    speeds = machine.speeds
    return (
        f"{model.parameters / GIGA:g}e9 parameters, {model.layers} layers of {model.hidden}; "
        f"{speeds.flops / 1e12:g} TFLOP/s sustained, {speeds.update / GIGA:g}e9 updates/s on the CPU, disk "
        f"{speeds.disk / GIGA:g} GB/s read and written together, link {speeds.link / GIGA:g} GB/s each way, "
        "bfloat16 weights and gradients, every layer computed again"
    )


def line(found: Row) -> str:
    way = found.way
    where = f"{way.tier if way.full else '-'} | {way.weights}"
    memory = f"{found.device / GIGA:.0f} | {found.host / GIGA:.0f} | {found.disk / GIGA:.0f}"
    if not found.tokens:
        return f"| {way.name} | {where} | {memory} | does not fit | | | | | |"
    worn = wear(STEPS * found.written)
    life = f"{worn.terabytes:.0f} TB, {worn.share:.0%}" if found.written else "-"
    enough = f"{found.enough / 1024:.0f}k" if found.enough else "-"
    rate = f"{found.seconds:.1f} | {found.bound_by} | {found.tokens / found.seconds:,.0f}"
    return f"| {way.name} | {where} | {memory} | {found.tokens / 1024:.0f}k | {rate} | {enough} | {life} |"


def main() -> None:
    for model, machine, ways in CASES:
        print(f"**{model.name}, {machine.name}**: {assumptions(model, machine)}.\n")
        print(
            "| way | state on | weights on | device GB | host GB | disk GB | tokens a step | seconds | "
            f"bound by | tokens/s | enough tokens | written in {STEPS:,} steps, of 600 TB |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|---|---|")
        for way in ways:
            found = row(model, machine, way)
            if machine.host is not None and found.host > machine.host:
                raise SystemExit(f"{way.name}: {found.host / GIGA:.0f} GB of host memory")
            print(line(found))
        print()


if __name__ == "__main__":
    main()
