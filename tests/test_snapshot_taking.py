"""Snapshots of real tensors: what they hold, when the tensors may change, what a thousand leave behind."""

from __future__ import annotations

import gc
import os
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from keeper_processes import QUICK, alive, keepers_of, memories, no_keeper_left, state, step_in, take, until
from shoestring.checkpoint import KeeperSettings, Snapshotter, newest, save
from shoestring.checkpoint.room import Room
from shoestring.offload.stored import Stored
from shoestring.recipes.errors import UserError

__all__ = ["no_keeper_left"]  # a fixture, for every test here


class Elsewhere:
    """A `Stored` in memory; `fail` makes it unreadable."""

    def __init__(self, tensor: torch.Tensor, *, fail: bool = False) -> None:
        self.dtype, self.shape, self.fail = tensor.dtype, tensor.shape, fail
        self._tensor = tensor

    @property
    def nbytes(self) -> int:
        return self._tensor.nbytes

    def read(self, first: int, count: int) -> torch.Tensor:
        if self.fail:
            raise OSError(5, "Input/output error")
        return self._tensor.flatten()[first : first + count].clone()


def all_kinds() -> dict[str, torch.Tensor | Stored]:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(70, 30, generator=generator)
    return {
        "plain": wide,
        "transposed": wide.t(),
        "strided": wide[::3, 1::2],
        "conjugate": torch.complex(wide, wide).conj(),
        "parameter": torch.nn.Parameter(wide.double()),
        "half": wide.bfloat16(),
        "eight": wide.to(torch.float8_e4m3fn),
        "bits": wide > 0,
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.zeros(0, 4),
        "long": torch.randn(2_500_001, generator=generator),
        "elsewhere": Elsewhere(torch.arange(10_000, dtype=torch.int16).view(100, 100)),
    }


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).numpy())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    lines: list[str] = []
    yield lines
    assert lines == []


def test_every_file_has_the_bytes_that_save_writes(run: Path, tmp_path: Path) -> None:
    tensors = {"model": all_kinds(), "optimizer": {"m": torch.ones(5)}}
    json = {"trainer": {"loss": float("nan"), "text": "ü"}, "random": [1, 2.5]}
    path = save(tmp_path / "disk", step=7, tensors=tensors, json=json)
    with Snapshotter(run, settings=QUICK) as snapshots:
        assert snapshots.begin(7, tensors=tensors, json=json, files={"config.json": b"{}"})
        snapshots.flush()
        found = snapshots.newest()
        assert found is not None
        assert (found.step, found.generation) == (7, 1)
        expected = {file.name: file.read_bytes() for file in path.iterdir() if file.name != "MANIFEST.json"}
        assert {name: bytes(found.file(name)) for name in found.files} == expected | {"config.json": b"{}"}
        assert found.bytes == sum(map(len, expected.values())) + 2
        on_disk = newest(tmp_path / "disk", print)
        assert on_disk is not None
        theirs = on_disk.tensors("model")
        stored = found.open_tensors("model")
        for ours in (found.tensors("model"), found.views("model")):
            assert ours.keys() == theirs.keys()
            for name, tensor in ours.items():
                assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape)
                assert raw(tensor) == raw(theirs[name])
        assert torch.equal(stored["long"].read(1_000, 50), theirs["long"][1_000:1_050])
        assert isinstance(stored["long"], Stored)
        assert stored["long"].nbytes == theirs["long"].nbytes
        assert found.json("random") == [1, 2.5]
        with pytest.raises(KeyError, match=r"has no other\.json; it has config\.json, model"):
            found.json("other")


def test_what_cannot_be_stored_is_named(run: Path) -> None:
    with Snapshotter(run, settings=QUICK) as snapshots:
        with pytest.raises(TypeError, match=r"trainer\.x is a set"):
            snapshots.begin(1, tensors={}, json={"trainer": {"x": {1}}})
        with pytest.raises(ValueError, match=r"a\.json is given twice"):
            snapshots.begin(1, tensors={}, json={"a": 1}, files={"a.json": b""})
        with pytest.raises(ValueError, match="cannot name a part"):
            snapshots.begin(1, tensors={"../x": {}}, json={})


