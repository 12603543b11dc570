"""Moving an optimizer's state to host memory or disk: the file and the buffers, made together."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from .arena import Arena
from .direct_file import DirectFile
from .holder import Holder, Resident
from .lift import Lift, Where
from .optimizer import OffloadedOptimizer
from .ring import Ring
from .scratch import open_scratch, require_space
from .segments import cut_into_segments
from .shadow import Shadow
from .steppers import stepper_for
from .transfers import open_transfers

LEAST_BUFFERS = 3


def offload_optimizer(
    optimizer: torch.optim.Optimizer,
    *,
    tier: Literal["host", "disk"],
    folder: Path | None = None,
    buffer_size: int = 16 << 20,
    buffer_count: int = 6,
    io: Literal["threads", "io_uring"] | None = None,
    io_threads: int = 4,
    pin_memory: bool | None = None,
    numa_policy: Literal["default", "local", "interleave"] = "default",
    update: Where = "host",
    snapshots: bool = False,
) -> tuple[OffloadedOptimizer, list[str]]:
    """The optimizer with its state on `tier`, and lines that say how; its `close` removes the scratch file.

    folder: of the scratch file, for "disk". buffer_size: bytes of a segment, more where a tensor that cannot
    be cut needs it. update: where, for weights on an accelerator; see lift.py. snapshots: whether state on
    disk is to have any, see shadow.py; the first one doubles the file. State that the optimizer has already
    is moved.

    Raises TypeError for an optimizer that cannot be stepped piece by piece; UserError where there is no room,
    OffloadError where the disk fails.

        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        optimizer, lines = offload_optimizer(optimizer, tier="disk", folder=Path("/ssd/scratch"))
    """
    stepper = stepper_for(optimizer)
    parameters = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    segments = cut_into_segments(parameters, stepper.layout, stepper.can_cut, buffer_size)
    total = segments[-1].offset + segments[-1].nbytes
    device = parameters[0][0].device
    pin = device.type == "cuda" if pin_memory is None else pin_memory
    lift = None if device.type == "cpu" else Lift(stepper, device, update)
    line = f"optimizer state on {tier}: {total / 1e6:,.0f} MB in {len(segments)} segments"
    holder: Holder
    shadow: Shadow | None = None
    with ExitStack() as undo:
        if tier == "host":
            arena = Arena(total, pin=pin, numa_policy=numa_policy)
            undo.callback(arena.close)
            holder, lines = Resident(segments, arena.take(total)), [line, *arena.lines]
        else:
            if folder is None:
                raise ValueError("tier='disk' needs a folder")
            folder.mkdir(parents=True, exist_ok=True)
            require_space(folder, total)
            scratch = open_scratch(folder)
            undo.callback(scratch.close)
            file = DirectFile(scratch.path / "optimizer", total)
            undo.callback(lambda: file.close(remove=not scratch.kept))
            transfers, how = open_transfers(file, io=io, threads=io_threads)
            undo.callback(transfers.close)
            largest = max(segment.nbytes for segment in segments)
            count = max(LEAST_BUFFERS, min(buffer_count, len(segments)))
            arena = Arena(count * largest, pin=pin, numa_policy=numa_policy)
            undo.callback(arena.close)
            memory = [arena.take(largest) for _ in range(count)]
            holder = Ring(segments, memory, transfers, (lambda: file.grow(2 * total)) if snapshots else None)
            shadow = Shadow(holder, file, scratch) if snapshots else None
            line += f", {count} buffers of {largest / 1e6:,.1f} MB; {how}"
            lines = [line, *file.lines, *arena.lines]
        close = undo.pop_all().close
    state = dict(optimizer.state)
    optimizer.state.clear()
    offloaded = OffloadedOptimizer(optimizer, stepper, segments, holder, close, lift, shadow)
    for parameter, values in state.items():
        assert isinstance(parameter, Tensor)
        offloaded.put_state(parameter, values)
    return offloaded, lines
