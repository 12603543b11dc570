"""SIGKILL of real trainers, at random moments and at each point of the protocol.

After every kill the next trainer finds a snapshot that is whole, of one step, and no older than the last one
that was published.
"""

import os
import random
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from keeper_processes import (
    QUICK,
    alive,
    all_heard,
    hear,
    no_keeper_left,
    step_in,
    take,
    trainer,
    until,
)
from shoestring.checkpoint import Snapshotter, newest, prune

__all__ = ["no_keeper_left"]  # a fixture, for every test here


def train_for_ever(run: Path, pipe: Connection) -> None:
    """Say what was found, and whether a slot was torn; then each step when its snapshot is published."""
    warnings: list[str] = []
    # The third slot: two would make each trainer wait for the keeper's write of what the last one left.
    snapshots = Snapshotter(run, slots=3, settings=QUICK, warn=warnings.append)
    found = snapshots.newest()
    step = step_in(found) if found else 0
    memory = snapshots._keeping.memory
    torn = memory is not None and len(memory.headers()) < 3
    pipe.send((step, torn, snapshots.keeper_pid, warnings))
    del found
    while True:
        step += 1
        take(snapshots, step)
        pipe.send(step)


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    rng = random.Random(0)
    run = tmp_path / "run"
    acknowledged, torn, keepers = 0, 0, set()
    kills = 200
    for number in range(kills):
        with trainer(train_for_ever, run) as (process, pipe):
            step, was_torn, keeper, warnings = hear(pipe)
            assert warnings == []
            assert step >= acknowledged
            torn += was_torn
            keepers.add(keeper)
            assert hear(pipe) == step + 1
            time.sleep(rng.uniform(0, 0.01))
            process.kill()
            process.join()
            acknowledged = max([step + 1, *all_heard(pipe)])
        if number % 20 == 19:
            prune(run, keep=2)
    assert len(keepers) == 1, "one keeper outlived them all"
    assert torn >= kills // 10, "the kills must have met snapshots in progress"
    until(lambda: (found := newest(run, print)) is not None and found.step >= acknowledged)


def die_at(run: Path, point: int, pipe: Connection) -> None:
    """Two whole snapshots, then one that is killed at its point number `point`, if it has so many."""
    count = -1

    def at(name: str) -> None:
        nonlocal count
        if count >= 0:
            if count == point:
                pipe.send(name)
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)
            count += 1

    snapshots = Snapshotter(run, settings=QUICK, at=at)
    found = snapshots.newest()
    step = step_in(found) if found else 0
    generation = found.generation if found else 0
    pipe.send((step, generation, snapshots.keeper_pid))
    del found
    floats = 2_000_000  # more than a chunk
    for _ in range(2):
        step += 1
        take(snapshots, step, floats)
    count = 0
    take(snapshots, step + 1, floats)
    pipe.send("")


def test_killed_at_every_point_of_the_protocol(tmp_path: Path) -> None:
    run = tmp_path / "run"
    expected, last_generation, names = 0, 0, []
    while True:
        with trainer(die_at, run, len(names)) as (process, pipe):
            step, generation, keeper = hear(pipe)
            assert step == expected
            assert generation >= last_generation
            name = hear(pipe)
            process.join(20)
            assert process.exitcode == (-signal.SIGKILL if name else 0)
        if not name:
            break
        names.append(name)
        # The snapshot counts from the moment of its header, and not before.
        expected = step + (3 if name == "published" else 2)
        last_generation = generation + (3 if name == "published" else 2)
    # three files; two full chunks and the rest
    assert names == [
        "claimed",
        "invalid",
        "file",
        "file",
        "chunk",
        "file",
        "chunk",
        "chunk",
        "data",
        "table",
        "published",
    ]
    assert alive(keeper)


def test_both_killed_leaves_what_is_on_the_disk(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with trainer(train_for_ever, run) as (process, pipe):
        *_, keeper, _ = hear(pipe)
        hear(pipe)
        process.kill()
        process.join()
    until(lambda: newest(run, print) is not None if run.is_dir() else False)
    on_disk = newest(run, print)
    assert on_disk is not None
    with trainer(train_for_ever, run) as (process, pipe):
        step, *_ = hear(pipe)
        assert step == on_disk.step
        hear(pipe)
        os.kill(keeper, signal.SIGKILL)
        process.kill()
        process.join()
    until(lambda: not alive(keeper))
    with trainer(train_for_ever, run) as (process, pipe):
        step, _, fresh, _ = hear(pipe)
        assert step == 0, "the memory is gone with both"
        assert fresh != keeper
    found = newest(run, print)
    assert found is not None
    assert found.step >= on_disk.step
