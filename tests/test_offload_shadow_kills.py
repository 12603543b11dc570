"""Killed at any moment, the state on disk and the weights in memory that are found are of one step."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from forked import CONTEXT
from shoestring.checkpoint import Snapshotter, load_optimizer_state, optimizer_state
from shoestring.offload import offload_optimizer
from shoestring.offload.direct_file import DirectFile
from shoestring.offload.segments import PAGE
from shoestring.optimizers import AdamW
from shoestring.train.snapshot_state import SnapshotState
from torch import nn

pytestmark = pytest.mark.slow

KIB = 1024
KILLS = 24
Named = list[tuple[str, nn.Parameter]]


def parameters() -> Named:
    torch.manual_seed(0)
    shapes = {f"layers.{number}.weight": (64, 64 + number) for number in range(12)} | {"norm": (64,)}
    return [(name, nn.Parameter(torch.randn(shape) * 0.1)) for name, shape in shapes.items()]


def build(named: Named) -> torch.optim.Optimizer:
    return AdamW([{"params": named}], lr=1e-3)


def give_gradients(named: Named, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for _, p in named:
        p.grad = torch.randn(p.shape, generator=generator)


def result_of(named: Named, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors, _ = optimizer_state(optimizer, named)
    state = {
        key: value if isinstance(value, torch.Tensor) else value.read(0, value.shape.numel())
        for key, value in tensors.items()
    }
    return {**{name: p.detach() for name, p in named}, **{k: v.reshape(-1) for k, v in state.items()}}


def train(
    folder: Path, steps: int, *, kill_in: float = 0.0, point: str = "", at_step: int = 0, in_write: int = 0
) -> None:
    """As the loop of a run does it, with a snapshot after each step; killed where the options say."""
    torch.set_num_threads(1)
    now = [0]

    def reached(name: str) -> None:
        if name == point and now[0] == at_step:
            os.kill(os.getpid(), signal.SIGKILL)

    if in_write:
        die_in_write(in_write)
    named = parameters()
    with Snapshotter(folder / "run", warn=lambda line: log(folder, warning=line), at=reached) as snapshots:
        state = SnapshotState(folder / "run", folder / "scratch", lambda line: log(folder, warning=line))
        held = snapshots.newest()
        found = None if held is None else state.open(held)
        state.sweep()
        optimizer, _ = offload_optimizer(
            build(named),
            tier="disk",
            folder=folder / "scratch",
            buffer_size=40 * KIB,
            buffer_count=3,
            io="threads",
            snapshots=True,
        )
        first = 0
        if found is not None:
            weights = found.tensors("weights")
            with torch.no_grad():
                for name, p in named:
                    p.copy_(weights[name])
            load_optimizer_state(optimizer, named, found.open_tensors("optimizer"), found.json("optimizer"))
            first = found.step
            del weights
        log(folder, resumed=first)
        del held, found
        if kill_in:
            threading.Timer(kill_in, os.kill, (os.getpid(), signal.SIGKILL)).start()
        for step in range(first, steps):
            give_gradients(named, step)
            snapshots.wait()
            if state.is_frozen:
                snapshots.flush()
                state.release()
                reached("released")
            optimizer.step()
            now[0] = step + 1
            log(folder, done=step + 1)
            tensors, settings = optimizer_state(optimizer, named)
            parts: dict[str, Any] = {
                "weights": {name: p.detach() for name, p in named},
                "optimizer": tensors,
            }
            texts: dict[str, Any] = {"optimizer": settings}
            state.freeze(optimizer, parts, texts, snapshots.keeper_pid)
            reached("frozen")
            if not snapshots.begin(step + 1, tensors=parts, json=texts):
                state.thaw()
        torch.save(result_of(named, optimizer), folder / "result.pt")
        snapshots.flush()
        optimizer.close()
    state.drop()


def die_in_write(number: int) -> None:
    """Half of the bytes of that write reach the disk, and nothing after it."""
    write, count = DirectFile.write, itertools.count(1)

    def cut_off(self: DirectFile, offset: int, data: memoryview) -> None:
        if next(count) == number:
            write(self, offset, data[: len(data) // 2 // PAGE * PAGE])
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, offset, data)

    DirectFile.write = cut_off  # type: ignore[method-assign]


def log(folder: Path, **values: Any) -> None:
    with (folder / "log").open("a") as file:
        file.write(json.dumps(values) + "\n")


def logged(folder: Path, key: str) -> list[Any]:
    lines = [json.loads(line) for line in (folder / "log").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def start(folder: Path, steps: int, **options: Any) -> int | None:
    process = CONTEXT.Process(target=train, args=(folder, steps), kwargs=options)
    process.start()
    process.join(60)
    return process.exitcode


def uninterrupted(steps: int) -> dict[str, torch.Tensor]:
    named = parameters()
    optimizer = build(named)
    for step in range(steps):
        give_gradients(named, step)
        optimizer.step()
    return result_of(named, optimizer)


def assert_finished(folder: Path, steps: int) -> None:
    found, wanted = torch.load(folder / "result.pt"), uninterrupted(steps)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert list((folder / "scratch").iterdir()) == []
    deadline = time.monotonic() + 10.0
    while keepers(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert keepers(folder) == []


def keepers(folder: Path) -> list[int]:
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or [])
        if "checkpoint.keeper" in line and str(folder) in line and process.info["status"] != "zombie":
            found.append(process.pid)
    return found


def test_killed_at_random_moments_it_goes_on_to_the_bit(tmp_path: Path) -> None:
    rng, steps = random.Random(7), 400
    for _ in range(KILLS):
        assert start(tmp_path, steps, kill_in=rng.uniform(0.001, 0.08)) == -signal.SIGKILL
    assert start(tmp_path, steps) == 0
    assert logged(tmp_path, "warning") == []
    assert len(logged(tmp_path, "resumed")) == KILLS + 1
    done = 0
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    for line in lines:
        if "resumed" in line:
            assert line["resumed"] >= done - 1  # the snapshot of a step is published before the next update
        done = max(done, line.get("done", 0))
    assert_finished(tmp_path, steps)


@pytest.mark.parametrize(
    ("point", "resumed"),
    [
        ("frozen", 5),  # before any of it is copied
        ("table", 5),  # copied, not published
        ("published", 6),  # not released yet
        ("released", 6),
    ],
)
def test_killed_around_the_publication(tmp_path: Path, point: str, resumed: int) -> None:
    assert start(tmp_path, 12, point=point, at_step=6) == -signal.SIGKILL
    assert start(tmp_path, 12) == 0
    assert logged(tmp_path, "warning") == []
    assert logged(tmp_path, "resumed") == [0, resumed]
    assert_finished(tmp_path, 12)


@pytest.mark.parametrize("number", [1, 11, 50, 53, 56, 59, 62])
def test_killed_in_the_middle_of_a_write(tmp_path: Path, number: int) -> None:
    """Writes 50 to 62 are those of one step and of the snapshot after it."""
    assert start(tmp_path, 12, in_write=number) == -signal.SIGKILL
    done = max(logged(tmp_path, "done"), default=0)
    assert start(tmp_path, 12) == 0
    assert logged(tmp_path, "warning") == []
    assert logged(tmp_path, "resumed")[1] >= done - 1
    assert_finished(tmp_path, 12)
