"""The machine a run would use: devices, memory that is really ours, disk, and measured rates.

Limits of the control group count, not only the hardware: in a container with 8 GB on a machine with 256 GB,
a plan made for 256 GB ends with "Killed". Rates are measured on first use (below a second in all) and kept
in the object.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from ..checkpoint.control_group import cgroup_memory
from .limits import cgroup_cores, existing_parent, usable_cores
from .rates import Rates, measure_rates

if TYPE_CHECKING:
    from ..offload.code_rate import CodeRate
    from ..offload.rates import DiskRates


@dataclass(frozen=True)
class Machine:
    """Devices and limits; all sizes in bytes. `host_bytes` and `device_bytes` are what is free for us now."""

    device: str  # "cuda" or "cpu"
    name: str  # of the device that computes
    cores: int
    host_total_bytes: int
    host_bytes: int
    device_total_bytes: int  # 0 on cpu
    device_bytes: int  # 0 on cpu
    disk_bytes: int
    output_dir: str
    watts_source: str | None  # "nvml", "rapl", or None: energy cannot be measured here
    host_limit_source: str = "hardware"  # or "control group"
    given_rates: Rates | None = None

    @cached_property
    def rates(self) -> Rates:
        """Measured rates; the first access takes up to a second. UserError: output_dir cannot be written."""
        return self.given_rates or measure_rates(self.device, Path(self.output_dir))

    def disk_rates(self, folder: Path) -> DiskRates:
        """Rates of the disk of `folder`, read and written together too; measured once, some seconds.

        With `given_rates` nothing is measured, and half of the disk's write rate is taken each way.
        UserError: the folder cannot be written.
        """
        from ..offload.rates import DiskRates, measure_disk

        key = str(folder)
        if key not in self._disks:
            write = self.given_rates and self.given_rates.disk_write
            self._disks[key] = (
                DiskRates(read=write, write=write, mixed=write) if write else measure_disk(folder)
            )
        return self._disks[key]

    @cached_property
    def decoding(self) -> CodeRate | None:
        """How quickly frozen layers are decoded (`offload.coded_layers`), measured at the first access.

        None: nothing here decodes them quickly. With `given_rates` nothing is measured, and it is None.
        """
        from ..offload.code_rate import measure_decoding

        return None if self.given_rates else measure_decoding(self.device)

    @cached_property
    def _disks(self) -> dict[str, DiskRates]:
        return {}

    @property
    def matmul_flops(self) -> float:
        """bf16 matrix products, floating-point operations a second."""
        return self.rates.matmul_bf16

    @property
    def disk_write_rate(self) -> float:
        """Bytes a second written and fsynced below output_dir."""
        return self.rates.disk_write

    def describe(self) -> list[tuple[str, str]]:
        """Label and value of every figure, for `shoestring doctor`. Measures the rates."""
        giga = 1e9
        rates = self.rates
        lines = [
            ("device", f"{self.device}, {self.name}"),
            ("cores", f"{self.cores} usable of {psutil.cpu_count() or self.cores}"),
            (
                "host memory",
                f"{self.host_bytes / giga:.1f} GB free of {self.host_total_bytes / giga:.1f} GB "
                f"(limit: {self.host_limit_source})",
            ),
        ]
        if self.device != "cpu":
            free, total = self.device_bytes / giga, self.device_total_bytes / giga
            lines.append(("device memory", f"{free:.1f} GB free of {total:.1f} GB"))
        lines += [
            ("disk", f"{self.disk_bytes / giga:.1f} GB free at {self.output_dir}"),
            ("matmul bf16", f"{rates.matmul_bf16 / giga:,.0f} GFLOP/s"),
            ("matmul fp32", f"{rates.matmul_fp32 / giga:,.0f} GFLOP/s"),
            ("memory copy", f"{rates.copy / giga:.1f} GB/s"),
            ("disk write", f"{rates.disk_write / 1e6:,.0f} MB/s with fsync"),
            ("energy", self.watts_source or "cannot be measured here"),
        ]
        return lines


def probe(output_dir: str | Path, *, device: str | None = None) -> Machine:
    """The machine as it is now. `device` overrides the choice (cuda where there is one, else cpu)."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    device_free = device_total = 0
    name = _cpu_name()
    if device.startswith("cuda"):
        device_free, device_total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()

    memory = psutil.virtual_memory()
    total, available, source = int(memory.total), int(memory.available), "hardware"
    group = cgroup_memory()
    if group is not None and group.limit < total:
        total, source = group.limit, "control group"
        available = min(available, group.free)
    folder = Path(output_dir)
    return Machine(
        device=device,
        name=name,
        cores=usable_cores(cgroup_cores()),
        host_total_bytes=total,
        host_bytes=max(0, available),
        device_total_bytes=int(device_total),
        device_bytes=int(device_free),
        disk_bytes=int(psutil.disk_usage(str(existing_parent(folder))).free),
        output_dir=str(folder),
        watts_source=_watts_source(device),
        host_limit_source=source,
    )


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # no /proc: not Linux, the platform module answers
    return platform.processor() or platform.machine()


def _watts_source(device: str) -> str | None:
    if device.startswith("cuda"):
        import pynvml

        try:
            pynvml.nvmlInit()
            board = pynvml.nvmlDeviceGetHandleByIndex(0)
            try:
                pynvml.nvmlDeviceGetTotalEnergyConsumption(board)
            except pynvml.NVMLError:
                pynvml.nvmlDeviceGetPowerUsage(board)  # older boards: power is integrated
        except pynvml.NVMLError:
            return None
        return "nvml"
    try:
        Path("/sys/class/powercap/intel-rapl:0/energy_uj").read_text()
    except OSError:
        return None
    return "rapl"
