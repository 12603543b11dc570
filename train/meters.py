"""Meters: memory of this process and its workers, memory of the GPU, and energy where a counter is there."""

from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch


class Counter(Protocol):
    """An energy counter: joules since some fixed moment."""

    name: str

    def joules(self) -> float:
        """The counter's reading."""
        ...


class Memory:
    """Current and peak memory by tier.

    Host: resident memory of this process (the kernel's own high-water mark, so that no peak is missed)
    and the private memory of its children (sampled, at most once a second). Device: what torch's allocator
    has reserved, which is what other processes cannot have. `device` None or a CPU leaves the device None.
    """

    def __init__(self, device: torch.device | None = None, energy: Energy | None = None) -> None:
        self._device = device if device is not None and device.type == "cuda" else None
        self._process = psutil.Process()
        self._peak_seen = 0
        self._children = 0
        self._children_read = -math.inf
        self._energy = energy

    def now(self) -> dict[str, float | int | None]:
        """host_bytes, device_bytes and watts of this moment; None where there is nothing to measure."""
        watts = None if self._energy is None else self._energy.watts()
        return {"host_bytes": self.host_bytes(), "device_bytes": self.device_bytes(), "watts": watts}

    def host_bytes(self) -> int:
        """Resident bytes of this process plus what its children hold for themselves alone."""
        if time.monotonic() - self._children_read >= 1.0:  # it walks through /proc: milliseconds
            self._children = 0
            for child in self._process.children(recursive=True):
                with contextlib.suppress(psutil.Error):  # it ended between the listing and the reading
                    self._children += int(child.memory_full_info().uss)
            self._children_read = time.monotonic()
        total = int(self._process.memory_info().rss) + self._children
        self._peak_seen = max(self._peak_seen, total)
        return total

    def device_bytes(self) -> int | None:
        """Bytes that torch has reserved on the GPU."""
        return None if self._device is None else int(torch.cuda.memory_reserved(self._device))

    @property
    def peak_host_bytes(self) -> int:
        """Highest host memory since the start or the last reset."""
        self._children_read = -math.inf
        self.host_bytes()
        return max(self._peak_seen, high_water_mark() or 0)

    @property
    def peak_device_bytes(self) -> int | None:
        """Highest reserved GPU memory since the start or the last reset."""
        return None if self._device is None else int(torch.cuda.max_memory_reserved(self._device))

    @property
    def peak_allocated_bytes(self) -> int | None:
        """Highest GPU memory in live tensors, without the allocator's slack; for the plan's figures."""
        return None if self._device is None else int(torch.cuda.max_memory_allocated(self._device))

    def reset_peak(self) -> bool:
        """Begin new peaks; False when the kernel does not let us reset its mark (then the old one stays)."""
        self._peak_seen = 0
        self._children_read = -math.inf
        if self._device is not None:
            torch.cuda.reset_peak_memory_stats(self._device)
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return False
        return True


def high_water_mark() -> int | None:
    """VmHWM of this process in bytes, or None where /proc does not say."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return None


def cgroup_memory(root: Path = Path("/sys/fs/cgroup")) -> tuple[int, int] | None:
    """(bytes in use, limit) of the container that we live in; None without a limit. Versions 1 and 2."""
    own = _own_cgroups()
    candidates = [
        (root / own.get("", "").lstrip("/"), "memory.current", "memory.max"),
        (root, "memory.current", "memory.max"),
        (
            root / "memory" / own.get("memory", "").lstrip("/"),
            "memory.usage_in_bytes",
            "memory.limit_in_bytes",
        ),
        (root / "memory", "memory.usage_in_bytes", "memory.limit_in_bytes"),
    ]
    for folder, usage, limit in candidates:
        try:
            used, most = (folder / usage).read_text().strip(), (folder / limit).read_text().strip()
        except OSError:
            continue
        if most == "max" or int(most) >= 1 << 60:  # version 1 writes "no limit" as a huge number
            return None
        return int(used), int(most)
    return None


def _own_cgroups() -> dict[str, str]:
    """Controller -> path of this process's group; "" is version 2's single tree."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            found[controller] = path
    return found


class Energy:
    """Energy and power of the parts of this machine that have a counter; the sum over them.

    `source` names them, or is None when there is nothing to read: then every figure is None.
    """

    def __init__(self, counters: list[Counter]) -> None:
        self._counters = counters
        self._begin = sum(counter.joules() for counter in counters)
        self._last = (time.monotonic(), self._begin)
        self._watts: float | None = None

    @property
    def source(self) -> str | None:
        """What is counted, for example "GPU 0 (NVML) + CPU package 0 (RAPL)"."""
        return " + ".join(counter.name for counter in self._counters) or None

    def joules(self) -> float | None:
        """Energy since this object was made."""
        if not self._counters:
            return None
        return sum(counter.joules() for counter in self._counters) - self._begin

    def watts(self) -> float | None:
        """Mean power since the reading before. Counters move in steps of 0.1 s, so not more often."""
        if not self._counters:
            return None
        now, total = time.monotonic(), sum(counter.joules() for counter in self._counters)
        if now - self._last[0] >= 0.2:
            self._watts = (total - self._last[1]) / (now - self._last[0])
            self._last = (now, total)
        return self._watts


def find_energy(device: torch.device | None = None, powercap: Path = Path("/sys/class/powercap")) -> Energy:
    """Every counter that can be read here: the GPU of `device` through NVML, CPU packages through RAPL."""
    counters: list[Counter] = []
    if device is not None and device.type == "cuda":
        gpu = _nvml_counter(device)
        counters += [gpu] if gpu else []
    for zone in sorted(powercap.glob("intel-rapl:[0-9]")):  # packages; their sub-zones are parts of them
        try:
            counters.append(RaplCounter(zone))
        except OSError:
            continue  # not readable for this user
    return Energy(counters)


class RaplCounter:
    """A CPU package's energy counter under /sys/class/powercap (Intel and AMD); it wraps around."""

    def __init__(self, zone: Path) -> None:
        self._file = zone / "energy_uj"
        self._range = int((zone / "max_energy_range_uj").read_text())
        self.name = f"CPU {(zone / 'name').read_text().strip()} (RAPL)"
        self._last = int(self._file.read_text())
        self._total = 0

    def joules(self) -> float:
        """Joules since this object was made. A wrap is seen only if read before the next (minutes)."""
        value = int(self._file.read_text())
        self._total += (value - self._last) % self._range if value < self._last else value - self._last
        self._last = value
        return self._total / 1e6


class NvmlCounter:
    """A GPU's own energy counter (Volta and later), in millijoules since the driver was loaded."""

    def __init__(self, handle: Any, name: str) -> None:
        self._handle = handle
        self.name = f"{name} (NVML)"
        self.joules()

    def joules(self) -> float:
        """The counter's reading."""
        import pynvml

        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3


def _nvml_counter(device: torch.device) -> NvmlCounter | None:
    """None when NVML, the GPU or its counter is missing (old GPUs, MIG slices)."""
    try:
        import pynvml

        pynvml.nvmlInit()
        properties = torch.cuda.get_device_properties(device)
        # By UUID: CUDA_VISIBLE_DEVICES renumbers torch's devices, but not NVML's.
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
        return NvmlCounter(handle, f"GPU {properties.name}")
    except (ImportError, AttributeError):
        return None
    except pynvml.NVMLError:
        return None
