"""How much memory may still be taken here: by the machine, and by every control group above this process."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..recipes.errors import UserError
from .control_group import GROUPS, cgroup_memory
from .errors import format_bytes
from .memory import Memory
from .slots import Geometry

_MARGIN = 0.05  # of what is free, left for everything else


@dataclass(frozen=True)
class Room:
    """Free bytes, and who sets the limit: "the machine" or the path of a control group."""

    bytes: int
    limited_by: str


def free_memory(proc: Path = Path("/proc"), groups: Path = GROUPS) -> Room:
    """The least of MemAvailable and what each control group, up to the root, has left.

    Page cache that a group can drop at once (inactive_file) counts as free. Raises OSError without /proc.
    """
    room = Room(_mem_available(proc / "meminfo"), "the machine")
    group = cgroup_memory(groups, proc / "self" / "cgroup")
    if group is not None and group.free < room.bytes:
        room = Room(group.free, f"the control group {group.folder}")
    return room


def require(needed: int, room: Room, *, slots: int, each: int, constant: int) -> None:
    """UserError with the numbers unless `needed` bytes fit into `room`, a margin kept for everything else."""
    if needed <= room.bytes * (1 - _MARGIN):
        return
    parts = f"{slots} slots of {format_bytes(each)}"
    if constant:
        parts += f" and {format_bytes(constant)} that never changes"
    least = "" if slots == 2 else " Take slots=2."
    raise UserError(
        f"Snapshots in memory need {format_bytes(needed)} ({parts}); {room.limited_by} has "
        f"{format_bytes(room.bytes)} free, of which {_MARGIN:.0%} are left for everything else.\n"
        f"Nothing was taken.{least} Train fewer weights; or train without snapshots in memory: checkpoints "
        "on the disk go on as before."
    )


def take_memory(geometry: Geometry, room: Room) -> Memory:
    """A new memory file. UserError where there is no room for it, or the system refuses all the same."""
    each, constant = geometry.slot_bytes, geometry.constant_bytes
    require(geometry.total, room, slots=geometry.slots, each=each, constant=constant)
    try:
        return Memory.create(geometry)
    except OSError as error:
        raise UserError(
            f"Snapshots in memory need {format_bytes(geometry.total)}; the system refuses so much: "
            f"{os.strerror(error.errno or 0)}.\n"
            "Raise the limit (ulimit -a), or train without snapshots in memory."
        ) from error


def _mem_available(meminfo: Path) -> int:
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{meminfo} has no MemAvailable")
