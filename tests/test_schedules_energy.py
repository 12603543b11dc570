"""Energy counters: NVML and RAPL with fakes; resets, wraps, missing and unreadable counters, MIG, resume."""

import threading
import time
from types import SimpleNamespace

import pytest
from shoestring.schedules import Clock, Counter, Limits, energy_counters, energy_source
from shoestring.schedules.power import IntegratedPower


class NVMLError(Exception):
    pass


def fake_nvml(boards, *, works=True):
    """`boards`: per GPU a dict with uuid, and what is supported of mj, mw (readings), parts and processes."""

    def init():
        if not works:
            raise NVMLError("driver not loaded")

    def reading(name):
        def read(board):
            if board.get(name) is None:
                raise NVMLError("not supported")
            return board[name]

        return read

    def part(board, index):
        if index >= len(board["parts"]):
            raise NVMLError("not found")
        return {"uuid": board["parts"][index]}

    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=init,
        nvmlDeviceGetCount=lambda: len(boards),
        nvmlDeviceGetHandleByIndex=lambda i: boards[i],
        nvmlDeviceGetUUID=lambda board: board["uuid"],
        nvmlDeviceGetTotalEnergyConsumption=reading("mj"),
        nvmlDeviceGetPowerUsage=reading("mw"),
        nvmlDeviceGetMigMode=lambda board: (reading("parts")(board) and 1, 0),
        nvmlDeviceGetMaxMigDeviceCount=lambda board: 7,
        nvmlDeviceGetMigDeviceHandleByIndex=part,
        nvmlDeviceGetComputeRunningProcesses=reading("processes"),
    )


# GPUs


def test_the_gpu_counter_counts_from_where_it_stood_and_survives_a_reset(tmp_path):
    board = {"uuid": "GPU-a", "mj": 5_000_000}
    (counter,) = energy_counters(nvml=fake_nvml([board]), powercap=tmp_path)
    assert counter.name == "GPU 0 (NVML)"
    assert counter.joules() == 0.0
    board["mj"] += 12_345
    assert counter.joules() == pytest.approx(12.345)
    board["mj"] = 2_000  # the driver was loaded again: this much since then
    assert counter.joules() == pytest.approx(14.345)
    board["mj"] = 3_000
    assert counter.joules() == pytest.approx(15.345)


def test_a_counter_that_slips_back_is_not_counted_twice(tmp_path):
    board = {"uuid": "GPU-a", "mj": 5_000_000}
    (counter,) = energy_counters(nvml=fake_nvml([board]), powercap=tmp_path)
    board["mj"] = 4_999_000
    assert counter.joules() == 0.0
    board["mj"] = 5_001_000
    assert counter.joules() == pytest.approx(2.0)


def test_only_this_runs_boards_with_a_counter_are_read(tmp_path):
    boards = [{"uuid": "a", "mj": 1}, {"uuid": b"b", "mj": 1}, {"uuid": "c"}]
    names = [c.name for c in energy_counters(nvml=fake_nvml(boards), gpu_uuids=["b", "c"], powercap=tmp_path)]
    assert names == ["GPU 1 (NVML)"]


def test_a_part_of_a_divided_board_is_counted_as_the_whole_board(tmp_path):
    boards = [{"uuid": "GPU-a", "mj": 1}, {"uuid": "GPU-b", "mj": 1, "parts": ["MIG-x", "MIG-y"]}]
    counters = energy_counters(nvml=fake_nvml(boards), gpu_uuids=["GPU-y"], powercap=tmp_path)
    assert [c.name for c in counters] == ["GPU 1 (NVML, whole board)"]


def test_a_board_that_others_compute_on_is_named_a_whole_board(tmp_path):
    boards = [{"uuid": "a", "mj": 1, "processes": [1]}, {"uuid": "b", "mj": 1, "processes": [1, 2]}]
    names = [c.name for c in energy_counters(nvml=fake_nvml(boards), powercap=tmp_path)]
    assert names == ["GPU 0 (NVML)", "GPU 1 (NVML, whole board)"]
    assert energy_source(energy_counters(nvml=fake_nvml(boards), powercap=tmp_path)) == ", ".join(names)


def test_without_a_driver_there_is_no_gpu_counter(tmp_path):
    assert energy_counters(nvml=fake_nvml([], works=False), powercap=tmp_path) == []
    assert energy_source([]) is None


# Integrated power


def test_power_is_integrated_by_trapezoids():
    at, watts = [0.0], [100.0]
    meter = IntegratedPower(lambda: watts[0], now=lambda: at[0], period=1e6)
    assert meter.joules() == 0.0
    expected = 0.0
    for seconds, power in ((1.0, 200.0), (0.5, 50.0), (2.0, 50.0)):
        expected += 0.5 * (watts[0] + power) * seconds
        at[0], watts[0] = at[0] + seconds, power
        assert meter.joules() == pytest.approx(expected)


