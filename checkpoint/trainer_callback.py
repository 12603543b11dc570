"""Snapshots in memory for Hugging Face's Trainer.

    snapshots = SnapshotCallback()
    trainer = Trainer(..., callbacks=[snapshots])
    trainer.train(resume_from_checkpoint=snapshots.resume(trainer))

A snapshot of step N is begun when step N+1 begins: what the Trainer logs, evaluates and saves after step N is
in it, and so are the draws that evaluation makes from the generators. It is copied during the forward and
backward passes of step N+1.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..recipes.errors import ShoestringError, UserError
from .aside import sweep
from .generators import random_state
from .interval import interval_by_cost
from .keeper_settings import KeeperSettings
from .reading import newest
from .retention import prune
from .snapshot import Snapshotter
from .trainer_contents import Saved, parameter_order, saved_order, trainer_contents
from .trainer_folder import newest_folder, write_folder

FOLDER = "snapshots"
"""In the Trainer's output_dir: what the keeper writes, out of sight of the Trainer's own search."""


class SnapshotCallback(TrainerCallback):
    """Takes snapshots of one Trainer in one process, and resumes from the newest thing there is."""

    def __init__(
        self,
        *,
        every_seconds: float | None = None,
        every_steps: int | None = None,
        slots: int = 2,
        settings: KeeperSettings | None = None,
        warn: Callable[[str], None] = print,
    ) -> None:
        """every_seconds or every_steps: between two; without either, Daly's interval from what one costs.

        slots, settings: as for Snapshotter. warn: gets a line on where it resumes from, and on
        what is skipped or fails.
        """
        if every_seconds is not None and every_steps is not None:
            raise UserError(
                f"every_seconds={every_seconds}, every_steps={every_steps}: give one of them, or neither."
            )
        numeric = type(every_seconds) in (int, float)
        if every_seconds is not None and not (numeric and 0 < every_seconds < float("inf")):
            raise UserError(f"every_seconds={every_seconds!r}: must be a number of seconds above 0.")
        if every_steps is not None and (type(every_steps) is not int or every_steps < 1):
            raise UserError(f"every_steps={every_steps!r}: must be a whole number of steps, 1 or more.")
        self._every_seconds, self._every_steps = every_seconds, every_steps
        self._slots, self._settings, self._warn = slots, settings, warn
        self._snapshotter: Snapshotter | None = None
        self._trainer: Trainer | None = None
        self._start = 0  # the step that `resume` found
        self._step = 0  # of the last snapshot; at first the same
        self._unlogged: dict[str, Any] | None = None
        self._order: list[str] | None = None
        self._taken_at = float("-inf")
        self._waited = 0.0
        self._interval = 0.0 if every_seconds is None else every_seconds
        self._epoch_random: dict[str, Any] | None = None

    def resume(self, trainer: Trainer) -> str | None:
        """What to give to `trainer.train(resume_from_checkpoint=...)`: a path, or None to begin at step 0.

        The newest of the Trainer's own whole checkpoints, the keeper's snapshot, and what a keeper has
        written to the disk. A snapshot is written as output_dir/checkpoint-<step> first, and `trainer.model`
        has its weights then.

        UserError: this trainer cannot have snapshots, another one is at work in its output_dir, or what is
        there is of another model.
        """
        _refuse(trainer, self)
        self.leave()
        output_dir = Path(str(trainer.args.output_dir))
        self._snapshotter = Snapshotter(
            output_dir / FOLDER, slots=self._slots, settings=self._settings, warn=self._warn
        )
        try:
            for line in sweep(output_dir):
                self._warn(line)
            saved = self._newest(self._snapshotter, output_dir / FOLDER)
            found = newest_folder(output_dir, self._warn)
            step, path = (0, None) if found is None else found
            if saved is not None and (path is None or saved.step > step):
                step, path = saved.step, write_folder(trainer, saved, output_dir)
                self._warn(f"resumed from {saved.name}, written as {path}")
            prune(output_dir / FOLDER, keep=1)
            same = saved is not None and saved.step == step
            self._unlogged = saved.json("unlogged") if saved is not None and same else None
            self._order = saved_order(saved) if saved is not None and same else None
        except BaseException:
            self.leave()
            raise
        self._trainer, self._start, self._waited = trainer, step, 0.0
        return None if path is None else str(path)

    def leave(self) -> None:
        """As if the process died: for an exception of `train` that is caught and not followed by `resume`."""
        snapshotter, self._snapshotter = self._snapshotter, None
        if snapshotter is not None:
            snapshotter.leave()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Checks that the training begins where `resume` said. UserError otherwise."""
        how = "Start it with trainer.train(resume_from_checkpoint=snapshots.resume(trainer))."
        if self._trainer is None or state is not self._trainer.state:
            raise UserError(f"SnapshotCallback does not know this training.\n{how}")
        if state.global_step != self._start:
            raise UserError(
                f"The training begins at step {state.global_step}, where resume(trainer) found step "
                f"{self._start}.\n{how}\nTo begin anew, give another output_dir or delete this one."
            )
        self._take_over(self._trainer)
        self._step, self._taken_at = self._start, float("-inf")

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """At the start of an epoch the Trainer restores the generators before the loader draws its seed."""
        self._epoch_random = random_state()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begins a snapshot of the steps made so far, where one is due."""
        epoch_random, self._epoch_random = self._epoch_random, None
        trainer, snapshotter = self._trainer, self._snapshotter
        if trainer is not None and snapshotter is not None and self._is_due(state.global_step):
            self._guarded(lambda: self._take(trainer, snapshotter, epoch_random or random_state()))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Returns when weights and state may change."""
        if self._snapshotter is not None:
            self._guarded(self._snapshotter.wait)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The keeper ends, and its memory is gone."""
        snapshotter, self._snapshotter, self._trainer = self._snapshotter, None, None
        if snapshotter is not None:
            self._guarded(snapshotter.close)

    def _newest(self, snapshotter: Snapshotter, folder: Path) -> Saved | None:
        """The snapshot in memory, or what a keeper has written, whichever is newer."""
        snapshot = snapshotter.newest()
        try:
            written = newest(folder, self._warn)
        except UserError as error:
            # Unlike in a run of our own, the Trainer's checkpoints are there too.
            self._warn(f"{str(error).splitlines()[0]}  They are left alone")
            return snapshot
        if written is not None and (snapshot is None or written.step > snapshot.step):
            return written
        return snapshot

    def _take_over(self, trainer: Trainer) -> None:
        """What the Trainer does not restore: the loss since the last log. It restores state by position, so
        the names at each position are compared.
        """
        if self._order is not None:
            for then, now in zip_longest(self._order, parameter_order(trainer)):
                if then != now:
                    raise UserError(
                        f"The optimizer's state was saved for {then}, where this run trains {now}.\n"
                        "Group the parameters as they were; or begin anew in another output_dir."
                    )
        if self._unlogged is not None:
            loss = self._unlogged["loss"]
            trainer._tr_loss += torch.tensor(loss, device=trainer._tr_loss.device)
            trainer._total_loss_scalar -= loss  # the mean at the end is of this process's steps
            trainer._globalstep_last_logged = self._unlogged["since"]

    def _is_due(self, step: int) -> bool:
        if self._every_steps is not None:
            return step - self._step >= self._every_steps
        return step > self._step and time.monotonic() - self._taken_at >= self._interval

    def _take(self, trainer: Trainer, snapshotter: Snapshotter, generators: dict[str, Any]) -> None:
        if not snapshotter.taken:
            tensors, json = trainer_contents(trainer, generators)
            snapshotter.reserve(tensors=tensors, json=json)  # slow, once: no part of what one costs
        began = time.monotonic()
        tensors, json = trainer_contents(trainer, generators)
        if snapshotter.begin(trainer.state.global_step, tensors=tensors, json=json):
            self._step, self._taken_at = trainer.state.global_step, began
        if self._every_seconds is None:
            self._interval = self._daly(snapshotter, time.monotonic() - began)

    def _daly(self, snapshotter: Snapshotter, begun: float) -> float:
        """Seconds between two: what one costs is the time to begin it, what the step after the last one
        waited for that, and the processor's time that copying it took.
        """
        before, self._waited = self._waited, snapshotter.waited_seconds
        return interval_by_cost(begun + self._waited - before, snapshotter.copy_seconds)

    def _guarded(self, call: Callable[[], object]) -> None:
        """What goes wrong with snapshots does not stop the training: the Trainer's checkpoints go on."""
        try:
            call()
        except (ShoestringError, OSError) as error:
            self._warn(f"no more snapshots in memory: {error}")
            self.leave()


def _refuse(trainer: Trainer, callback: SnapshotCallback) -> None:
    args = trainer.args
    leave_out = "Leave the callback out; the Trainer's own checkpoints go on."
    if args.world_size > 1:
        raise UserError(
            f"SnapshotCallback is for one process; this Trainer has {args.world_size}. {leave_out}"
        )
    if args.device.type not in ("cpu", "cuda"):
        raise UserError(
            f"SnapshotCallback reads from CPU and CUDA alone, not {args.device.type}. {leave_out}"
        )
    for name, sharded in (("deepspeed", trainer.is_deepspeed_enabled), ("fsdp", trainer.is_fsdp_enabled)):
        if sharded or getattr(args, name):
            raise UserError(f"SnapshotCallback cannot read state that {name} shards. {leave_out}")
    if "layerwise" in str(args.optim):
        raise UserError(f"SnapshotCallback cannot read the state of optim={args.optim}. {leave_out}")
    if callback not in trainer.callback_handler.callbacks:
        raise UserError(
            "SnapshotCallback is none of this trainer's callbacks: Trainer(..., callbacks=[snapshots])."
        )
