"""Energy counters of the hardware: joules since each `Counter` object was made.

GPU: NVML's total-energy counter (millijoules since the driver was loaded; Volta and newer); where a board has
none but tells its power, that power is integrated, and the counter's name says so. Both are of the whole
board, also when others use it or it is divided by MIG; the name says "whole board" where that is so. CPU: the
package domains of RAPL in /sys/class/powercap (microjoules, wrapping at a range of their own; often readable
by root only; most of the memory's energy and the rest of the machine are not in it). Nothing is estimated:
what has no counter is not counted, and the names say what is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .power import IntegratedPower

POWERCAP = Path("/sys/class/powercap")
MOST_WATTS = 2000.0
"""More than one board or package draws: a counter that seems to have moved faster was reset."""


@dataclass
class Counter:
    """One growing counter; `read` gives its value in joules, `wraps_at` where it starts again at zero."""

    name: str
    read: Callable[[], float]
    wraps_at: float | None = None
    now: Callable[[], float] = time.monotonic
    total: float = 0.0
    last: float = field(init=False)
    read_at: float = field(init=False)

    def __post_init__(self) -> None:
        self.last, self.read_at = self.read(), self.now()

    def joules(self) -> float:
        """Joules since this object was made. Call it from one thread.

        A counter that fell has wrapped once, or began again at zero (a new driver): whichever the hardware
        could have drawn since the last reading. Where neither is possible the reading is a new start and adds
        nothing, so that no joule is counted twice.
        """
        value, now = self.read(), self.now()
        possible = MOST_WATTS * max(1.0, now - self.read_at)
        grown = [value - self.last] if value >= self.last else [value]
        if value < self.last and self.wraps_at is not None:
            grown.insert(0, self.wraps_at - self.last + value)
        self.total += next((joules for joules in grown if joules <= possible), 0.0)
        self.last, self.read_at = value, now
        return self.total


def energy_counters(
    *, gpu_uuids: Sequence[str] | None = None, nvml: Any = None, powercap: Path = POWERCAP
) -> list[Counter]:
    """Everything that can be measured here; empty where nothing can.

    Read them at every step: a counter that wraps twice between two reads loses a round. gpu_uuids: the boards
    (or parts of boards) that this run uses; None is all. nvml: a module with pynvml's functions, imported
    when not given. powercap: the folder with RAPL's counters.
    """
    return [*_gpu_counters(nvml, gpu_uuids), *_cpu_counters(powercap)]


def energy_source(counters: Sequence[Counter]) -> str | None:
    """The counters' names in one line, for `Clock`; None without any."""
    return ", ".join(counter.name for counter in counters) or None


def _gpu_counters(nvml: Any, gpu_uuids: Sequence[str] | None) -> list[Counter]:
    if nvml is None:
        try:
            import pynvml
        except ImportError:
            return []
        nvml = pynvml
    try:
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError:
        return []
    wanted = None if gpu_uuids is None else {_bare(uuid) for uuid in gpu_uuids}
    counters = []
    for index, handle in enumerate(handles):
        parts = _mig_uuids(nvml, handle)
        own = {_bare(_text(nvml.nvmlDeviceGetUUID(handle))), *parts}
        if wanted is not None and not own & wanted:
            continue
        counter = _board(nvml, handle, index, divided=bool(parts))
        if counter is not None:
            counters.append(counter)
    return counters


def _board(nvml: Any, handle: Any, index: int, *, divided: bool) -> Counter | None:
    """The counter of one board; None where NVML measures neither its energy nor its power."""

    def joules() -> float:
        return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3

    def watts() -> float:
        return float(nvml.nvmlDeviceGetPowerUsage(handle)) / 1e3

    whole = ", whole board" if divided or _shared(nvml, handle) else ""
    try:
        return Counter(f"GPU {index} (NVML{whole})", joules)
    except nvml.NVMLError:
        pass  # no such counter before Volta and on some virtual boards, where power may be read all the same
    try:
        return Counter(f"GPU {index} (NVML, integrated power{whole})", IntegratedPower(watts).joules)
    except nvml.NVMLError:
        return None


def _mig_uuids(nvml: Any, handle: Any) -> set[str]:
    """Of the parts that a board is divided into by MIG; empty where it is not."""
    try:
        if not nvml.nvmlDeviceGetMigMode(handle)[0]:
            return set()
        count = nvml.nvmlDeviceGetMaxMigDeviceCount(handle)
    except nvml.NVMLError:
        return set()  # boards that cannot be divided
    found = set()
    for index in range(count):
        try:
            part = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)
        except nvml.NVMLError:
            continue  # this place holds no part
        found.add(_bare(_text(nvml.nvmlDeviceGetUUID(part))))
    return found


def _shared(nvml: Any, handle: Any) -> bool:
    """Whether several processes compute on the board at this moment."""
    try:
        return len(nvml.nvmlDeviceGetComputeRunningProcesses(handle)) > 1
    except nvml.NVMLError:
        return False  # the driver does not tell


def _cpu_counters(powercap: Path) -> list[Counter]:
    counters = []
    for folder in sorted(powercap.glob("intel-rapl:*")):
        if folder.name.count(":") != 1:
            continue  # a part of a package, already in its sum

        def read(path: Path = folder / "energy_uj") -> float:
            return int(path.read_text()) / 1e6

        try:
            name = (folder / "name").read_text().strip()
            if not name.startswith("package"):
                continue  # psys covers the packages again
            wraps_at = int((folder / "max_energy_range_uj").read_text()) / 1e6
            counters.append(Counter(f"CPU {name.replace('-', ' ')} (RAPL)", read, wraps_at))
        except OSError:
            continue  # readable by root only on most systems
    return counters


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _bare(uuid: str) -> str:
    """Without its prefix: torch tells no "MIG-" from "GPU-"."""
    return uuid.removeprefix("GPU-").removeprefix("MIG-")
