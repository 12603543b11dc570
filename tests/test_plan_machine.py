"""The machine: limits of control groups of both versions, and rates that are measured and kept."""

from pathlib import Path

import pytest
from shoestring.checkpoint.control_group import GroupMemory, cgroup_memory
from shoestring.plan import probe
from shoestring.plan.limits import cgroup_cores, existing_parent, usable_cores
from shoestring.plan.rates import measure_rates
from shoestring.recipes.errors import UserError


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_version_two_takes_the_tightest_limit_up_to_the_root(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "membership": "0::/pod/job\n",
            "fs/pod/memory.max": "4000\n",
            "fs/pod/memory.current": "3000\n",
            "fs/pod/memory.stat": "anon 100\ninactive_file 1500\n",
            "fs/pod/job/memory.max": "max\n",
            "fs/pod/job/memory.current": "200\n",
            "fs/pod/cpu.max": "150000 100000\n",
            "fs/pod/job/cpu.max": "max 100000\n",
        },
    )
    found = cgroup_memory(tmp_path / "fs", tmp_path / "membership")
    assert found == GroupMemory(4000, 1500, tmp_path / "fs" / "pod")
    assert cgroup_cores(tmp_path / "fs", tmp_path / "membership") == 1.5


def test_version_one(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "membership": "9:cpu,cpuacct:/box\n5:memory:/box\n1:name=systemd:/\n",
            "fs/memory/box/memory.limit_in_bytes": "8000\n",
            "fs/memory/box/memory.usage_in_bytes": "1000\n",
            "fs/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "fs/cpu/box/cpu.cfs_quota_us": "50000\n",
            "fs/cpu/box/cpu.cfs_period_us": "100000\n",
            "fs/cpu/cpu.cfs_quota_us": "-1\n",
            "fs/cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    assert cgroup_memory(tmp_path / "fs", tmp_path / "membership") == GroupMemory(
        8000, 1000, tmp_path / "fs/memory/box"
    )
    assert cgroup_cores(tmp_path / "fs", tmp_path / "membership") == 0.5


def test_a_path_from_outside_the_container_falls_back_to_the_mounts_root(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"membership": "0::/../../host/abc\n", "fs/memory.max": "700\n", "fs/memory.current": "10\n"},
    )
    assert cgroup_memory(tmp_path / "fs", tmp_path / "membership") == GroupMemory(700, 10, tmp_path / "fs")


def test_no_limit_is_none(tmp_path: Path) -> None:
    write(tmp_path, {"membership": "0::/\n", "fs/memory.max": "max\n"})
    assert cgroup_memory(tmp_path / "fs", tmp_path / "membership") is None
    assert cgroup_memory(tmp_path / "fs", tmp_path / "nothing") is None
    assert cgroup_cores(tmp_path / "fs", tmp_path / "membership") is None


def test_a_quota_is_rounded_up_and_never_below_one() -> None:
    assert usable_cores(0.5) == 1
    assert 1 <= usable_cores(1.2) <= 2
    assert usable_cores(None) >= 1


def test_probe_says_what_is_free_and_measures_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoestring.plan.machine.measure_rates", measure_rates)  # the real one
    machine = probe(tmp_path / "runs" / "a", device="cpu")
    assert 0 < machine.host_bytes <= machine.host_total_bytes
    assert machine.device_bytes == 0
    assert machine.disk_bytes > 0
    assert machine.rates is machine.rates
    assert machine.matmul_flops > 1e9
    assert machine.disk_write_rate > 1e5
    labels = [label for label, _ in machine.describe()]
    assert labels[:3] == ["device", "cores", "host memory"]
    assert list(tmp_path.iterdir()) == []  # the probe leaves no file


def test_existing_parent(tmp_path: Path) -> None:
    assert existing_parent(tmp_path / "a" / "b") == tmp_path


def test_an_output_dir_that_cannot_be_written_is_the_users_to_change() -> None:
    with pytest.raises(UserError) as caught:
        measure_rates("cpu", Path("/proc/nothing"))
    assert str(caught.value).startswith("output_dir      cannot write below /proc: ")
    assert "output_dir=PATH" in str(caught.value)