def test_a_slow_copy_makes_wait_wait_and_holds_the_boundary(run: Path) -> None:
    gate, reached = threading.Event(), threading.Event()

    def at(point: str) -> None:
        if point == "file":
            reached.set()
            assert gate.wait(20)

    with Snapshotter(run, settings=QUICK, at=at) as snapshots:
        weights = torch.full((100_000,), 1.0)
        counters = {"step": 1}
        began = time.perf_counter()
        snapshots.reserve(tensors={"model": {"w": weights}}, json={"trainer": counters})
        assert snapshots.begin(1, tensors={"model": {"w": weights}}, json={"trainer": counters})
        assert reached.wait(20)
        counters["step"] = 2  # taken at `begin`
        assert not snapshots.begin(2, tensors={"model": {"w": weights}}, json={"trainer": counters})
        assert snapshots.skipped == 1
        threading.Timer(0.3, gate.set).start()
        asked = time.perf_counter()
        snapshots.wait()
        now = time.perf_counter()
        assert now - began >= 0.3
        assert 0.5 * (now - asked) <= snapshots.waited_seconds <= now - began
        weights.fill_(2.0)
        snapshots.flush()
        found = snapshots.newest()
        assert found is not None
        assert found.json("trainer") == {"step": 1}
        assert torch.equal(found.tensors("model")["w"], torch.full((100_000,), 1.0))
        assert (snapshots.taken, snapshots.last.step if snapshots.last else None) == (1, 1)
        assert snapshots.copy_seconds > 0.2


def test_without_wait_the_snapshot_would_be_torn(run: Path) -> None:
    """The race is real: the test above would not pass by luck."""
    gate, reached = threading.Event(), threading.Event()

    def at(point: str) -> None:
        if point == "file":
            reached.set()
            assert gate.wait(20)

    with Snapshotter(run, settings=QUICK, at=at) as snapshots:
        weights = torch.full((100_000,), 1.0)
        snapshots.begin(1, tensors={"model": {"w": weights}}, json={})
        assert reached.wait(20)
        weights.fill_(2.0)
        gate.set()
        snapshots.flush()
        found = snapshots.newest()
        assert found is not None
        assert found.tensors("model")["w"][0] == 2.0


def test_a_copy_that_fails_is_told_at_the_next_call_and_costs_one_snapshot(run: Path) -> None:
    with Snapshotter(run, settings=QUICK) as snapshots:
        take(snapshots, 1)
        unreadable = Elsewhere(torch.ones(100_000), fail=True)
        broken: Any = {"model": {"w": unreadable}}
        assert snapshots.begin(2, tensors=broken, json={})
        with pytest.raises(OSError, match="Input/output error"):
            snapshots.wait()
        snapshots.wait()
        assert snapshots.begin(2, tensors=broken, json={})
        with pytest.raises(OSError, match="Input/output error"):
            snapshots.flush()
        found = snapshots.newest()
        assert found is not None
        assert step_in(found) == 1
        del found
        assert snapshots.begin(2, tensors=broken, json={})
        until(snapshots._done.is_set)
        with pytest.raises(OSError, match="Input/output error"):
            snapshots.begin(3, tensors=state(3), json={"trainer": {"step": 3}})
        take(snapshots, 3)
        assert snapshots.taken == 2
        snapshots.begin(4, tensors=broken, json={})
        with pytest.raises(OSError, match="Input/output error"):
            snapshots.close()
    assert keepers_of(run) == []


@pytest.mark.parametrize("slots", [2, 3])
def test_what_is_being_read_is_not_written(run: Path, warnings: list[str], slots: int) -> None:
    with Snapshotter(run, slots=slots, settings=QUICK, warn=warnings.append) as snapshots:
        for step in (1, 2):
            take(snapshots, step)
        found = snapshots.newest()
        assert found is not None
        views = found.views("model")
        del found
        for step in range(3, 9):
            if snapshots.begin(step, tensors=state(step), json={"trainer": {"step": step}}):
                snapshots.flush()
            assert torch.equal(views["w"], torch.full((200_000,), 2.0))
        # With two, one can be written beside it; then it is the newest, and nothing else is free.
        assert snapshots.taken == (3 if slots == 2 else 8)
        assert snapshots.skipped == (5 if slots == 2 else 0)
        views["w"].zero_()  # the reader's own pages
        del views
        gc.collect()
        take(snapshots, 9)
        last = snapshots.newest()
        assert last is not None
        assert step_in(last) == 9


