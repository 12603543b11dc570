"""Energy counters of the hardware: joules since each `Counter` object was made.

GPU: NVML's total-energy counter (millijoules since the driver was loaded; Volta and newer), for the whole
board, also when others use it. CPU: the package domains of RAPL in /sys/class/powercap (microjoules,
wrapping at a range of their own; often readable by root only; most of the memory's energy and the rest of
the board are not in it). Nothing is estimated: what has no counter is not counted, and `describe` says what
is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")


@dataclass
class Counter:
    """One growing counter; `read` gives its value in joules, `wraps_at` where it starts again at zero."""

    name: str
    read: Callable[[], float]
    wraps_at: float | None = None
    total: float = 0.0
    last: float = field(init=False)

    def __post_init__(self) -> None:
        self.last = self.read()

    def joules(self) -> float:
        """Joules since this object was made. A counter that fell has wrapped once, or was reset to zero."""
        value = self.read()
        if value >= self.last:
            self.total += value - self.last
        elif self.wraps_at is not None:
            self.total += self.wraps_at - self.last + value
        else:
            self.total += value
        self.last = value
        return self.total


def energy_counters(
    *, gpu_uuids: Sequence[str] | None = None, nvml: Any = None, powercap: Path = POWERCAP
) -> list[Counter]:
    """Everything that can be measured here; empty where nothing can.

    Read them at every step: a counter that wraps twice between two reads loses a round. gpu_uuids: the boards
    that this run uses; None is all. nvml: a module with pynvml's functions, imported when not given.
    powercap: the folder with RAPL's counters.
    """
    return [*_gpu_counters(nvml, gpu_uuids), *_cpu_counters(powercap)]


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
    counters = []
    for index, handle in enumerate(handles):

        def read(handle: Any = handle) -> float:
            return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3

        uuid = nvml.nvmlDeviceGetUUID(handle)
        if gpu_uuids is not None and _text(uuid) not in gpu_uuids:
            continue
        try:
            counters.append(Counter(f"GPU {index} (NVML)", read))
        except nvml.NVMLError:
            continue  # boards before Volta, and shared ones, have no such counter
    return counters


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