def test_a_board_without_a_counter_is_sampled_ten_times_a_second(tmp_path):
    readings = []

    class Board(dict):
        def get(self, name):
            if name == "mw":
                readings.append(time.monotonic())
            return super().get(name)

    board = Board(uuid="GPU-a", mw=80_000)
    made = time.monotonic()
    (counter,) = energy_counters(nvml=fake_nvml([board]), powercap=tmp_path)
    assert counter.name == "GPU 0 (NVML, integrated power)"
    began = time.monotonic()
    time.sleep(0.7)
    count, asked = len(readings), time.monotonic()
    joules = counter.joules()
    assert 0.98 * 80.0 * (asked - began) <= joules <= 1.02 * 80.0 * (time.monotonic() - made)
    assert 3 <= count <= 2 + (asked - made) / 0.1
    assert [t.daemon for t in threading.enumerate() if t.name == "integrated power"] != []


def test_a_meter_that_fails_says_so_instead_of_standing_still():
    at, broken = [0.0], [False]

    def watts():
        if broken[0]:
            raise NVMLError("GPU is lost")
        return 10.0

    meter = IntegratedPower(watts, now=lambda: at[0], period=0.01)
    broken[0] = True
    deadline = time.monotonic() + 5.0
    while time.monotonic() < deadline and meter._error is None:
        time.sleep(0.01)
    with pytest.raises(NVMLError, match="GPU is lost"):
        meter.joules()


# CPUs


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


@pytest.mark.parametrize(
    ("seconds", "value", "joules"),
    [
        (10.0, 40.0, 262_144.0 - 262_000.0 + 40.0),  # it wrapped: 184 J in ten seconds
        (1.0, 5.0, 149.0),
        (1e5, 100_000.0, 100_144.0),
    ],
)
def test_a_fall_is_a_wrap_where_that_much_can_have_been_drawn(seconds, value, joules):
    at, reading = [0.0], [262_000.0]
    counter = Counter("CPU", lambda: reading[0], 262_144.0, now=lambda: at[0])
    at[0], reading[0] = seconds, value
    assert counter.joules() == pytest.approx(joules)


def test_a_fall_far_from_the_range_is_a_reset_and_no_wrap():
    at, reading = [0.0], [100_000.0]
    counter = Counter("CPU", lambda: reading[0], 262_144.0, now=lambda: at[0])
    at[0], reading[0] = 10.0, 30.0  # a wrap would be 162 kJ in ten seconds
    assert counter.joules() == pytest.approx(30.0)
    at[0], reading[0] = 20.0, 80.0
    assert counter.joules() == pytest.approx(80.0)


def test_a_package_whose_counter_cannot_be_read_is_left_out(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 1).unlink()
    assert energy_counters(nvml=fake_nvml([], works=False), powercap=tmp_path) == []


# A run


def test_a_resumed_run_keeps_the_energy_and_the_money_of_the_process_before(tmp_path):
    package = zone(tmp_path, "intel-rapl:0", "package-0", 9_000_000)
    board = {"uuid": "a", "mj": 1_000_000}
    at = [0.0]

    def process():
        counters = energy_counters(nvml=fake_nvml([board]), powercap=tmp_path)
        return Clock(
            Limits(joules=100.0, price_per_hour=3.6),
            started=at[0],
            now=lambda: at[0],
            joules=lambda: sum(counter.joules() for counter in counters),
            energy_source=energy_source(counters),
        )

    def train(clock):
        steps = 0
        while clock.plan_step(100).go and steps < 10:
            at[0] += 1.0
            board["mj"] += 3_000
            package.write_text(str((int(package.read_text()) + 2_000_000) % 10_000_000))
            clock.finish_step(1.0, 100)
            steps += 1
        return clock

    first = train(process())
    assert first.energy_source == "GPU 0 (NVML), CPU package 0 (RAPL)"
    assert first.joules == pytest.approx(50.0)
    state = first.state_dict()
    board["mj"], at[0] = 7_000, at[0] + 500.0  # another boot, later; nobody pays for the time between
    second = process()
    second.load_state_dict(state)
    assert second.joules == pytest.approx(50.0)
    assert second.cost == pytest.approx(0.010)
    train(second)
    assert 94.0 <= second.joules <= 100.0
    assert second.cost == pytest.approx(0.001 * second.seconds)
    assert second.used()["energy"] == {"given": 100.0, "used": second.joules}
    assert second.progress == 1.0
