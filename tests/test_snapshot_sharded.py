"""Snapshots of several processes, killed as they are: whole again for any number of readers, or refused."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from keeper_processes import kill as end
from shard_processes import Trainer, start, value_at
from shoestring.checkpoint import ShardedSnapshot, newest_sharded
from shoestring.checkpoint.looking import dismiss, look
from shoestring.checkpoint.sharded_reading import shard_folders
from shoestring.checkpoint.slot_writer import POINTS

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    run = tmp_path / "run"
    yield run
    end_keepers(run)


def end_keepers(run: Path) -> None:
    for folders in shard_folders(run).values():
        for place in folders.values():
            dismiss(place)


def kill(trainers: list[Trainer]) -> int:
    """SIGKILL to all; the last step that all but one had told: what that one had not published, parity has.

    A process tells what it has published itself. The last one to be killed may tell of a step that two others
    did not come to publish.
    """
    for trainer in trainers:
        trainer.process.kill()
    for trainer in trainers:
        trainer.end()
    return sorted(trainer.said for trainer in trainers)[min(1, len(trainers) - 1)]


def wait_for(trainers: list[Trainer], step: int) -> None:
    for trainer in trainers:
        trainer.wait_for(step)


def check(found: ShardedSnapshot, *, ranks: int) -> None:
    """Every tensor is what it was at that step."""
    for file, tensors in value_at(found.step).items():
        read = found.tensors(file)
        assert read.keys() == tensors.keys()
        for name in tensors:
            assert torch.equal(read[name], tensors[name]), (found.step, name)
    assert found.jsons("own") == [{"rank": rank, "step": found.step} for rank in range(ranks)]
    assert found.json("trainer") == {"step": found.step}


def keeper_pids(run: Path) -> list[int]:
    pids = []
    for path in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if path.name.isdigit() and b"checkpoint.keeper" in (path / "cmdline").read_bytes():
                argument = (path / "cmdline").read_bytes().split(b"\0")[-2].decode()
                if argument.startswith(os.path.realpath(run)):
                    pids.append((argument, int(path.name)))
    return [pid for _, pid in sorted(pids)]


def test_killed_at_random_nothing_that_was_said_is_lost(folder: Path) -> None:
    draw = random.Random(5)
    step = 0
    for _ in range(6):
        trainers = start(folder, 3, begin=step)
        wait_for(trainers, step + 1)
        time.sleep(draw.uniform(0, 0.3))
        said = kill(trainers)
        lines: list[str] = []
        found = newest_sharded(folder, lines.append)
        assert found is not None, lines
        assert found.step >= said
        check(found, ranks=3)
        step = found.step
        found.close()


@pytest.mark.parametrize("point", [point for point in POINTS if point != "claimed"])
def test_killed_at_each_point_of_one_process(folder: Path, point: str) -> None:
    trainers = start(folder, 2, kill=(point, 7, 1))
    trainers[1].process.join(60)
    said = kill(trainers)
    found = newest_sharded(folder, print)
    assert found is not None
    assert found.step >= said > 0
    check(found, ranks=2)
    found.close()


def test_the_memory_of_one_process_is_computed_of_two_refused(folder: Path) -> None:
    trainers = start(folder, 4)
    wait_for(trainers, 3)
    keepers = keeper_pids(folder)
    assert len(keepers) == 4
    # Trainers first: a living one would give its memory to a new keeper.
    said = kill(trainers)
    end(keepers[2])
    for path in folder.glob("shards/0002-of-0004/checkpoint-*"):
        shutil.rmtree(path)
    lines: list[str] = []
    found = newest_sharded(folder, lines.append)
    assert found is not None, lines
    assert found.step >= said
    assert "computed from parity" in found.name
    check(found, ranks=4)
    found.close()
    end(keepers[0])
    for path in folder.glob("shards/0000-of-0004/checkpoint-*"):
        shutil.rmtree(path)
    assert newest_sharded(folder, lines.append) is None
    assert "nothing is left of processes 0, 2" in lines[-1]


def until_written(folder: Path) -> None:
    """Until the keepers have written what they held, and have ended."""
    until = time.monotonic() + 20
    while keeper_pids(folder):
        assert time.monotonic() < until
        time.sleep(0.05)


def persisted(folder: Path, ranks: int, step: int = 3, **options: Any) -> None:
    trainers = start(folder, ranks, lease=0, **options)
    wait_for(trainers, step)
    kill(trainers)
    until_written(folder)


def test_from_the_disk_damaged_swapped_or_gone(folder: Path) -> None:
    persisted(folder, 3)
    found = newest_sharded(folder, print)
    assert found is not None
    check(found, ranks=3)
    assert "(disk)" in found.name
    step = found.step
    victim = next(folder.glob(f"shards/0001-of-0003/checkpoint-{step:06d}"))
    weights = victim / "trained.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    again = newest_sharded(folder, print)
    assert again is not None
    assert again.step == step
    assert "computed" in again.name
    check(again, ranks=3)
    # The parity of one is damaged too: that is two shards.
    stripe = next(folder.glob(f"shards/0002-of-0003/checkpoint-{step:06d}/parity.bin"))
    data = bytearray(stripe.read_bytes())
    data[5] ^= 1
    stripe.write_bytes(data)
    lines: list[str] = []
    older = newest_sharded(folder, lines.append)
    assert older is None or older.step < step
    assert any("parity.bin" in line or "nothing is left" in line for line in lines)


def test_shards_of_two_snapshots_are_never_mixed(folder: Path, tmp_path: Path) -> None:
    persisted(folder, 3)
    found = newest_sharded(folder, print)
    assert found is not None
    name, step = found.snapshot, found.step
    # Another training reached the same step in the same folder, and lost two of its three shards.
    other = tmp_path / "other"
    persisted(other, 3, step, begin=step - 3)
    theirs = newest_sharded(other, print)
    assert theirs is not None
    place = next(folder.glob("shards/0001-of-0003"))
    shutil.rmtree(place)
    shutil.copytree(other / "shards/0001-of-0003", place)
    mixed = newest_sharded(folder, print)
    assert mixed is not None
    assert mixed.snapshot == name
    assert "computed" in mixed.name
    check(mixed, ranks=3)


def test_a_reader_disturbs_nobody(folder: Path) -> None:
    trainers = start(folder, 2)
    wait_for(trainers, 2)
    for _ in range(20):
        found = newest_sharded(folder, lambda line: None)
        if found is not None:
            check(found, ranks=2)
            found.close()
    assert all(trainer.process.is_alive() for trainer in trainers)
    before = kill(trainers)
    found = newest_sharded(folder, print)
    assert found is not None
    assert found.step >= before
    found.close()
    assert look(folder, print) is None  # that of the folder itself, which has no keeper


def test_a_training_that_ends_well_leaves_no_memory(folder: Path) -> None:
    trainers = start(folder, 2, steps=3)
    for trainer in trainers:
        trainer.end()
    assert [trainer.process.exitcode for trainer in trainers] == [0, 0]
    assert keeper_pids(folder) == []
    assert newest_sharded(folder, print) is None


def test_without_parity_one_lost_is_lost(folder: Path) -> None:
    persisted(folder, 2, parity=False)
    found = newest_sharded(folder, print)
    assert found is not None
    check(found, ranks=2)
    shutil.rmtree(folder / "shards/0001-of-0002")
    lines: list[str] = []
    assert newest_sharded(folder, lines.append) is None
    assert "there is no parity" in lines[0]
