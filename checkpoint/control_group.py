"""The memory limits of the control groups above this process, both versions; and where such groups are.

Here, lowest of the rooms that ask, and without torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
# Version 1 writes "no limit" as the largest multiple of the page size below 2**63.
_UNLIMITED = 1 << 60


@dataclass(frozen=True)
class GroupMemory:
    """A control group's memory limit and what it uses, page cache that can be dropped not counted."""

    limit: int
    used: int
    folder: Path

    @property
    def free(self) -> int:
        """Bytes that may still be taken."""
        return max(0, self.limit - self.used)


def cgroup_memory(root: Path = GROUPS, membership: Path = MEMBERSHIP) -> GroupMemory | None:
    """The group with the least memory left, of this process's own and all above it; None without a limit."""
    tightest: GroupMemory | None = None
    for folder in group_folders(root, membership, "memory"):
        limit = _first(folder, "memory.max", "memory.limit_in_bytes")
        if limit is None or limit >= _UNLIMITED:
            continue
        used = _first(folder, "memory.current", "memory.usage_in_bytes") or 0
        group = GroupMemory(limit, max(0, used - _droppable(folder)), folder)
        if tightest is None or group.free < tightest.free:
            tightest = group
    return tightest


def group_folders(root: Path, membership: Path, controller: str) -> Iterator[Path]:
    """Folders from the process's own group to the root, for version 2 and for version 1's `controller`."""
    for line in (text_of(membership) or "").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            base = root
        elif controller in controllers.split(","):
            base = root / controller
        else:
            continue
        # Inside a container the path named here may not exist below the mount: its root then is our group.
        inside = Path(*(part for part in group.split("/") if part and part != ".."))
        for part in (inside, *inside.parents):
            yield base / part


def number_in(path: Path) -> int | None:
    """The whole number that a file holds; None without the file, or where it says otherwise ("max")."""
    text = text_of(path)
    return int(text) if text is not None and text.lstrip("-").isdigit() else None


def text_of(path: Path) -> str | None:
    """What a file of the kernel says; None where there is none: another version, or a container hides it."""
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _first(folder: Path, *names: str) -> int | None:
    return next((found for name in names if (found := number_in(folder / name)) is not None), None)


def _droppable(folder: Path) -> int:
    rows = dict(line.split(" ", 1) for line in (text_of(folder / "memory.stat") or "").splitlines())
    # Version 1 has both; there the second one counts the groups below, as the usage does.
    return int(rows.get("total_inactive_file", rows.get("inactive_file", "0")))
