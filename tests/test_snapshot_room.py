"""How much memory may be taken, from trees as the kernel writes them; and how often a snapshot pays."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from shoestring.checkpoint import snapshot_interval
from shoestring.checkpoint.room import Room, free_memory, require
from shoestring.recipes.errors import UserError

GIB = 1 << 30


def tree(root: Path, files: dict[str, object]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    tree(tmp_path / "proc", {"meminfo": "MemTotal: 99 kB\nMemAvailable:   16777216 kB\nSwapFree: 5 kB"})
    return tmp_path / "proc"


def test_the_machine_alone(proc: Path, tmp_path: Path) -> None:
    assert free_memory(proc, tmp_path / "none") == Room(16 * GIB, "the machine")


def test_version_2_up_the_tree(proc: Path, tmp_path: Path) -> None:
    groups = tmp_path / "groups"
    tree(proc, {"self/cgroup": "0::/slice/job/step"})
    tree(groups, {"slice/job/step/memory.max": "max", "slice/job/step/memory.current": GIB})
    assert free_memory(proc, groups).limited_by == "the machine"
    tree(groups, {"slice/memory.max": 8 * GIB, "slice/memory.current": 5 * GIB})
    assert free_memory(proc, groups) == Room(3 * GIB, f"the control group {groups / 'slice'}")
    tree(groups, {"slice/memory.stat": f"anon 7\ninactive_file {GIB}\nactive_file 3"})
    assert free_memory(proc, groups).bytes == 4 * GIB
    tree(groups, {"slice/job/memory.max": 2 * GIB, "slice/job/memory.current": GIB})
    assert free_memory(proc, groups) == Room(GIB, f"the control group {groups / 'slice/job'}")
    tree(groups, {"slice/job/memory.current": 3 * GIB})
    assert free_memory(proc, groups).bytes == 0


def test_inside_a_container_the_root_is_our_group(proc: Path, tmp_path: Path) -> None:
    groups = tmp_path / "groups"
    tree(proc, {"self/cgroup": "0::/../other/elsewhere"})
    tree(groups, {"memory.max": GIB, "memory.current": 0})
    assert free_memory(proc, groups) == Room(GIB, f"the control group {groups}")


def test_version_1(proc: Path, tmp_path: Path) -> None:
    groups = tmp_path / "groups"
    tree(proc, {"self/cgroup": "7:cpu,cpuacct:/far\n5:memory:/job\n0::/"})
    unlimited = 9223372036854771712
    tree(groups, {"memory/memory.limit_in_bytes": unlimited, "memory/job/memory.limit_in_bytes": 4 * GIB})
    tree(groups, {"memory/job/memory.usage_in_bytes": 3 * GIB, "cpu/far/memory.limit_in_bytes": 1})
    assert free_memory(proc, groups).bytes == GIB
    tree(groups, {"memory/job/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB}"})
    assert free_memory(proc, groups).bytes == 2 * GIB


def test_this_machine() -> None:
    assert 0 < free_memory().bytes < 1 << 50


def test_refused_with_numbers() -> None:
    room = Room(10 * 10**9, "the control group /slice")
    require(9_400_000_000, room, slots=2, each=1, constant=0)
    with pytest.raises(UserError) as caught:
        require(9_600_000_000, room, slots=3, each=3_000_000_000, constant=600_000_000)
    assert str(caught.value) == (
        "Snapshots in memory need 9.60 GB (3 slots of 3.00 GB and 600.00 MB that never changes); "
        "the control group /slice has 10.00 GB free, of which 5% are left for everything else.\n"
        "Nothing was taken. Take slots=2. Train fewer weights; or train without snapshots in memory: "
        "checkpoints on the disk go on as before."
    )
    with pytest.raises(UserError, match=r"Nothing was taken\. Train fewer"):
        require(9_600_000_000, room, slots=2, each=3, constant=0)


def wall_time(interval: float, cost: float, between: float) -> float:
    """Daly 2006, eq. 20, for one second of work, without the factor of the restarts."""
    return between * math.expm1((interval + cost) / between) / interval


def best_interval(cost: float, between: float) -> float:
    """Its minimum, found by halving."""
    low, high = cost * 1e-3, between * 10
    for _ in range(200):
        third = (high - low) / 3
        one, two = low + third, high - third
        if wall_time(one, cost, between) < wall_time(two, cost, between):
            high = two
        else:
            low = one
    return (low + high) / 2


@pytest.mark.parametrize("ratio", [1e-5, 1e-3, 0.03, 0.1, 0.3])
def test_the_interval_is_the_minimum_of_the_expected_time(ratio: float) -> None:
    between = 21_600.0
    cost = ratio * between
    found, exact = snapshot_interval(cost, between), best_interval(cost, between)
    # The next term of the series is of the order (cost / 2M)^2 of the first; a lost one is far above that.
    assert abs(found / exact - 1) < 0.3 * (ratio / 2) ** 1.5 + 1e-6


def test_known_values_and_limits() -> None:
    assert snapshot_interval(0.07, 21_600) == pytest.approx(54.9, abs=0.1)
    assert snapshot_interval(0.88, 21_600) == pytest.approx(194.4, abs=0.1)
    assert snapshot_interval(50, 25) == 25
    assert snapshot_interval(0.07, 21_600, at_least=100) == 100
    assert snapshot_interval(50, 25, at_least=30) == 30
    for cost, between in ((0, 5), (5, 0), (-1, 5), (math.nan, 5), (5, math.inf)):
        with pytest.raises(ValueError, match="must be above 0"):
            snapshot_interval(cost, between)
