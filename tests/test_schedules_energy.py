"""Energy counters: NVML and RAPL with fakes; resets, wraps, missing and unreadable counters."""

from types import SimpleNamespace

import pytest
from shoestring.schedules import energy_counters


class NVMLError(Exception):
    pass


def fake_nvml(boards, *, works=True):
    """`boards`: per GPU a dict with uuid and mj, the reading in millijoules (None: not supported)."""

    def init():
        if not works:
            raise NVMLError("driver not loaded")

    def energy(board):
        if board["mj"] is None:
            raise NVMLError("not supported")
        return board["mj"]

    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=init,
        nvmlDeviceGetCount=lambda: len(boards),
        nvmlDeviceGetHandleByIndex=lambda i: boards[i],
        nvmlDeviceGetUUID=lambda board: board["uuid"],
        nvmlDeviceGetTotalEnergyConsumption=energy,
    )


def test_the_gpu_counter_counts_from_where_it_stood_and_survives_a_reset(tmp_path):
    board = {"uuid": "GPU-a", "mj": 5_000_000}
    (counter,) = energy_counters(nvml=fake_nvml([board]), powercap=tmp_path)
    assert counter.name == "GPU 0 (NVML)"
    assert counter.joules() == 0.0
    board["mj"] += 12_345
    assert counter.joules() == pytest.approx(12.345)
    board["mj"] = 2_000
    assert counter.joules() == pytest.approx(14.345)


def test_only_this_runs_boards_with_a_counter_are_read(tmp_path):
    boards = [{"uuid": "a", "mj": 1}, {"uuid": b"b", "mj": 1}, {"uuid": "c", "mj": None}]
    names = [c.name for c in energy_counters(nvml=fake_nvml(boards), gpu_uuids=["b", "c"], powercap=tmp_path)]
    assert names == ["GPU 1 (NVML)"]


def test_without_a_driver_there_is_no_gpu_counter(tmp_path):
    assert energy_counters(nvml=fake_nvml([], works=False), powercap=tmp_path) == []


def zone(root, folder, name, microjoules, most=10_000_000):
    path = root / folder
    path.mkdir()
    (path / "name").write_text(f"{name}\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    (path / "max_energy_range_uj").write_text(f"{most}\n")
    return path / "energy_uj"


def test_rapl_sums_packages_only_and_wraps_at_its_own_range(tmp_path):
    package = zone(tmp_path, "intel-rapl:0", "package-0", 9_000_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 1)
    zone(tmp_path, "intel-rapl:1", "psys", 1)
    (counter,) = energy_counters(nvml=fake_nvml([], works=False), powercap=tmp_path)
    assert counter.name == "CPU package 0 (RAPL)"
    package.write_text("9500000\n")
    assert counter.joules() == pytest.approx(0.5)
    package.write_text("250000\n")
    assert counter.joules() == pytest.approx(1.25)


def test_a_package_whose_counter_cannot_be_read_is_left_out(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 1).unlink()
    assert energy_counters(nvml=fake_nvml([], works=False), powercap=tmp_path) == []
