"""Snapshots of a run in host memory, between its checkpoints on the disk.

They are copied while the next step computes. A keeper process holds them: when this one dies it writes the
newest to the run directory, and hands it to the process that is started there next.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Self

from ..adapters import adapter_config
from ..checkpoint import Snapshotter, newest, random_state, snapshot_interval
from ..plan.snapshots import why_no_snapshots
from ..recipes import Every, Recipe
from ..recipes.errors import DivergedError, ShoestringError, UserError, in_columns
from ..schedules import Cadence, Clock
from .parts import Run, Saved
from .rundir import RunDir
from .saving import trainer_state

BETWEEN_DEATHS = 6 * 3600.0
"""Mean seconds between two deaths of a process (a crash, memory that runs out, a kill): an assumption."""
MOST_OFTEN = 1.0
"""Seconds between two snapshots at least, where the interval follows from their cost."""


class Snapshots:
    """The snapshots of one run. Without a Snapshotter there are none, and nothing here does anything."""

    def __init__(
        self,
        snapshotter: Snapshotter | None,
        every: Every | None,
        warn: Callable[[str], None],
        *,
        early: bool,
    ) -> None:
        """every: between two, None by what one costs. early: whether steps are made inside the backward pass,
        so that weights change as soon as that begins.
        """
        self._snapshotter, self._every, self._warn, self._early = snapshotter, every, warn, early
        self._cadence: Cadence | None = None
        self._waited = 0.0

    def newest(self, run_dir: RunDir) -> Saved | None:
        """What the run goes on from: the newest whole checkpoint, or a snapshot of a later step.

        UserError: checkpoints are there, none is whole, and there is no snapshot either.
        """
        snapshot = None if self._snapshotter is None else self._snapshotter.newest()
        try:
            found = newest(run_dir.path, self._warn) if run_dir.holds_run() else None
        except UserError as error:
            if snapshot is None:
                raise
            self._warn(f"{str(error).splitlines()[0]}  The snapshot in memory is used")
            return snapshot
        return snapshot if snapshot is not None and (found is None or snapshot.step > found.step) else found

    def forget(self) -> None:
        """Begin anew: what an earlier process of the run had left is dropped."""
        if self._snapshotter is not None:
            self._snapshotter.forget()

    def begin(self, clock: Clock, *, wanted: bool) -> None:
        """From now on the clock counts with them; there are none where the plan does not want them."""
        if not wanted:
            self.close()
        if self._snapshotter is not None:
            self._cadence = clock.cadence(self._every or Every(steps=1), "snapshot")

    def before_backward(self) -> None:
        """Call before the backward pass of a step."""
        if self._early:
            self.settle()

    def settle(self) -> None:
        """Return when weights and state may change."""
        if self._snapshotter is not None:
            self._guarded(self._snapshotter.wait)

    def take_if_due(self, run: Run) -> None:
        """After a step: begin the next one where it is time."""
        cadence = self._cadence
        if self._snapshotter is not None and cadence is not None and run.clock.should_run(cadence):
            with run.clock.spent("snapshot"):
                self._take(run, self._snapshotter)
            if self._every is None and self._snapshotter is not None:
                cadence.every = Every(seconds=self._interval(self._snapshotter))

    def _take(self, run: Run, snapshotter: Snapshotter) -> None:
        began = time.perf_counter()
        tensors, settings = run.engine.state_dict()
        reference = run.stage.objective.reference
        if reference is not None:
            tensors["reference"] = reference.state_dict()
        json = {"trainer": trainer_state(run), "random": [random_state()], **settings}
        config = adapter_config(run.engine.loss_module.model)
        if config is not None:
            json["adapter_config"] = config
        self._guarded(lambda: snapshotter.begin(run.state.step, tensors=tensors, json=json))
        self._begun = time.perf_counter() - began

    def _interval(self, snapshotter: Snapshotter) -> float:
        """Seconds between two: what one costs is the time to begin it, what steps waited for it, and the
        processor's time that copying took from them.
        """
        before, self._waited = self._waited, snapshotter.waited_seconds
        copying = snapshotter.copy_seconds / (os.cpu_count() or 1)
        cost = max(1e-4, self._begun + self._waited - before + copying)
        return snapshot_interval(cost, BETWEEN_DEATHS, at_least=MOST_OFTEN)

    def _guarded(self, call: Callable[[], object]) -> None:
        """What goes wrong with snapshots does not stop the training: the checkpoints on the disk go on."""
        try:
            call()
        except (ShoestringError, OSError) as error:
            self._warn(f"no more snapshots in memory: {error}")
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
        """The run has saved what it had: the keeper ends."""
        snapshotter, self._snapshotter = self._snapshotter, None
        if snapshotter is not None:
            snapshotter.close()

    def leave(self) -> None:
        """The run ends by an error: the keeper writes the newest snapshot to disk, and holds it a while."""
        snapshotter, self._snapshotter = self._snapshotter, None
        if snapshotter is not None:
            snapshotter.leave()


def open_snapshots(recipe: Recipe, run_dir: RunDir, processes: int, warn: Callable[[str], None]) -> Snapshots:
    """Find the keeper of the run directory or start one, where this run has snapshots.

    UserError: the recipe asks for them where there can be none, or another process is at work there.
    """
    config, reason = recipe.checkpoint, why_no_snapshots(recipe, processes)
    early = bool(getattr(recipe.optimizer, "step_in_backward", False))
    if config.in_memory and reason is not None:
        what = f"true was given, but {reason}.\nLeave it out: checkpoint.in_memory=auto"
        raise UserError(in_columns([("checkpoint.in_memory", what)]))
    wanted = config.in_memory is not False and reason is None
    snapshotter = Snapshotter(run_dir.path, warn=warn) if wanted else None
    return Snapshots(snapshotter, config.snapshot_every, warn, early=early)