def test_a_state_that_grows_gets_a_larger_memory(run: Path, warnings: list[str]) -> None:
    with Snapshotter(run, settings=QUICK, warn=warnings.append) as snapshots:
        take(snapshots, 1, floats=1000)
        assert snapshots.begin(2, tensors=state(2, 300_000), json={"trainer": {"step": 2}})
        snapshots.flush()
        take(snapshots, 3, floats=300_000)
        found = snapshots.newest()
        assert found is not None
        assert (step_in(found), found.generation) == (3, 3)
        snapshots.leave()
    with Snapshotter(run, settings=QUICK, warn=warnings.append) as snapshots:
        again = snapshots.newest()
        assert again is not None
        assert (step_in(again), again.generation) == (3, 3)
        assert snapshots.begin(4, tensors=state(4, 300_000), json={"trainer": {"step": 4}})
        snapshots.flush()
        assert snapshots.last is not None
        assert snapshots.last.generation == 4, "generations only grow"


def test_a_memory_that_is_larger_is_not_held_before_it_has_a_snapshot(run: Path) -> None:
    held: list[tuple[int, int]] = []

    def at(point: str) -> None:
        (keeper,) = keepers_of(run)
        held.append((snapshots.taken, memories(keeper)))

    with Snapshotter(run, settings=QUICK, at=at) as snapshots:
        take(snapshots, 1, floats=1000)
        assert {count for taken, count in held if taken == 0} == {0}
        old = snapshots._memory
        take(snapshots, 2, floats=300_000)
        assert {count for taken, count in held if taken == 1} == {1}
        assert snapshots._memory is not old
        assert old is not None
        assert old.fd == -1


def test_a_constant_part_is_stored_once(run: Path, warnings: list[str]) -> None:
    base = {"base": {"w": torch.randn(500_000), "b": torch.arange(3)}}

    def trained(step: int) -> dict[str, dict[str, torch.Tensor]]:
        return {"adapter": {"a": torch.full((1000,), float(step))}}

    with Snapshotter(run, constant=base, settings=QUICK, warn=warnings.append) as snapshots:
        for step in (1, 2, 3):
            assert snapshots.begin(step, tensors=trained(step), json={})
            snapshots.flush()
        memory = snapshots._memory
        assert memory is not None
        assert memory.geometry.constant_bytes > 2_000_000 > memory.geometry.slot_bytes
        inode = os.fstat(memory.fd).st_ino
        snapshots.leave()
    until(lambda: newest(run, print) is not None)
    on_disk = newest(run, print)
    assert on_disk is not None
    assert torch.equal(on_disk.tensors("base")["w"], base["base"]["w"])

    same = {"base": {name: tensor.clone() for name, tensor in base["base"].items()}}
    with Snapshotter(run, constant=same, settings=QUICK, warn=warnings.append) as snapshots:
        found = snapshots.newest()
        assert found is not None
        assert torch.equal(found.views("base")["w"], base["base"]["w"])
        assert found.views("adapter")["a"][0] == 3
        until(lambda: snapshots.begin(4, tensors=trained(4), json={}))
        snapshots.flush()
        assert os.fstat(snapshots._memory.fd if snapshots._memory else -1).st_ino == inode
        del found
        snapshots.leave()

    same["base"]["w"][77] += 1
    with Snapshotter(run, constant=same, settings=QUICK, warn=warnings.append) as snapshots:
        found = snapshots.newest()
        assert found is not None
        assert torch.equal(found.views("base")["w"], base["base"]["w"]), "that of the snapshot"
        until(lambda: snapshots.begin(5, tensors=trained(5), json={}))
        snapshots.flush()
        later = snapshots.newest()
        assert later is not None
        assert torch.equal(later.views("base")["w"], same["base"]["w"])
        assert os.fstat(snapshots._memory.fd if snapshots._memory else -1).st_ino != inode


