"""Meters: memory of this process and its workers, memory of the GPU, and power from an energy meter."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch


class Memory:
    """Current and peak memory by tier.

    Host: resident memory of this process (the kernel's own high-water mark, so that no peak is missed)
    and the private memory of its children (sampled, at most once a second). Device: what torch's allocator
    has reserved, which is what other processes cannot have. `device` None or a CPU leaves the device None.
    `joules` is the run's energy meter, for the watts.
    """

    def __init__(
        self, device: torch.device | None = None, joules: Callable[[], float | None] | None = None
    ) -> None:
        self._device = device if device is not None and device.type == "cuda" else None
        self._process = psutil.Process()
        self._peak_seen = 0
        self._children = 0
        self._children_read = -math.inf
        self._power = None if joules is None else Power(joules)

    def now(self) -> dict[str, float | int | None]:
        """host_bytes, device_bytes and watts of this moment; None where there is nothing to measure."""
        watts = None if self._power is None else self._power.watts()
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


class Power:
    """Mean power between readings of an energy meter."""

    def __init__(self, joules: Callable[[], float | None]) -> None:
        self._joules = joules
        self._last = (time.monotonic(), joules())
        self._watts: float | None = None

    def watts(self) -> float | None:
        """Mean power since the reading before; None without a counter.

        Counters move in steps of about 0.1 s, so a reading that comes too soon repeats the last figure.
        """
        now, total = time.monotonic(), self._joules()
        began, before = self._last
        if total is not None and before is not None and now - began >= 0.2:
            self._watts = (total - before) / (now - began)
            self._last = (now, total)
        return self._watts


def gpu_uuids(device: torch.device) -> list[str]:
    """NVML's name of the GPU that torch calls `device`; empty on a CPU.

    By UUID, since CUDA_VISIBLE_DEVICES renumbers torch's devices but not NVML's.
    """
    if device.type != "cuda":
        return []
    return [f"GPU-{torch.cuda.get_device_properties(device).uuid}"]
