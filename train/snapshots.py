"""Snapshots of a run in host memory, between its checkpoints on the disk.

They are copied while the next step computes. A keeper process holds them: when this one dies it writes the
newest to the run directory, and hands it to the process that is started there next. Where several processes
hold the state each has a keeper of its own for its shard (shard_taking.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol, Self

from accelerate import Accelerator

from ..checkpoint import ShardedSnapshotter, Snapshotter
from ..checkpoint.interval import interval_by_cost
from ..plan import scratch_folder
from ..plan.snapshots import in_shards, why_no_snapshots
from ..recipes import Every, Recipe
from ..recipes.errors import DivergedError, ShoestringError, UserError, in_columns
from ..schedules import Cadence, Clock
from .going_on import newest_state
from .parts import Run, Saved
from .rundir import RunDir
from .shard_taking import ShardTaker
from .shards import Shards
from .snapshot_state import SnapshotState
from .whole_taking import WholeTaker


class Taker(Protocol):
    """What takes the snapshots: `WholeTaker` or `ShardTaker`. What goes wrong is raised by any call."""

    @property
    def waited_seconds(self) -> float:
        """Of training, in all, that `wait` has cost."""
        ...

    @property
    def copy_seconds(self) -> float:
        """Of the last one, in the background."""
        ...

    def take(self, run: Run) -> None:
        """Begin one, unless the last one is not done."""
        ...

    def wait(self) -> None:
        """Return when weights and state may change."""
        ...

    def forget(self) -> None:
        """Drop what earlier processes have left."""
        ...

    def end(self) -> None:
        """The keeper ends, and its memory is gone."""
        ...

    def leave(self) -> None:
        """The run ends by an error: the keeper writes the newest one to the disk, and holds it a while."""
        ...


class Snapshots:
    """The snapshots of one run. Without a taker there are none, and nothing here does anything but read what
    earlier processes have left.
    """

    def __init__(
        self,
        taker: Taker | None,
        own: Snapshotter | None,
        every: Every | None,
        accelerator: Accelerator,
        run_dir: RunDir,
        state: SnapshotState,
        shards: Shards,
        warn: Callable[[str], None],
        *,
        early: bool,
    ) -> None:
        """own: of a process that holds all. every: between two, None by what one costs. state: of the
        optimizer, where it is on disk. early: whether steps are made inside the backward pass, so that
        weights change as soon as that begins.
        """
        self._taker, self._own, self._every, self._warn, self._early = taker, own, every, warn, early
        self._accelerator, self._run_dir, self._state, self._shards = accelerator, run_dir, state, shards
        self._cadence: Cadence | None = None
        self._waited = 0.0

    def newest(self) -> Saved | None:
        """What the run goes on from: the newest whole checkpoint, or a snapshot of a later step.

        UserError: checkpoints are there, none is whole, and there is no snapshot either.
        """
        own = None if self._own is None else self._own.newest()
        return newest_state(self._run_dir, self._accelerator, own, self._shards, self._state, self._warn)

    def forget(self) -> None:
        """Begin anew: what earlier processes of the run had left is dropped. In all processes."""
        if self._taker is not None:
            self._taker.forget()
        elif self._accelerator.is_main_process:
            self._shards.clear()
        if self._accelerator.is_main_process:
            self._state.sweep()

    def begin(self, clock: Clock, *, wanted: bool) -> None:
        """From now on the clock counts with them; there are none where the plan does not want them."""
        if not wanted and self._taker is not None:
            self._taker.end()
            self._taker = None
        if self._taker is not None:
            self._cadence = clock.cadence(self._every or Every(steps=1), "snapshot")

    def before_backward(self) -> None:
        """Call before the backward pass of a step."""
        if self._early:
            self.settle()

    def settle(self) -> None:
        """Return when weights and state may change."""
        if self._taker is not None:
            self._guarded(self._taker.wait)

    def due(self, clock: Clock) -> bool:
        """Whether it is time for one."""
        return self._cadence is not None and self._taker is not None and clock.should_run(self._cadence)

    def take(self, run: Run) -> None:
        """After a step, in all processes: begin one."""
        taker, cadence = self._taker, self._cadence
        if taker is None or cadence is None:
            return
        began = time.perf_counter()
        with run.clock.spent("snapshot"):
            self._guarded(lambda: taker.take(run))
        if self._every is None:
            cadence.every = Every(seconds=self._interval(taker, time.perf_counter() - began))

    def _interval(self, taker: Taker, begun: float) -> float:
        """Seconds between two: what one costs is the time to begin it, what steps waited for it, the copy."""
        before, self._waited = self._waited, taker.waited_seconds
        return interval_by_cost(begun + self._waited - before, taker.copy_seconds)

    def _guarded(self, call: Callable[[], object]) -> None:
        """What goes wrong with snapshots does not stop the training: the checkpoints on the disk go on."""
        try:
            call()
        except (ShoestringError, OSError) as error:
            self._warn(f"no more snapshots in memory: {error}")
            self._state.thaw()
            self.leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        """A run that ends by itself, or has diverged, has saved what it had; any other error counts as its
        death.
        """
        if kind is None or issubclass(kind, DivergedError):
            self.close()
        else:
            self.leave()

    def close(self) -> None:
        """The run has saved what it had: the keepers end, and nothing is left."""
        taker, self._taker = self._taker, None
        try:
            if taker is not None:
                taker.end()
        finally:
            self._shards.remove(self._accelerator.process_index, self._accelerator.num_processes)
            self._state.drop()

    def leave(self) -> None:
        """The run ends by an error: the keeper writes the newest snapshot to disk, and holds it a while."""
        taker, self._taker = self._taker, None
        if taker is not None:
            taker.leave()


def open_snapshots(
    recipe: Recipe, run_dir: RunDir, accelerator: Accelerator, warn: Callable[[str], None]
) -> Snapshots:
    """Find the keepers of the run directory or start them, where this run has snapshots. In all processes.

    UserError: the recipe asks for them where there can be none, or another process is at work there.
    """
    config, reason = recipe.checkpoint, why_no_snapshots(recipe, accelerator.num_processes)
    if config.in_memory and reason is not None:
        what = f"true was given, but {reason}.\nLeave it out: checkpoint.in_memory=auto"
        raise UserError(in_columns([("checkpoint.in_memory", what)]))
    state = SnapshotState(run_dir.path, scratch_folder(recipe), warn)
    shards = Shards(run_dir.path, warn)
    taker: Taker | None = None
    own: Snapshotter | None = None
    if config.in_memory is not False and reason is None:
        if in_shards(recipe, accelerator.num_processes):
            taker = ShardTaker(ShardedSnapshotter(run_dir.path, warn=warn), shards)
        else:
            own = Snapshotter(run_dir.path, warn=warn)
            taker = WholeTaker(own, state, shards)
    early = bool(getattr(recipe.optimizer, "step_in_backward", False))
    every = config.snapshot_every
    return Snapshots(taker, own, every, accelerator, run_dir, state, shards, warn, early=early)