def test_too_large_is_refused_before_anything_is_taken(run: Path) -> None:
    shapes = {"model": {"w": torch.empty(10**12, device="meta")}}
    with Snapshotter(run, settings=QUICK) as snapshots:
        with pytest.raises(UserError, match=r"need 80\d\d\.\d\d GB \(2 slots of 40\d\d\.\d\d GB\); the "):
            snapshots.reserve(tensors=shapes, json={})
        assert snapshots._memory is None
        take(snapshots, 1)
    group = Room(1_000_000, "the control group /slice")
    with (
        Snapshotter(run, settings=QUICK, room=lambda: group) as snapshots,
        pytest.raises(UserError, match=r"the control group /slice has 1\.00 MB free"),
    ):
        snapshots.begin(1, tensors=state(1), json={})


def test_a_limit_of_the_system_is_told_too(run: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Snapshotter(run, settings=QUICK) as snapshots:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
        try:
            with pytest.raises(UserError, match="the system refuses so much: File too large"):
                snapshots.begin(1, tensors=state(1), json={"trainer": {"step": 1}})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        take(snapshots, 1)


def test_settings_are_checked(run: Path) -> None:
    with pytest.raises(UserError, match=r"slots=1: must be 2 to 16"):
        Snapshotter(run, slots=1)
    for wrong in (
        {"lease": -1.0},
        {"heartbeat": 0.0},
        {"persist_rate": float("nan")},
        {"patience": float("inf")},
    ):
        (key,) = wrong
        with pytest.raises(UserError, match=f"{key}=.*must be a number"):
            KeeperSettings(**wrong)
    assert not run.exists()


def test_the_end_of_the_block_says_what_is_to_be_kept(run: Path) -> None:
    with Snapshotter(run, settings=QUICK) as snapshots:
        take(snapshots, 1)
        first = snapshots.keeper_pid
    until(lambda: not alive(first))
    assert list(run.iterdir()) == [], "nothing to keep, and nothing that had to be said"
    with pytest.raises(ZeroDivisionError), Snapshotter(run, settings=QUICK) as snapshots:  # noqa: PT012
        assert snapshots.newest() is None
        take(snapshots, 2)
        1 / 0  # noqa: B018
    until(lambda: newest(run, print) is not None)
    with Snapshotter(run, settings=QUICK) as snapshots:
        found = snapshots.newest()
        assert found is not None
        assert step_in(found) == 2
        del found
        snapshots.forget()
        assert snapshots.newest() is None
        take(snapshots, 1)
        assert snapshots.last is not None
        assert snapshots.last.generation == 2


def test_a_thousand_snapshots_leave_nothing_behind(run: Path, warnings: list[str]) -> None:
    tensors, count = state(1, 20_000), 0

    def some(number: int) -> None:
        nonlocal count
        for _ in range(number):
            count += 1
            assert snapshots.begin(count, tensors=tensors, json={"trainer": {"step": 1}})
            snapshots.flush()

    def facts(pid: int) -> tuple[int, int, int]:
        rss = next(
            int(line.split()[1])
            for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            if line.startswith("VmRSS")
        )
        fds = list(Path(f"/proc/{pid}/fd").iterdir())
        maps = Path(f"/proc/{pid}/maps").read_text().count("memfd:shoestring")
        return len(fds), maps, rss

    with Snapshotter(run, settings=QUICK, warn=warnings.append) as snapshots:
        some(50)
        before = facts(os.getpid()), facts(snapshots.keeper_pid)
        some(1000)
        gc.collect()
        after = facts(os.getpid()), facts(snapshots.keeper_pid)
        for (fds, maps, rss), (fds_then, maps_then, rss_then) in zip(after, before, strict=True):
            assert (fds, maps) == (fds_then, maps_then)
            assert rss - rss_then < 1024, "kB"
        assert snapshots.taken == 1050
        assert before[1][1] == 0, "the keeper maps nothing"
        found = snapshots.newest()
        assert found is not None
        assert found.generation == 1050
        del found
