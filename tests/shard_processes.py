"""A training of several processes that does nothing but count, with snapshots.

After each snapshot that is published a process tells its step. `value_at` says what the tensors are then.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forked import CONTEXT
from shoestring.checkpoint import KeeperSettings, ShardedSnapshotter
from shoestring.checkpoint.pieces import share_of

SHAPE = (700, 129)


def value_at(step: int) -> dict[str, dict[str, torch.Tensor]]:
    """Whole tensors after `step` steps."""
    base = torch.arange(SHAPE[0] * SHAPE[1], dtype=torch.float32).view(SHAPE)
    return {
        "trained": {"w": base + step, "b": torch.full((5,), float(step))},
        "optimizer": {"w/exp_avg": base * 0.5 - step, "w/step": torch.tensor(float(step))},
    }


class Trainer:
    """One process; `said` is the last step that it has told."""

    def __init__(self, folder: Path, store: str, ranks: int, rank: int, options: dict[str, Any]) -> None:
        self._here, there = CONTEXT.Pipe(duplex=False)
        self.process = CONTEXT.Process(target=train, args=(folder, store, ranks, rank, options, there))
        self.process.start()
        there.close()
        self.said = 0

    def wait_for(self, step: int) -> None:
        """Until it has told this step. EOFError when it ends before."""
        while self.said < step:
            assert self._here.poll(60)
            self.said = self._here.recv()

    def end(self) -> None:
        """Until it has ended; takes what it still had told."""
        self.process.join(60)
        with suppress(EOFError):
            while True:
                self.said = self._here.recv()


def start(folder: Path, ranks: int, **options: Any) -> list[Trainer]:
    """All processes of one training; options as for `train`."""
    store = str(folder.parent / f"store-{time.monotonic_ns()}")
    return [Trainer(folder, store, ranks, rank, options) for rank in range(ranks)]


def train(folder: Path, store: str, ranks: int, rank: int, options: dict[str, Any], told: Connection) -> None:
    """Options: begin, steps (then it ends well), parity, lease; kill=(POINT, COUNT, RANK) of the protocol."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    point, count, victim = options.get("kill", ("none", 0, -1))
    met = 0

    def at(name: str) -> None:
        nonlocal met
        met += name == point and victim == rank
        if met and met == count:
            os.kill(os.getpid(), signal.SIGKILL)

    snapshots = ShardedSnapshotter(
        folder,
        parity=options.get("parity", True),
        settings=KeeperSettings(lease=options.get("lease", 60)),
        warn=lambda line: None,
        at=at,
    )
    begin = options.get("begin", 0)
    state = value_at(begin)
    for step in range(begin + 1, options.get("steps", 1_000_000) + 1):
        snapshots.wait()
        after = value_at(step)
        for file, tensors in state.items():
            for name, tensor in tensors.items():
                tensor.copy_(after[file][name])
        json = {"own": {"rank": rank, "step": step}} | ({"trainer": {"step": step}} if rank == 0 else {})
        if snapshots.begin(step, pieces=share_of(state, rank, ranks), json=json):
            snapshots.flush()
            told.send(step)
    snapshots.close()
    dist.destroy_process_group()
