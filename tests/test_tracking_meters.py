"""Memory and energy meters."""

from __future__ import annotations

import gc
import mmap
import subprocess
import sys

import pytest
import torch
from shoestring.train.meters import Memory, Power, gpu_uuids

BIG = 200_000_000


def test_a_peak_is_seen_even_between_two_readings() -> None:
    memory = Memory()
    gc.collect()  # what earlier tests left must not be freed between the readings
    memory.reset_peak()
    before = memory.host_bytes()
    block = mmap.mmap(-1, BIG)  # the heap may have kept as much from earlier tests
    for page in range(0, BIG, mmap.PAGESIZE):
        block[page] = 1
    during = memory.host_bytes()
    block.close()
    assert during - before > 0.9 * BIG
    assert memory.host_bytes() < during - 0.5 * BIG
    assert memory.peak_host_bytes >= during


RESET = f"""
import numpy as np
from shoestring.train.meters import Memory, high_water_mark
block = np.ones({BIG}, dtype=np.uint8)
del block
memory = Memory()
high = high_water_mark()
print(high, memory.reset_peak(), memory.peak_host_bytes)
"""


def test_a_reset_begins_a_new_peak() -> None:
    """In a process of its own: what this one has freed before may still be resident."""
    command = [sys.executable, "-c", RESET]
    high, reset, peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    if reset == "True":  # the kernel allows it
        assert int(peak) < int(high) - 0.5 * BIG
    else:
        assert int(peak) >= int(high)


def test_workers_count() -> None:
    memory = Memory()
    memory.reset_peak()
    before = memory.peak_host_bytes
    program = f"import sys; x = bytearray(b'x') * {BIG}; print('ready', flush=True); sys.stdin.read()"
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        assert memory.peak_host_bytes - before > 0.9 * BIG
    finally:
        child.communicate()


def test_no_gpu_no_figure() -> None:
    memory = Memory(torch.device("cpu"))
    assert memory.device_bytes() is None
    assert memory.peak_device_bytes is None
    assert set(memory.now()) == {"host_bytes", "device_bytes", "watts"}
    assert memory.now()["watts"] is None


def test_power_is_energy_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now, used = [100.0], [7.0]
    monkeypatch.setattr("shoestring.train.meters.time.monotonic", lambda: now[0])
    power = Power(lambda: used[0])
    assert power.watts() is None
    now[0], used[0] = 102.0, 307.0
    assert power.watts() == 150.0
    now[0] += 0.05
    assert power.watts() == 150.0  # too soon for a new figure
    assert Memory(joules=lambda: used[0]).now()["watts"] is None  # nothing between its start and now


def test_without_a_counter_there_is_no_power() -> None:
    assert Power(lambda: None).watts() is None
    assert gpu_uuids(torch.device("cpu")) == []
